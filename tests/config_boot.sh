#!/usr/bin/env bash
# A configuration file at the boot of init, in namespaces: what a machine does with it.
. "$(dirname "$0")/lib.sh"

# boot_with JSON [OPTION of init…]: it stands in /etc/agent.json, the program in /opt/code.
boot_with() {
    local json=$1
    shift
    NS_PREPARE="mkdir -p opt/code; cp $APPS/process/*.py $APPS/broken/*.py opt/code; printf %s ${json@Q} >etc/agent.json"
    ns_start "$@"
}

fact() { http /facts | "$PYTHON" -c "import json, sys; F = json.load(sys.stdin); print($1)"; }
serves() { [ "$(http / 2>/dev/null)" = hello ]; }
is_refused_with() { [ "$(http / -o "$T/body" -w '%{http_code}')" = 503 ] && grep -qE "$1" "$T/body"; }

# ---- a program -----------------------------------------------------------------------------

boot_with '{"entrypoint": "main:app", "variables": {"A": "file"}, "hostname": "h-1.example", "listen": ["vsock:80"],
    "log": "debug", "limits": {"http_body_bytes": 10, "body_bytes": 2000}}' --limit http_body_bytes=20
check 'program: it is started' wait_for 20 serves
baseline
check_eq 'program: in its folder' /opt/code "$(fact 'F["cwd"]')"
check_eq 'program: its variable' file "$(fact 'F["env"]["A"]')"
check_eq 'program: a hostname is not an address of the network' False "$(fact '"ALEPH_ADDRESS_TO_USE" in F["env"]')"
check_eq 'program: the hostname' h-1.example "$(shell 'cat /proc/sys/kernel/hostname')"
assert_console_has 'program: the level of the log' '[0-9]  prewarm'
check_eq 'program: the command line wins' 200 "$(http /body -o "$T/body" -w '%{http_code}' --data-binary 123456789012345)"
refused 'program: a limit of the file' 1 'larger than the limit' request /body -d "$(printf 'x%.0s' {1..3000})"
refused 'program: a configuration is refused' 1 'this machine is configured already' configure "$APPS/hello" main:app
http /exit >"$T/exit" || true
assert_console_has 'program: it is started again when it dies' 'main:app: serving again'
guest_ok 'program: well afterwards'
check 'program: halt' halt

boot_with '{"entrypoint": "main:app", "listen": ["vsock:80"]}'
check 'sandbox: a file does not lead to vsock' wait_for 20 serves
check_eq 'sandbox: not a descriptor of it' 0 "$(find "/proc/$PID1/fd" -lname '*vsock*' | wc -l)"

# ---- one that does not start ---------------------------------------------------------------

boot_with '{"entrypoint": "later:app"}' --limit backoff_max_ms=200
check 'later: 503 with the reason' wait_for 20 is_refused_with 'RuntimeError: not yet'
assert_console_has 'later: its traceback is on the console' 'program.*line [0-9]+, in <module>'
assert_console_has 'later: it is tried again' 'setup: next try in 200 ms'
refused 'later: port 52 says the same' 1 'RuntimeError: not yet' request /
shell 'touch /later'
check 'later: until it starts' wait_for 20 serves
check 'later: halt' halt

boot_with '{"entrypoint": "ends:app"}'
check 'ends: 503 with its exit code' wait_for 20 is_refused_with 'exited with exit code 3'
check 'ends: a host may configure between two tries' wait_for 20 configure "$APPS/hello" main:app
check_eq 'ends: whose program is served' hello "$(http /)"
sleep 1
check_eq 'ends: and stays' hello "$(http /)"

# Its next try comes while a host's program starts, which fails in its turn.
boot_with '{"entrypoint": "later:app"}' --limit backoff_ms=500 --limit backoff_max_ms=500 --limit start_ms=2000
host_fails() { configure "$APPS/broken" sleeps:app >"$T/host" 2>&1 || grep -q 'did not start within' "$T/host"; }
check 'later: a host configures what does not start' wait_for 20 host_fails
shell 'touch /later'
check 'later: then the file is tried again' wait_for 10 serves

boot_with '{"entrypoint": "ends:app"}' --limit backoff_ms=60000 --limit backoff_max_ms=60000
check 'ends: waits' console_has 'next try in 60000 ms'
check 'ends: halts while it waits' halt

# ---- no program, or no sense -----------------------------------------------------------------

boot_with '{"limits": {"body_bytes": 1024}}'
check 'settings alone: a host configures' configure "$APPS/hello" main:app
refused 'settings alone: they hold' 1 'larger than the limit' request / -d "$(printf 'x%.0s' {1..1025})"

boot_with $'{\n  "entrypoint": "main:app"\n  "code": "/opt/code"\n}'
assert_console_has 'bad: the console says where' '/etc/agent.json: line 3: '
check 'bad: so does HTTP' is_refused_with '/etc/agent.json: line 3: '
check 'bad: a host configures' configure "$APPS/hello" main:app
check_eq 'bad: and is served' hello "$(http /)"

boot_with '{"entrypoint": "main:app", "limits": {"http_body_bytes": 10, "conns": 1}}'
check 'bad: the field' is_refused_with '/etc/agent.json: limits.conns: limit conns takes a number from 16'
check 'bad: a host configures' configure "$APPS/process" main:app
check_eq 'bad: nothing of it counts' 200 "$(http /body -o "$T/body" -w '%{http_code}' --data-binary 123456789012345)"

boot_with '' --config /none
assert_console_has 'bad: a file that is not there' '/none: No such file'

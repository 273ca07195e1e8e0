#!/usr/bin/env bash
# A machine that no supervisor configures: /etc/agent.json in its image, or agent.config=PATH.
. "$(dirname "$0")/lib.sh"

EXAMPLES=$GUEST_ROOT/examples

# A guest whose image has more files in it: start_with 'FILE PATH'… [-- KERNEL ARGUMENT…]
start_with() {
    local put=()
    new_guest
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        put+=("$1")
        shift
    done
    [ $# = 0 ] || shift
    cp --sparse=always "$GUEST_IMAGE" "$T/image"
    printf 'mkdir opt/code\n' >"$T/debugfs"
    printf 'write %s\n' "${put[@]}" >>"$T/debugfs"
    debugfs -w -f "$T/debugfs" "$T/image" >"$T/debugfs.log" 2>&1
    GUEST_IMAGE=$T/image
    run_guest "$@"
}

serves() { http / -f >"$T/first" 2>&1; }
processor_ms() { shell 'cat /proc/1/stat' | awk '{ print ($14 + $15) * 10 }'; }

# ---- the example ---------------------------------------------------------------------------

cat >"$T/bad.json" <<'END'
{
  "entrypoint": "main:app",
  "code": "/opt/code"
  "log": "debug"
}
END
start_with "$EXAMPLES/agent.json etc/agent.json" "$EXAMPLES/hello-python/main.py opt/code/main.py" \
    "$T/bad.json etc/bad.json" -- agent.log=debug agent.limit.http_body_bytes=20
check 'example: vsock 80 answers, nobody has configured it' wait_for 60 serves
check_eq 'example: by its program' 'Hello from Python. You asked for /x' "$(http /x)"
before=$(processor_ms)
sleep 5
check_at_most 'example: ms of 5000 that nobody listening costs' 500 $(($(processor_ms) - before))
check_at_most 'example: and lines of log, at the level of debug' 3 "$(grep -ac 'ready' "$CONSOLE")"
check_eq 'example: the command line wins over the file' 413 \
    "$(http / -o "$T/body" -w '%{http_code}' --data-binary 123456789012345678901)"
hear_ready "$SOCK"
await_ready 20
check_match 'example: whoever listens later hears ready' version "$(cat "$GUEST/ready")"
refused 'example: a configuration is refused' 1 'this machine is configured already' configure "$APPS/hello" main:app
shell 'for p in /proc/[0-9]*; do ! grep -qs worker.py $p/cmdline || kill -9 ${p#/proc/}; done'
assert_console_has 'example: its program is started again' 'main:app: serving again'
check_eq 'example: and answers' 'Hello from Python. You asked for /y' "$(http /y)"
check 'example: it can be halted' halt

# ---- a file that makes no sense ------------------------------------------------------------

start_with "$T/bad.json etc/bad.json" -- agent.config=/etc/bad.json
hear_ready "$SOCK"
await_ready 60
assert_console_has 'bad file: the console says where' '/etc/bad.json: line 4: '
check_match 'bad file: so does port 80, with 503' '503' "$(http / -w '%{http_code}')"
check_match 'bad file: with the reason' '/etc/bad.json: line 4: ' "$(cat "$T/check.out"; http /)"
refused 'bad file: and port 52' 1 '/etc/bad.json: line 4: ' request /
check 'bad file: a configuration is accepted' configure "$APPS/hello" main:app
check_eq 'bad file: and served' hello "$(http /)"

#!/usr/bin/env bash
# `agent run`: the server as an ordinary process, as an ordinary user, as the first process of
# a container, under another init.
. "$(dirname "$0")/lib.sh"

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=$T/tmp
PROGRAM=$APPS/process
NOBODY='setpriv --reuid=65534 --regid=65534 --clear-groups'
chmod 711 "$T"
mkdir -m 1777 "$T/tmp"

# start OPTION…: `agent run` behind the socket $HTTP, up to its first answer. WITH is put before it.
WITH=''
start() {
    HTTP=$T/tmp/http.sock
    spawn "$T/log" $WITH "$AGENT" run --listen "unix:$HTTP" "$@"
    RUN_PID=$SPAWNED
    wait_for 20 serves && is_alive "$RUN_PID" || { fail "$TEST_NAME: $*: starts" "$(cat "$T/log")"; exit 1; }
}

serves() { http / -f >"$T/first" 2>&1 || is_gone "$RUN_PID"; }

# Ends it with a signal. Sets STATUS.
finish() {
    STATUS=0
    kill "-${1:-TERM}" "$RUN_PID"
    wait "$RUN_PID" 2>/dev/null || STATUS=$?
}

# fact EXPRESSION: of the map F that the program answers.
fact() { http /facts | "$PYTHON" -c "import json, sys; F = json.load(sys.stdin); print($1)"; }

# ends NAME STATUS REGEX OPTION…: it does not come up.
ends() {
    local name=$1 status=$2 regex=$3
    shift 3
    refused "$name" "$status" "$regex" timeout 30 "$AGENT" run --listen "unix:$T/tmp/s" "$@"
}

is_zombie_or_gone() { ! grep -qs '^State:.*[^Z] ([^z]' "/proc/$1/status"; }
left_over() { ls -A "$T/tmp"; }

# ---- a process -----------------------------------------------------------------------------

check_process() {
    HTTP_PORT=$((20000 + RANDOM % 10000))
    echo held >"$T/held"
    exec 9<"$T/held"
    TOP=own WITH='' start --listen "tcp:127.0.0.1:$HTTP_PORT" --env A=1 --env A=2 --env "BYE=$T/bye" --env 'E=a=b' \
        --limit http_body_bytes=1000 "$PROGRAM" main:app
    check_eq 'process: a second address' hello "$(curl -sS --max-time 20 "http://127.0.0.1:$HTTP_PORT/")"
    check_eq 'process: the program is in its folder' "$PROGRAM" "$(fact 'F["cwd"]')"
    check_eq 'process: its variables, the later one, and the rest of one with =' '2 a=b' "$(fact 'F["env"]["A"], F["env"]["E"]' | tr -d "(),'")"
    check_eq 'process: it has our environment' own "$(fact 'F["env"]["TOP"]')"
    check_eq 'process: and nothing of a guest' '[]' "$(fact '[n for n in F["env"] if n.startswith("ALEPH")]')"
    check_eq 'process: it is a child of the agent' "$RUN_PID" "$(fact 'F["ppid"]')"
    check_eq 'process: descriptors 0 to 3 (others are its own)' '[0, 1, 2, 3]' "$(fact 'F["fds"][:4]')"
    check_eq 'process: none of what the agent was given' '' "$(find "/proc/$(fact 'F["pid"]')/fd" -lname "$T/held")"
    check 'process: which the agent was given' test /proc/$RUN_PID/fd/9 -ef "$T/held"
    exec 9<&-
    check_eq 'process: vsock is not touched' 0 "$(find /proc/$RUN_PID/fd -lname '*vsock*' | wc -l)"
    check_eq 'process: hostname, mounts and network namespace stay' "$(readlink /proc/self/ns/{uts,mnt,net} | xargs)" \
        "$(readlink /proc/$RUN_PID/ns/{uts,mnt,net} | xargs)"
    check_eq 'process: a limit is kept' 413 "$(http /body -o "$T/body" -w '%{http_code}' --data-binary "$(printf 'x%.0s' {1..1001})")"
    http /slow >"$T/slow" &
    sleep 0.2
    finish
    check_eq 'process: SIGTERM ends it with 0' 0 "$STATUS"
    wait $! || true
    check_eq 'process: after the requests in flight' hello "$(cat "$T/slow")"
    check_eq 'process: and the end of the lifespan' bye "$(cat "$T/bye" 2>&1)"
    check_eq 'process: nothing is left over' '' "$(left_over)"
}

check_signals() {
    local signal
    for signal in INT HUP QUIT; do
        start "$PROGRAM" main:app
        finish $signal
        check_eq "signal: SIG$signal ends it with 0" 0 "$STATUS"
    done
    WITH=nohup start "$PROGRAM" main:app
    kill -HUP "$RUN_PID"
    check_eq 'signal: not SIGHUP under nohup' hello "$(http /)"
    kill -USR1 "$(fact 'F["pid"]')" || true
    check 'death: it starts again' wait_for 20 serves_again
    check_match 'death: which is logged' 'killed by signal 10' "$(cat "$T/log")"
    http /exit >"$T/exit" || true
    check_match 'death: the request that was in flight is told' 'exited with exit code 7' "$(cat "$T/exit")"
    finish
    check_eq 'death: it still ends with 0' 0 "$STATUS"
}

serves_again() { grep -q 'serving again' "$T/log" && [ "$(http / 2>/dev/null)" = hello ]; }

# A socket that another process has opened, as systemd does for a unit with a .socket file.
check_inherited() {
    cat >"$T/activate.py" <<'END'
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen()
os.dup2(s.fileno(), 77)
os.set_inheritable(77, True)
os.execv(sys.argv[2], sys.argv[2:])
END
    WITH="$PYTHON $T/activate.py $T/tmp/inherited" start --listen fd:77 "$PROGRAM" main:app
    check_eq 'fd: an inherited socket is served' hello "$(curl -sS --max-time 20 --unix-socket "$T/tmp/inherited" http://x/)"
    check_eq 'fd: and not handed on' False "$(fact '77 in F["fds"]')"
    finish
    rm "$T/tmp/inherited"
}

# The agent is killed: a program does not stay without one.
check_killed() {
    start "$PROGRAM" main:app
    local pid
    pid=$(fact 'F["pid"]')
    finish KILL
    check 'killed: the program goes with its agent' wait_for 5 is_zombie_or_gone "$pid"
    rm -rf "$T"/tmp/*
}

check_orphans() {
    start "$PROGRAM" main:app
    local stays gone
    gone=$(http /gone) stays=$(http /orphan)
    check 'orphans: one that has ended is reaped' wait_for 5 is_gone "$gone"
    check_eq 'orphans: one that has not is adopted' "$RUN_PID" "$(awk '$1 == "PPid:" { print $2 }' "/proc/$stays/status")"
    finish
    check 'orphans: and ended at the end' is_zombie_or_gone "$stays"
}

# ---- what does not start ---------------------------------------------------------------------

check_failures() {
    ends 'fails: a folder that is not there' 2 'none: No such file' "$T/none" main:app
    ends 'fails: no such module: the reason' 1 'there is no module nope' "$PROGRAM" nope:app
    ends 'fails: an exception: its traceback' 1 'line [0-9]+, in <module>' "$APPS/broken" raises:app
    ends 'fails: exit code 3 is its exit code' 3 'exited with exit code 3' "$APPS/broken" ends:app
    ends 'fails: not in time' 1 'did not start within 300 ms' --limit start_ms=300 "$APPS/broken" sleeps:app
    ends 'usage: an option that is none' 2 'no such option' --what ever
    ends 'usage: a variable without =' 2 'expected NAME=VALUE' --env A "$PROGRAM" main:app
    ends 'usage: a limit that is none' 2 'no limit is named x' --limit x=1 "$PROGRAM" main:app
    ends 'usage: an address that is none' 2 'listen\[1\]: "80" is not' --listen 80 "$PROGRAM" main:app
    ends 'usage: a folder alone' 2 '^usage: ' "$PROGRAM"
    local command
    for command in run init call forward; do
        refused "usage: $command --help" 0 "^usage: agent $command" "$AGENT" $command --help
    done
    "$PYTHON" -c 'import socket, time; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True); time.sleep(60)' >"$T/port" &
    wait_for 10 test -s "$T/port"
    ends 'fails: an address in use' 1 'Address (already )?in use' --listen "tcp:127.0.0.1:$(cat "$T/port")" "$PROGRAM" main:app
    kill $!
    check_eq 'fails: nothing is left over' '' "$(left_over)"
}

# ---- programs that listen --------------------------------------------------------------------

check_listeners() {
    start --env A=1 "$PROGRAM" server.py --flag 'two words'
    check_eq 'file.py: its arguments' "['--flag', 'two words']" "$(fact 'F["args"]')"
    check_eq 'file.py: its folder and variable' "$PROGRAM 1" "$(fact 'F["cwd"] + " " + F["env"]["A"]')"
    check_eq 'file.py: the port is free, and not that of a guest' True "$(fact 'int(F["env"]["PORT"]) not in (0, 80, 8080)')"
    local first
    first=$(fact 'F["env"]["PORT"]')
    http /exit >"$T/exit" || true
    check 'file.py: it starts again' wait_for 20 serves_again
    check_eq 'file.py: on a port that it is told' True "$(fact "int(F['env']['PORT']) > 0 and F['env']['HOST'] == '127.0.0.1'")"
    finish
    check_eq 'file.py: SIGTERM ends it with 0' 0 "$STATUS"

    local other=$((10000 + RANDOM % 10000))
    cat >"$T/agent.json" <<END
{ "entrypoint": "run.sh a", "args": ["b c", "d"], "code": "$PROGRAM", "port": $other, "listen": ["unix:$T/tmp/http.sock"] }
END
    start --config "$T/agent.json"
    check_eq 'executable: the arguments of the entrypoint, then the others' "['a', 'b c', 'd']" "$(fact 'F["args"]')"
    check_eq 'executable: the port of the file' $other "$(fact 'F["env"]["PORT"]')"
    finish

    need nodejs
    start "$APPS/node" listener.js
    check_match 'Node: it answers' . "$(http /)"
    check_match 'Node: from the shim in a folder of its own' '/agent-[^/]*/node.cjs' "$(tr '\0' ' ' <"/proc/$(cat "/proc/$RUN_PID/task/$RUN_PID/children" | tr -d ' ')/cmdline")"
    finish
    check_eq 'Node: SIGTERM ends it with 0' 0 "$STATUS"
    ends 'executable: one that is not there' 127 'none: No such file' "$PROGRAM" none
    ends 'executable: its exit code' 9 'exited with exit code 9' "$PROGRAM" ends.sh
    check_eq 'executable: what it printed stands once in the log' 1 "$(grep -c 'its last words' "$T/check.out")"
    ends 'Node: a module that throws' 1 'Error' "$APPS/node" throws.js
    check_eq 'listeners: nothing is left over' '' "$(left_over)"
}

# ---- the file ----------------------------------------------------------------------------------

check_config() {
    cat >"$T/agent.json" <<END
{ "entrypoint": "main:app", "code": "$PROGRAM", "variables": { "A": "file", "B": "file" },
  "listen": ["unix:$T/tmp/file.sock"], "wire": "unix:$T/tmp/wire.sock", "log": "debug",
  "limits": { "http_body_bytes": 10, "body_bytes": 2000 } }
END
    start --config "$T/agent.json" --env A=told --limit http_body_bytes=20
    check_eq 'config: a variable of the command line wins, the others are there' 'told file' \
        "$(fact 'F["env"]["A"], F["env"]["B"]' | tr -d "(),'")"
    check_eq 'config: so does a limit' 200 "$(http /body -o "$T/body" -w '%{http_code}' --data-binary 123456789012345)"
    check 'config: so do its addresses' not test -e "$T/tmp/file.sock"
    SOCK=unix:$T/tmp/wire.sock
    check_eq 'wire: a request' hello "$(request /)"
    refused 'wire: a limit of the file' 1 'larger than the limit' request /body -d "$(printf 'x%.0s' {1..3000})"
    refused 'wire: a configuration is refused' 1 'this machine is configured already' configure "$APPS/hello" main:app
    check_eq 'wire: a command' here "$(shell 'echo here')"
    check 'wire: halt' call halt
    STATUS=0
    wait "$RUN_PID" || STATUS=$?
    check_eq 'wire: which ends it with 0' 0 "$STATUS"
    SOCK=''

    spawn "$T/log" "$AGENT" run --config "$T/agent.json"
    RUN_PID=$SPAWNED HTTP=$T/tmp/file.sock
    check 'config: alone it is enough' wait_for 20 serves
    finish

    HTTP=$T/tmp/http.sock
    start --config "$GUEST_ROOT/examples/agent.json" "$GUEST_ROOT/examples/hello-python" main:app
    check_match 'example: the file, with the program of the command line' 'Hello from Python' "$(http /x)"
    finish
}

# ---- containers, users, units --------------------------------------------------------------------

check_container() {
    WITH='unshare --pid --fork --kill-child=KILL --mount-proc' start "$PROGRAM" main:app
    local first stays
    first=$(cat "/proc/$RUN_PID/task/$RUN_PID/children")
    check_eq 'container: it is the first process' 1 "$(fact 'F["ppid"]')"
    for stays in {1..50}; do http /gone; done >"$T/gone"
    check 'container: fifty orphans are reaped' wait_for 5 has_one_child ${first}
    kill -TERM ${first}
    STATUS=0
    wait "$RUN_PID" || STATUS=$?
    check_eq 'container: SIGTERM ends it with 0' 0 "$STATUS"
    refused 'container: a program that does not start' 3 'exit code 3' unshare --pid --fork --mount-proc \
        "$AGENT" run --listen "unix:$T/tmp/s" "$APPS/broken" ends:app
}

has_one_child() { [ "$(wc -w <"/proc/$1/task/$1/children")" = 1 ]; }

check_nobody() {
    cp -r "$PROGRAM" "$T/program"
    WITH=$NOBODY start "$T/program" main:app
    check_eq 'nobody: the program runs' 65534 "$(fact 'F["uid"]')"
    finish
    check_eq 'nobody: ends with 0' 0 "$STATUS"
    check_eq 'nobody: nothing is left over' '' "$(left_over)"
    check 'nobody: nothing went wrong' not grep -qiE 'denied|permitted' "$T/log"
}

check_unit() {
    need systemd
    mkdir -p "$T/units"
    sed "s|^ExecStart=[^ ]*|ExecStart=$AGENT|" "$GUEST_ROOT/examples/agent.service" >"$T/units/agent.service"
    check 'unit: systemd has nothing to say against it' systemd-analyze verify --man=no "$T/units/agent.service"
    check_eq 'unit: nor a warning' '' "$(cat "$T/check.out")"
}

check_process
check_signals
check_inherited
check_killed
check_orphans
check_failures
check_listeners
check_config
check_container
check_nobody
check_unit

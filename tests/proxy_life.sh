#!/usr/bin/env bash
# Executables: how they start, or do not, how they die and come again. Numbers in names are those
# of the list of bad inputs, group G and 35.
. "$(dirname "$0")/lib.sh"

# program NAME: standard input becomes run.sh of a folder of that name. Prints the folder.
program() {
    mkdir -p "$T/programs/$1"
    cat >"$T/programs/$1/run.sh"
    echo "$T/programs/$1"
}

# ---- Programs that do not start ----------------------------------------------------------------

# fails NAME REGEX DIR ENTRYPOINT: the host is told why.
fails() {
    refused "$1" 1 "$2" executable "$3" "$4"
    guest_ok "$1: well afterwards"
}

# The same for a run.sh from standard input.
fails_run() { fails "$1" "$2" "$(program source)" "${3-run.sh}"; }

failing_starts() {
    local entry
    GOOD=(shell 'echo well')
    ns_start
    baseline
    fails_run 'exits at once: its exit code is told' 'exited with exit code 7' <<<$'#!/bin/sh\necho last words; exit 7'
    fails_run 'exits at once: its output is told' 'last words' <<<$'#!/bin/sh\necho last words; exit 7'
    fails_run 'exits at once: its standard error is told' 'last words' <<<$'#!/bin/sh\necho last words >&2; exit 7'
    fails_run 'exits at once with 0' 'exited with exit code 0' <<<$'#!/bin/sh\n'
    fails_run 'exits after half a second' 'exited with exit code 8' <<<$'#!/bin/sh\nsleep 0.5; exit 8'
    fails_run 'kills itself at once' 'killed by signal 9' <<<$'#!/bin/sh\nkill -9 $$'
    fails_run 'leaves children behind and exits' 'exited with exit code 6' <<<$'#!/bin/sh\nsleep 60 & exit 6'
    fails_run 'prints 10 MiB, then exits' 'the end' <<<$'#!/bin/sh\nhead -c 10000000 /dev/zero | tr "\\0" x; echo; echo the end; exit 1'
    check_at_most 'an error reply fits the host, bytes' 32768 "$(wc -c <"$T/check.out")"
    fails_run '62 missing file' 'missing\.sh' missing.sh <<<$'#!/bin/sh\n'
    fails_run '62 missing file in a folder' 'folder/missing' folder/missing <<<$'#!/bin/sh\n'
    mkdir -p "$T/programs/source/folder"
    : >"$T/programs/source/folder/file"
    fails_run '62 a directory' 'folder.*([Dd]irectory|Permission denied)' folder <<<$'#!/bin/sh\n'
    fails_run '62 ENOEXEC: no first line for the kernel' 'run\.sh.*Exec format error' <<<'echo hello'
    printf '\177ELF\2\1\1\0garbage' | fails_run '62 ENOEXEC: an ELF file that is none' 'run\.sh.*Exec format error'
    : | fails_run '62 ENOEXEC: an empty file' 'run\.sh.*Exec format error'
    fails_run '62 CRLF shebang' 'run\.sh.*No such file' <<<$'#!/bin/sh\r\nexit 0\r'
    fails_run '62 no interpreter' 'run\.sh.*No such file' <<<$'#!/no/such/interpreter\n'
    for entry in '' ' '; do
        fails_run "62 entrypoint '$entry'" 'entrypoint' "$entry" <<<$'#!/bin/sh\n'
    done
    shell 'for d in /usr/local/bin /usr/bin; do test ! -e $d/python3 || mv $d/python3 $d/hidden; done'
    fails '62 file.py where there is no Python' 'there is no python3' "$APPS/upstream" server.py
    shell 'for d in /usr/local/bin /usr/bin; do test ! -e $d/hidden || mv $d/hidden $d/python3; done'
    check '62 after all these, a good one starts' upstream
    check_eq '62 after all these, it answers' hello "$(http /hello)"
}

# ---- Programs that do ---------------------------------------------------------------------------

# How a program is started and what it finds.
starts() {
    local folder
    GOOD=(http /hello)
    folder=$(program starter <<<$'#!/bin/sh\nexec python3 ./server.py "$@"')
    cp "$APPS/upstream/server.py" "$folder"
    chmod 644 "$folder"/*
    ns_start
    check 'a script that nobody may execute, with arguments' executable "$folder" 'run.sh one --two=3  four' \
        --env SIDE="$GUEST/side.sock" --env GREETING='grüß dich'
    check_eq 'it answers' hello "$(http /hello)"
    check_eq 'it answers on the supervisor'"'"'s wire' hello "$(request /hello)"
    check_eq 'its arguments' "['one', '--two=3', 'four']" "$(state 'it["argv"][1:]')"
    check_eq 'PORT and HOST' '8080 127.0.0.1' "$(state '" ".join(it["environment"][k] for k in ("PORT", "HOST"))')"
    check_eq 'a variable' 'grüß dich' "$(state 'it["environment"]["GREETING"]')"
    check_eq 'the variables of the SDK' 'http://localhost /tmp/socat-socket' \
        "$(state '" ".join(it["environment"][k] for k in ("ALEPH_API_HOST", "ALEPH_API_UNIX_SOCKET"))')"
    check_eq 'the working folder' /opt/code "$(state 'it["folder"]')"
    check 'halts' halt
    ns_start
    check 'plain code: a Python file' executable "$APPS/upstream/server.py" server.py --env SIDE="$GUEST/side.sock"
    check_eq 'plain code: it answers' hello "$(http /hello)"
    ns_start
    check 'a program that listens on ::1 alone' upstream --env FAMILY=6
    check_eq 'a program that listens on ::1 alone: it answers' hello "$(http /hello)"
}

late_ones() {
    local start folder
    GOOD=(http /hello)
    ns_start
    start=$(ms)
    check '35 listens after 4 s: configured' upstream --env LATE=4
    check_at_most '35 listens after 4 s: configured after a second, ms' 2500 $(($(ms) - start))
    check_eq '35 listens after 4 s: a request waits' hello "$(http /hello)"
    check '35 listens after 4 s: it did wait' test $(($(ms) - start)) -ge 3900
    check_at_most '35 listens after 4 s: and no longer than it must, ms' 5500 $(($(ms) - start))
    baseline
    guest_ok '35 listens after 4 s: well afterwards'
    start=$(ms)
    check 'listens at once: configured' eval 'ns_start && upstream'
    check_eq 'listens at once: answers' hello "$(http /hello)"
    folder=$(program exits <<<$'#!/bin/sh\nsleep 1.6; echo gave up; exit 9')
    ns_start --limit backoff_ms=60000 --limit backoff_max_ms=60000
    check '35 exits after a second: configured' executable "$folder" run.sh
    check_match '35 exits after a second: the request is told how' 'exited with exit code 9' "$(http / -i)"
    assert_console_has '35 exits after a second: its output is on the console' 'gave up'
}

loading() {
    GOOD=(shell 'echo well')
    NS_PREPARE='mkdir -p root; echo "<h1>one moment</h1>" >root/loading.html'
    ns_start --limit loading_ms=1500
    NS_PREPARE=''
    check '35 loading page: configured' upstream --env LATE=6
    baseline
    http / -i >"$T/page"
    check_match '35 loading page: 503' '^HTTP/1.1 503 ' "$(cat "$T/page")"
    check_match '35 loading page: its type' '^[Cc]ontent-[Tt]ype: text/html' "$(cat "$T/page")"
    check_match '35 loading page: as the runtime has it' '^<h1>one moment</h1>' "$(cat "$T/page")"
    check_match '35 loading page: on the supervisor'"'"'s wire' '503' "$(request -i / 2>&1)"
    check_match '35 loading page: on the supervisor'"'"'s wire, the page' '<h1>one moment</h1>' "$(request / 2>&1)"
    check_eq '35 loading page: answered once it listens' hello "$(wait_for 10 eval '[ "$(http /hello)" = hello ]'; http /hello)"
    guest_ok '35 loading page: well afterwards'
    ns_start --limit loading_ms=1500
    check '35 no loading page: configured' upstream --env LATE=60
    baseline
    http / -i >"$T/page"
    check_match '35 no loading page: 503' '^HTTP/1.1 503 ' "$(cat "$T/page")"
    check_match '35 no loading page: a reason' 'does not listen on port 8080' "$(cat "$T/page")"
    refused '35 no loading page: a reason on the supervisor'"'"'s wire' 1 'does not listen on port 8080' request /
    guest_ok '35 no loading page: well afterwards'
}

# Its queue of connections is full, nobody takes one.
never_accepts() {
    local folder n pids=()
    GOOD=(shell 'echo well')
    folder=$(program deaf <<'END_OF_PROGRAM'
#!/usr/bin/env python3
import socket, time
s = socket.socket()
s.bind(("127.0.0.1", 8080))
s.listen(0)
time.sleep(600)
END_OF_PROGRAM
)
    ns_start --limit response_head_ms=1500
    check '35 never accepts: configured' executable "$folder" run.sh
    baseline
    for n in {1..20}; do
        http / -o "$T/deaf.$n" -w '%{http_code}\n' >"$T/deaf.$n.status" &
        pids+=($!)
    done
    wait "${pids[@]}" || true
    check_eq '35 never accepts: 20 requests at once are told' 20 "$(cat "$T"/deaf.*.status | grep -cE '^50[234]$')"
    check_eq '35 never accepts: with a reason' 20 "$(cat "$T"/deaf.{1..20} | grep -cE '.{8}')"
    refused '35 never accepts: told on the supervisor'"'"'s wire' 1 '1500 ms' request /
    guest_ok '35 never accepts: well afterwards'
}

# ---- Life and death ------------------------------------------------------------------------------

# dies NAME REGEX STEP: a request that ends the program is told how; the next is answered by
# another process.
dies() {
    local name=$1 regex=$2 step=$3 before answer
    before=$(state 'it["pid"]')
    side "{\"script\": \"die\", \"steps\": [$step, [\"gone\"]]}" >/dev/null
    answer=$(http /play/die -w '\n%{http_code}')
    check_match "$name: told" "$regex" "$answer"
    check_eq "$name: status" 502 "${answer##*$'\n'}"
    check_eq "$name: the next request waits and is answered" hello "$(http /hello)"
    check "$name: by another process" test "$(state 'it["pid"]')" != "$before"
    side "{\"script\": \"die\", \"steps\": [$step, [\"gone\"]]}" >/dev/null
    refused "$name: told on the supervisor's wire" 1 "$regex" request /play/die
    check_eq "$name: answered after that" hello "$(request /hello)"
    assert_console_has "$name: on the console" "$regex"
    guest_ok "$name: well afterwards"
}

deaths() {
    local n pids=() start folder
    GOOD=(http /hello)
    ns_start --limit backoff_ms=50 --limit backoff_max_ms=200
    check '64 a program that dies: configured' upstream
    http /1 >/dev/null
    baseline
    dies '64 exits with 3' 'exited with exit code 3' '["exit", 3]'
    dies '64 SIGKILL' 'killed by signal 9' '["kill", 9]'
    dies '64 SIGSEGV' 'killed by signal 11' '["kill", 11]'
    dies '64 exits within a head' 'exited with exit code 4' '["send", "485454502f312e3120"], ["exit", 4]'
    side '{"script": "hang", "steps": [["gone"]]}' >/dev/null
    for n in {1..10}; do
        http /play/hang -o "$T/hang.$n" -w '%{http_code}\n' >"$T/hang.$n.status" &
        pids+=($!)
    done
    check '64 ten requests are in flight' wait_for 10 eval '[ "$(state "it[\"plays\"].get(\"hang\", 0)")" = 10 ]'
    side '{"script": "die", "steps": [["exit", 5]]}' >/dev/null
    http /play/die >/dev/null
    wait "${pids[@]}" || true
    check_eq '64 with ten requests in flight: each is told' 10 "$(cat "$T"/hang.{1..10} | grep -c 'exited with exit code 5')"
    check_eq '64 with ten requests in flight: with its status' 10 "$(cat "$T"/hang.*.status | grep -cx 502)"
    guest_ok '64 with ten requests in flight: well afterwards'
    ns_start --limit backoff_ms=50
    check '35 listens late on a restart: configured' upstream --env STARTS="$GUEST/starts" --env LATE=2
    http /hello >/dev/null
    side '{"script": "die", "steps": [["exit", 5]]}' >/dev/null
    start=$(ms)                                         # its two seconds begin before we hear of its end
    http /play/die >/dev/null
    check_eq '35 listens late on a restart: a request waits' hello "$(http /hello)"
    check '35 listens late on a restart: it did wait' test $(($(ms) - start)) -ge 1500
    check_eq '35 listens late on a restart: it was started twice' 2 "$(wc -l <"$GUEST/starts")"
    # A request that has been sent to a process and ends it is for no other.
    folder=$(program slow <<<$'#!/bin/sh\npython3 server.py\ncode=$?\nsleep 0.1\nexit $code')
    cp "$APPS/upstream/server.py" "$folder"
    ns_start --limit backoff_ms=50
    check '64 it ends later than its connections: configured' executable "$folder" run.sh --env SIDE="$GUEST/side.sock"
    http /hello >/dev/null
    baseline
    dies '64 it ends later than its connections' 'exited with exit code 3' '["exit", 3]'
    # The shell dies; what listens is its child, and must go with it.
    folder=$(program family <<<$'#!/bin/sh\necho $$ >$PIDFILE\npython3 server.py &\nwait')
    cp "$APPS/upstream/server.py" "$folder"
    ns_start --limit backoff_ms=50
    check '64 the shell of a program is killed: configured' executable "$folder" run.sh \
        --env SIDE="$GUEST/side.sock" --env PIDFILE="$GUEST/pid"
    http /hello >/dev/null
    n=$(state 'it["pid"]')
    shell "kill -9 $(cat "$GUEST/pid")"
    check '64 the shell of a program is killed: the program is started again' wait_for 10 eval \
        '[ "$(http /hello)" = hello ] && [ "$(state "it[\"pid\"]")" != '"$n"' ]'
    check '64 the shell of a program is killed: its child is gone' wait_for 3 eval \
        "[ \"\$(shell 'test -e /proc/$n && echo there || echo gone')\" = gone ]"
}

# SIGTERM, and time to use it.
halts() {
    local folder
    folder=$(program tidy <<'END_OF_PROGRAM'
#!/usr/bin/env python3
import http.server, os, signal, sys
def end(*_):
    open(os.environ["ENDED"], "w").write("tidy")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")
http.server.HTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
END_OF_PROGRAM
)
    ns_start
    check 'http.server of Python: configured' executable "$folder" run.sh --env ENDED="$GUEST/ended"
    check_eq 'http.server of Python, HTTP/1.0: answers' hello "$(http /)"
    check_eq 'http.server of Python, HTTP/1.0: POST is answered, too' 501 "$(http / -X POST -d x -o /dev/null -w '%{http_code}')"
    check 'halts' halt
    check_eq 'halt: SIGTERM reached it' tidy "$(cat "$GUEST/ended")"
}

failing_starts
starts
late_ones
loading
never_accepts
deaths
halts

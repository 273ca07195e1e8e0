#!/usr/bin/env bash
# `agent run` with several workers, --reload and --access-log.
. "$(dirname "$0")/lib.sh"

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=$T
mkdir "$T/code"
cat >"$T/code/main.py" <<'END'
import asyncio, os

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            print(message["type"], os.getpid(), flush=True)
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["path"] == "/wait":
        with open(os.environ["GO"] + ".waits", "a") as waits:
            waits.write("x")
        while not os.path.exists(os.environ["GO"]):
            await asyncio.sleep(0.02)
    if scope["path"] == "/exit":
        os._exit(3)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % os.getpid()})
END
echo 'module.exports = (req, res) => res.end(String(process.pid))' >"$T/code/node.js"

# start OPTION…: `agent run` behind the socket $HTTP, up to its first answer.
start() {
    HTTP=$T/http.sock
    rm -f "$T/go"
    spawn "$T/log" env GO="$T/go" "$AGENT" run --listen "unix:$HTTP" "$@"
    RUN_PID=$SPAWNED
    wait_for 30 serves && is_alive "$RUN_PID" || { fail "$TEST_NAME: $*: starts" "$(cat "$T/log")"; exit 1; }
}

serves() { http / -f >"$T/first" 2>&1 || is_gone "$RUN_PID"; }

finish() {
    STATUS=0
    kill -TERM "$RUN_PID"
    wait "$RUN_PID" 2>/dev/null || STATUS=$?
}

count() { grep -c "$1" "$T/log" || true; }
counts() { [ "$(count "$1")" = "$2" ]; }

# hold N: as many requests at once, each held by its worker until go. Their answers are in $T/held.
hold() {
    local i
    HELD=()
    : >"$T/go.waits"
    for ((i = 0; i < $1; i++)); do
        http /wait -o "$T/held.$i" -w '%{http_code}' >"$T/held.status.$i" &
        HELD+=($!)
    done
    wait_for 20 eval '[ "$(stat -c %s "$T/go.waits")" = '"$1"' ]'
}

go() {
    touch "$T/go"
    wait "${HELD[@]}" || true
    rm "$T/go"
    for ((i = 0; i < ${#HELD[@]}; i++)); do cat "$T/held.$i"; echo; done >"$T/held"
}

# ---- several -------------------------------------------------------------------------------

start --workers 3 "$T/code" main:app
check 'workers: each has its lifespan' wait_for 20 counts 'lifespan.startup' 3
hold 6
go
check_eq 'workers: six requests at once, two for each' '2 2 2' "$(sort "$T/held" | uniq -c | awk '{ print $1 }' | xargs)"
hold 3
check_match 'workers: one that dies answers with an error' '^HTTP/1.1 502' "$(http /exit -i)"
go
check_eq 'workers: and costs only what it had' '200 200' "$(cat "$T"/held.status.[0-2] | fold -w 3 | grep 200 | head -n 2 | xargs)"
check 'workers: it is started again' wait_for 20 counts 'lifespan.startup' 4
hold 6
go
check_eq 'workers: and takes its part' '2 2 2' "$(sort "$T/held" | uniq -c | awk '{ print $1 }' | xargs)"
hold 1
(sleep 0.5; touch "$T/go") &
finish
go
check_eq 'workers: SIGTERM ends it with 0' 0 "$STATUS"
check_eq 'workers: the request in flight ends' 200 "$(cat "$T/held.status.0")"
check_eq 'workers: each lifespan ends' 3 "$(count 'lifespan.shutdown')"

start --workers auto "$T/code" main:app
check 'workers: auto is as many as there are CPUs' wait_for 20 counts 'lifespan.startup' "$(nproc)"
finish
for wrong in 0 129 -1 x ''; do
    refused "workers: \"$wrong\" is refused" 2 'workers' timeout 20 "$AGENT" run --workers "$wrong" "$T/code" main:app
done
printf '#!/bin/sh\n' >"$T/code/run.sh" && chmod 755 "$T/code/run.sh"
refused 'workers: an executable has one' 2 'workers' timeout 20 "$AGENT" run --listen "unix:$T/s" --workers 2 "$T/code" run.sh

need nodejs >&2
start --workers 2 "$T/code" node.js
both_answer() {
    local i pids=()
    for ((i = 0; i < 8; i++)); do http / -o "$T/node.$i" & pids+=($!); done
    wait "${pids[@]}"
    [ "$(for ((i = 0; i < 8; i++)); do cat "$T/node.$i"; echo; done | sort -u | wc -l)" = 2 ]
}
check 'workers: two of Node share the requests' wait_for 20 both_answer
finish

# ---- --reload ------------------------------------------------------------------------------

start --reload "$T/code" main:app
OLD=$(http /)
hold 1
echo '# changed' >>"$T/code/main.py"
is_new() { [ "$(http /)" != "$OLD" ]; }
check 'reload: a change starts the program anew' wait_for 20 is_new
go
check_eq 'reload: a request in flight ends where it was' "$OLD" "$(cat "$T/held.0")"
cp "$T/code/main.py" "$T/main.py"
echo 'syntax error' >>"$T/code/main.py"
is_refused() { [ "$(http / -o "$T/answer" -w '%{http_code}')" = 503 ]; }
check 'reload: one that does not start is a 503' wait_for 20 is_refused
check_match 'reload: which says why' 'SyntaxError|syntax' "$(cat "$T/answer" "$T/log")"
cp "$T/main.py" "$T/code/main.py"
serves_again() { http / -f >"$T/answer" 2>&1; }
check 'reload: the next change mends it' wait_for 20 serves_again
finish
check_eq 'reload: SIGTERM ends it with 0' 0 "$STATUS"

# ---- --access-log --------------------------------------------------------------------------

start --access-log "$T/code" main:app
http "/a%20b?c" -d body >"$T/answer"
http /exit >"$T/answer" || true
check 'access log: a line for each request' wait_for 5 eval '[ "$(count "HTTP/1.1\" ")" -ge 3 ]'
check_match 'access log: in the Common Log Format' '^[^ ]+ - - \[[^]]+\] "POST /a%20b\?c HTTP/1\.1" 200 [0-9]+ [0-9.]+$' "$(cat "$T/log")"
check_match 'access log: with its status' '"GET /exit HTTP/1\.1" 502 ' "$(cat "$T/log")"
finish
start "$T/code" main:app
http /quiet >"$T/answer"
finish
check_eq 'access log: none without being asked for' 0 "$(count 'GET /quiet')"

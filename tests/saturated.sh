#!/usr/bin/env bash
# Workers that have all that they may: requests wait, then are refused; and the second ctrl-C.
. "$(dirname "$0")/lib.sh"

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir "$T/program"
HTTP=$T/http.sock

# program VERSION
program() {
    cat >"$T/program/main.new" <<END
import asyncio, os

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("bye", os.getpid(), flush=True)
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(1)
    if scope["path"] == "/exit":
        os._exit(7)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"$1 %d\n" % os.getpid()})
END
    mv "$T/program/main.new" "$T/program/main.py"
}

start() {
    spawn "$T/log" "$AGENT" run --listen "unix:$HTTP" "$@"
    RUN_PID=$SPAWNED
}

serves() { [ -n "$(http / -f 2>/dev/null)" ]; }
finish() {
    STATUS=0
    kill "-$1" "$RUN_PID"
    wait "$RUN_PID" 2>/dev/null || STATUS=$?
}

program one
start --workers 2 --limit in_flight=1 --limit queue=1 "$T/program" main:app
check 'queue: it serves' wait_for 30 serves
for i in 1 2 3 4 5 6 7 8; do http /slow -o "$T/q.$i" -D "$T/h.$i" & done
wait $(jobs -p | grep -vx "$RUN_PID") || true
check_match 'queue: past it 503' '^HTTP/1.1 503' "$(cat "$T"/h.?)"
check_match 'queue: with Retry-After' '^retry-after: 1' "$(cat "$T"/h.?)"
check_match 'queue: others are served' '^HTTP/1.1 200' "$(cat "$T"/h.?)"
http /slow >"$T/last" 2>&1 &
sleep 0.3
kill -INT "$RUN_PID"
sleep 0.1
START=$(ms)
finish INT
check_at_most 'ctrl-C twice: ends at once, ms' 800 $(($(ms) - START))

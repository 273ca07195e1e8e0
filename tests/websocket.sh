#!/usr/bin/env bash
# WebSockets of ASGI programs. Raw frames: the cases stand in websocket_raw.py, numbers in names
# are those of the list of bad inputs. Then a client that nobody here wrote.
. "$(dirname "$0")/lib.sh"

need python3-websockets >&2

# drive GROUP: its lines are checks; then the standing rule.
drive() {
    checks_from raw "$1"
    guest_ok "$1: well afterwards"
}

raw() {
    SANITIZED="$SANITIZED" PYTHONDONTWRITEBYTECODE=1 timeout 120 \
        "$PYTHON" "$TESTS/websocket_raw.py" "$HTTP" "$CONSOLE" "$PID1" "$1"
}

GOOD=(http /)

ns_start --limit websocket_message_bytes=1048576 --limit linger_ms=100
configure "$APPS/websocket" main:app
MANY=300 raw many >/dev/null            # the heap has its size in the baseline
baseline
for group in handshakes frames wrong pressure; do
    drive "$group"
done
MANY=300 drive many
drive crash

ns_start --limit websocket_ping_ms=300
configure "$APPS/websocket" main:app
baseline
drive silence

# What a program writes for its WebSockets.
ns_start --limit backoff_ms=1 --limit backoff_max_ms=20 --limit linger_ms=100
configure "$APPS/websocket" main:app
baseline
drive hostile

# A client that others wrote, over TCP, of a program that is served without a machine.
# (websocket_matrix.sh has more of both.)
URL=127.0.0.1:$((20000 + RANDOM % 10000))
spawn "$T/run.log" "$AGENT" run --listen "tcp:$URL" "$APPS/websocket" main:app
wait_for 20 curl -sf -o /dev/null "http://$URL/" || fail "$TEST_NAME: serves" "$(cat "$T/run.log")"
checks_from "$PYTHON" "$TESTS/websocket_clients.py" 'websockets' "ws://$URL"

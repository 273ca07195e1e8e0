#!/usr/bin/env bash
# WebSockets of ASGI programs. Raw frames: the cases stand in websocket_raw.py, numbers in names
# are those of the list of bad inputs. Then clients that nobody here wrote, also against a Node
# program behind the tunnel.
. "$(dirname "$0")/lib.sh"

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

#!/usr/bin/env bash
# The HTTP front, by raw bytes over its socket. Numbers in names are those of the list of bad
# inputs; the cases stand in http_raw.py.
. "$(dirname "$0")/lib.sh"

# drive GROUP: its lines are checks; then the standing rule.
drive() {
    checks_from $WITHIN env SANITIZED="$SANITIZED" PYTHONDONTWRITEBYTECODE=1 timeout 120 \
        "$PYTHON" "$TESTS/http_raw.py" "${FRONT:-$HTTP}" "$CONSOLE" "$PID1" "$1"
    guest_ok "$1: well afterwards"
}

WITHIN='' FRONT=''
drive_tcp() { WITHIN="nsenter --net=/proc/$PID1/ns/net" FRONT=$TCP drive "$1"; }

GOOD=(http /bytes/6)

# Buffers, the log and its ring have their full size in the baseline.
warm_up() {
    http /flood/1 >/dev/null
    http /bytes/1048576 | http / --data-binary @- >/dev/null
    baseline
}

TCP=tcp:127.0.0.1:8088              # of the namespaces' own loopback
ns_start --http "$TCP" --http tcp:127.0.0.1:8089,trust=all --http "tcp:127.0.0.1:8090,trust=127.0.0.1,10.0.0.0/8"
configure "$APPS/echo" main:app
warm_up
for group in parser lengths lines bytes versions sizes chunks paths smuggling bodies methods keepalive \
    expect leaving memory unread together programs idle; do
    drive "$group"
done
drive table
drive_tcp table
drive_tcp resets
WITHIN="nsenter --net=/proc/$PID1/ns/net" drive trust

ns_start --limit http_body_bytes=1048576 --limit silent_ms=600 --limit head_ms=800 \
    --limit body_ms=700 --limit idle_ms=900 --limit response_head_ms=1500 \
    --limit send_ms=1000 --limit conns=64
configure "$APPS/echo" main:app
warm_up
drive limits
drive times

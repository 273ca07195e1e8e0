#!/usr/bin/env bash
# What a program may do to the channel between its worker and the agent: group L, 82 to 85, of
# the list of bad inputs. The cases stand in frames.py.
. "$(dirname "$0")/lib.sh"

# drive GROUP: its lines are checks; then the standing rule.
drive() {
    checks_from env SANITIZED="$SANITIZED" PYTHONDONTWRITEBYTECODE=1 timeout 120 \
        "$PYTHON" "$TESTS/frames.py" "$HTTP" "$CONSOLE" "$PID1" "$1"
    guest_ok "$1: well afterwards"
}

GOOD=(http /)

ns_start --limit backoff_ms=1 --limit backoff_max_ms=20 --limit response_head_ms=20000
configure "$APPS/frames" main:app
http /frames?f=own,12,0,0,,x262144 >/dev/null       # buffers have their size in the baseline
baseline
for group in sizes streams order slots channel unread; do
    drive "$group"
done

ns_start --limit backoff_ms=1 --limit backoff_max_ms=20 --limit response_head_ms=1500
configure "$APPS/frames" main:app
baseline
drive stolen

#!/usr/bin/env bash
# Executables behind the reverse proxy. Numbers in names are those of the list of bad inputs,
# A18 to A26 and group B; what is said byte by byte stands in proxy_raw.py.
. "$(dirname "$0")/lib.sh"

# drive GROUP: its lines are checks; then the standing rule.
drive() {
    checks_from env SIDE="$GUEST/side.sock" ALEPH="$SOCK" SANITIZED="$SANITIZED" PYTHONDONTWRITEBYTECODE=1 \
        timeout 120 "$PYTHON" "$TESTS/proxy_raw.py" "$HTTP" "$CONSOLE" "$PID1" "$1"
    guest_ok "$1: well afterwards"
}

# Buffers, the log and the pool have their full size in the baseline.
warm_up() {
    local n pids=()
    for n in {1..32}; do
        http "/$n" >/dev/null &
        pids+=($!)
    done
    wait "${pids[@]}"
    head -c 1048576 /dev/zero | http / --data-binary @- >/dev/null
    baseline
}

# ---- What goes through it ----------------------------------------------------------------------

traffic() {
    local group
    GOOD=(http /hello)
    ns_start
    check 'configured' upstream
    warm_up
    for group in exact hops framing heads lengths endless ends pool bodies leaving tunnel events; do
        drive "$group"
    done
    is_sanitized && return          # what follows measures, which says nothing of such an agent
    for group in memory together tunnels; do
        drive "$group"
    done
}

slow_ones() {
    GOOD=(http /hello)
    ns_start --limit silent_ms=600 --limit head_ms=800 --limit body_ms=700 --limit idle_ms=900 \
        --limit response_head_ms=1500 --limit send_ms=1000
    check 'configured under small limits' upstream
    warm_up
    drive times
}

traffic
slow_ones

#!/usr/bin/env bash
# The guest API over a guest's vsock: what a Unix socket cannot show of items 70 and 71.
. "$(dirname "$0")/lib.sh"

BYTES=512000
GOOD=(request /get/0)

# The host's end of vsock port 53.
serve() {
    spawn "$T/serve.log" "$PYTHON" -B "$TESTS/bridge_peer.py" serve "$GUEST/v.sock_53" "$BYTES"
    SERVE_PID=$SPAWNED
}

# The answer of /get/N when each of N gets all.
all_of() { printf "$BYTES %.0s" $(seq "$1") | sed 's/ $//'; }

# Of PID 1; the command that asks is one of its connections.
descriptors() { shell 'ls /proc/1/fd | wc -l'; }
has_descriptors() { [ "$(descriptors)" = "$1" ]; }

boot agent.limit.api_wait_ms=20000
check 'guest API: configured' configure "$APPS/guest_api" main:app
check_eq 'guest API: the program finds a socket' 'srw-------' "$(request /mode)"
baseline
BEFORE=$(descriptors)

request /get/21 >"$T/early" 2>&1 &
EARLY=$!
sleep 2
check 'guest API: asked before the host listens: it waits' is_alive "$EARLY"
serve
wait "$EARLY" || true
check_eq 'guest API: and succeeds' "$(all_of 21)" "$(cat "$T/early")"
start=$(ms)
check_eq "guest API: $BYTES bytes while 20 others do the same" "$(all_of 21)" "$(request /get/21)"
echo "   in $(($(ms) - start)) ms"
check_eq '71: 100 at once' "$(all_of 100)" "$(request /get/100)"
check_eq '71: half-close by the program' "$(all_of 1)" "$(request /half)"
guest_ok '71: well afterwards'
check '71: no connection is left' wait_for 5 has_descriptors "$BEFORE"

unspawn "$SERVE_PID"
SERVE_PID=''
request /get/3 >"$T/late" 2>&1 &
LATE=$!
sleep 1
rm "$GUEST/v.sock_53"
serve
wait "$LATE" || true
check_eq '70: a host that is restarted meanwhile' "$(all_of 3)" "$(cat "$T/late")"

# 73: halt with connections open, whose host says nothing.
unspawn "$SERVE_PID"
rm "$GUEST/v.sock_53"
request /get/20 >/dev/null 2>&1 &
sleep 0.5
start=$(ms)
check '73: halt while the guest API is waited for' call halt
check_at_most '73: within 5 s, in ms' 5000 $(($(ms) - start))
check '73: the machine ends' wait_for 3 is_gone "$GUEST_QEMU_PID"

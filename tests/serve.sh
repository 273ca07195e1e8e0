#!/usr/bin/env bash
# `./build.sh run` as a person uses it: start, curl, ctrl-C. Runs alone: it measures time.
. "$(dirname "$0")/lib.sh"

LIMIT_S=15                          # a start when everything has been made before
export GUEST_PORT=18080 GUEST_RECIPE=$TEST_IMAGE
PAGE=http://127.0.0.1:$GUEST_PORT/

# Starts it in a process group of its own, as a terminal does, so that ctrl-C reaches all.
# A shell has its background jobs ignore SIGINT.
serve() {
    setpriv --pdeathsig KILL setsid env --default-signal=INT ./build.sh run "$@" >"$T/served" 2>&1 &
    SERVE_PID=$!
}

answers() { curl -fsS --max-time 10 "$PAGE" >"$T/page" 2>/dev/null; }
answers_or_ended() { answers || is_gone "$SERVE_PID"; }
control_c() { kill -INT -- "-$SERVE_PID"; }

# Waits for its end. Sets STATUS.
await_end() {
    STATUS=0
    wait_for "$1" is_gone "$SERVE_PID" || kill -KILL -- "-$SERVE_PID"
    wait "$SERVE_PID" || STATUS=$?
}

has_said() { grep -qE -e "$1" "$T/served"; }

cd "$GUEST_ROOT"
(guest_image "$TEST_IMAGE") >&2

start=$(ms)
serve examples/hello-python main:app
check 'run: says something within a second' wait_for 2 test -s "$T/served"
wait_for 120 answers_or_ended || true
took=$(($(ms) - start))
check 'run: serves HTTP on 127.0.0.1' answers
check_at_most "run: a second start takes at most $LIMIT_S s, in ms" $((LIMIT_S * 1000)) "$took"
check 'run: names its address' wait_for 10 has_said "serving $PAGE"
check 'run: shows the console' has_said 'agent\[.*ready'
refused 'run: a taken port is refused' 1 "port $GUEST_PORT of 127.0.0.1 is taken" \
    timeout 30 ./build.sh run examples/hello-python main:app
control_c
await_end 20
check_eq 'run: ctrl-C ends it with status 0' 0 "$STATUS"
check 'run: ctrl-C halts the guest' has_said 'halt: reboot'
check 'run: leaves nothing listening' not answers

serve examples/hello-python main:no_such_name
await_end 120
check_eq 'run: a program that does not start ends it with status 1' 1 "$STATUS"
check 'run: and says why' has_said 'no_such_name'
check 'run: and halts the guest' has_said 'halt: reboot'

refused 'run: no folder' 1 'usage: ./build.sh run DIR ENTRYPOINT' ./build.sh run /nowhere main:app

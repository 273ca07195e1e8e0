#!/usr/bin/env bash
# What becomes of requests, of halt, of another configuration in each state: while a
# configuration is applied, while an executable, which says nothing of itself, starts, does not
# listen yet, is late, has ended, is started again.
. "$(dirname "$0")/lib.sh"

mkdir "$T/programs"
printf '#!/bin/sh\nexec sleep 1000\n' >"$T/programs/deaf"
printf '#!/bin/sh\nsleep 3\nexit 3\n' >"$T/programs/ends"

executable() { configure --interface executable "$T/programs" "$1"; }

# Asks by both fronts, and waits until both wait or are answered.
ask() {
    request / >"$T/52" 2>&1 &
    ASKED=($!)
    http / -o "$T/80" -w '%{http_code}' >"$T/status" &
    ASKED+=($!)
    sleep 0.2
}

# answered NAME STATUS REGEX: what ask has asked for.
answered() {
    wait "${ASKED[@]}" || true
    check_eq "$1: port 80, status" "$2" "$(cat "$T/status")"
    check_match "$1: port 80" "$3" "$(cat "$T/80")"
    check_match "$1: port 52" "$3" "$(cat "$T/52")"
}

halts() {
    local start
    start=$(ms)
    check "$1: halt is answered" call halt
    check_at_most "$1: ms that it took" 2500 $(($(ms) - start))
    check "$1: the machine ends" wait_for 5 is_gone "$NS_PID"
}

ns_start
executable deaf >"$T/configured" 2>&1 &
CONFIGURING=$!
wait_for 10 eval '[ -n "$(shell "pidof sleep")" ]'
ask
halts 'starting'
answered 'starting' 503 '^the machine is halting$'
check 'starting: its configuration fails' not wait "$CONFIGURING"
check_match 'starting: for this reason' 'the machine is halting' "$(cat "$T/configured")"

ns_start
check 'not listening: configured' executable deaf
ask
halts 'not listening'
answered 'not listening' 503 '^the machine is halting$'

ns_start --limit loading_ms=300
check 'late: configured' executable deaf
sleep 0.4
ask
answered 'late' 503 '^the program does not listen on port 8080 yet$'
shell 'echo soon >/root/loading.html'
ask
answered 'late, with a page' 503 '^soon$'
shell 'rm /root/loading.html; mkfifo /root/loading.html'
ask
answered 'late, the page is a FIFO' 503 '^the program does not listen on port 8080 yet$'
halts 'late'

ns_start --limit backoff_ms=2000
check 'ended: configured' executable ends
ask
answered 'ended: who waited' 503 'the program ends exited with exit code 3'
ask
answered 'ended: who comes later' 502 'the program ends exited with exit code 3'
check 'ended: it is started again' wait_for 5 eval '[ -n "$(shell "pidof sleep")" ]'
ask
halts 'started again'
answered 'started again' 503 '^the machine is halting$'

# ---- a configuration that takes too long ------------------------------------------------------

need strace
mkdir "$T/input"
touch "$T"/input/{1..40}
is_at_input() { [ -e "/proc/$PID1/root/data/1" ]; }

# Every file that is opened takes 100 ms more.
ns_start --limit start_ms=2000
strace -f -qq -o /dev/null -p "$PID1" -e trace=openat -e inject=openat:delay_enter=100000 2>"$T/strace" &
STRACE=$!
wait_for 5 grep -q 'TracerPid:.[1-9]' "/proc/$PID1/status"
configure "$APPS/hello" main:app --input "$T/input" >"$T/configured" 2>&1 &
CONFIGURING=$!
check 'too long: it is at its input data' wait_for 10 is_at_input
refused 'too long: another one meanwhile' 1 'another configuration is being applied' configure "$APPS/hello" main:app
check 'too long: it fails' not wait "$CONFIGURING"
check_eq 'too long: the step is named' 'input data: setup took longer than 2000 ms' "$(cat "$T/configured")"
kill "$STRACE"
wait "$STRACE" || true
check_eq 'too long: what it had unpacked is gone' '' "$(shell 'ls /data')"
check 'too long: the next one is applied' configure "$APPS/hello" main:app
check_eq 'too long: and serves' hello "$(request /)"

#!/usr/bin/env bash
# The guest API in namespaces: items 70 to 72 of the list of bad inputs and threat T9. A Unix
# socket is the host's end.
. "$(dirname "$0")/lib.sh"

PATH_API=/tmp/socat-socket

# peer CASE…: each, then the standing rule.
peer() {
    local case
    for case; do
        checks_from env SMALL="$SANITIZED" "$PYTHON" -B "$TESTS/bridge_peer.py" \
            "/proc/$PID1/root$PATH_API" "$GUEST/api.sock" "$case"
        guest_ok "after $case"
    done
}

# Starts another process of the program.
restart() {
    refused '72: the program is made to end' 1 'exited with exit code 3' request /crash
    check '72: and is restarted' request /mode
}

GOOD=(request /get/0)
ns_start --api "unix:$T/1/api.sock" --limit api_wait_ms=1500 --limit api_idle_ms=1500 --limit api_conns=220
check_eq 'bridge: no socket before a program' 'status 0' "$(shell "[ ! -e $PATH_API ]; echo status \$?")"
check 'bridge: configured' configure "$APPS/guest_api" main:app
check_eq 'bridge: the program finds a socket, its owner'\''s alone' 'srw-------' "$(request /mode)"
baseline

peer absent leaves refusing silent host_dies
assert_console_has '70: the log says that nobody took it' 'the host has taken no connection for 1500 ms: '
assert_console_has '70: and that nothing came' 'nothing came for 1500 ms, closed'
before=$(pid1_kib VmHWM)
peer half_close closes giant
is_sanitized || check_at_most '71: memory of PID 1 at its peak, KiB more' 1024 $(($(pid1_kib VmHWM) - before))
peer parallel flood hangs_up
is_sanitized || check_at_most 'T9: memory of PID 1 at its peak, KiB more' 32768 $(($(pid1_kib VmHWM) - before))
assert_console_has 'T9: the log says that the limit is reached' '220 connections, the next one waits'

# ---- 72: the program and the socket's path -------------------------------------------------

shell "rm $PATH_API"
guest_ok '72: deleted: well afterwards'
restart
assert_console_has '72: deleted: the log says so' "$PATH_API was removed: it is made again"
peer echoes
shell "rm $PATH_API; echo mine >$PATH_API"
restart
assert_console_has '72: replaced by a file: the log says so' "$PATH_API was changed: it is made again"
peer echoes
shell "rm $PATH_API; ln -s /nowhere $PATH_API"
restart
peer echoes
shell "rm $PATH_API; mkdir -p $PATH_API/full"
restart
assert_console_has '72: replaced by a folder: the log says so' "guest API: $PATH_API: "
guest_ok '72: replaced by a folder: well afterwards'
shell "rm -r $PATH_API"
restart
peer echoes
shell "chmod 777 $PATH_API"
restart
check_eq '72: opened to others: closed again' 'srw-------' "$(request /mode)"
halt

# ---- without a guest API --------------------------------------------------------------------

ns_start
check 'bridge: a sandbox without one: configured' configure "$APPS/hello" main:app
check_eq 'bridge: and no socket' 'status 0' "$(shell "[ ! -e $PATH_API ]; echo status \$?")"

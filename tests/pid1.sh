#!/usr/bin/env bash
# PID 1 in namespaces: items 65 and 67 to 69 of the list of bad inputs. What only a guest
# shows of them is in tests/guest_init.sh.
. "$(dirname "$0")/lib.sh"

need gcc libc6-dev
gcc -O2 -Wall -Wextra -static -o "$T/orphans" "$TESTS/orphans.c"
GOOD=(request /)

# Of the machine's clock, not the guest's.
processor_ms() { awk '{ print ($14 + $15) * 10 }' "/proc/$PID1/stat"; }
zombies() { grep -ls '^State:.Z' $(sed 's| *\([0-9]\+\) *|/proc/\1/status |g' "/proc/$PID1/task/$PID1/children") /dev/null; }
has_no_zombies() { [ -z "$(zombies)" ]; }
is_ended() { wait_for 8 is_gone "$NS_PID"; }

# ---- 65: orphans -------------------------------------------------------------------------

ns_start
check '65: configured' configure "$APPS/tenant" main:stubborn
cp "$T/orphans" "$GUEST/orphans"
baseline
before=$(processor_ms) start=$(ms)
check_eq '65: 100,000 orphans of a double fork' 'status 0' \
    "$(shell "for i in 1 2 3 4; do $GUEST/orphans 25000 2>&1 & done; wait; echo status \$?")"
took=$(($(ms) - start)) used=$(($(processor_ms) - before))
check '65: all are reaped' wait_for 5 has_no_zombies
is_sanitized ||
    check_at_most "65: percent of a processor that PID 1 used, in $took ms" 50 $((used * 100 / took))
guest_ok '65: well afterwards'

# ---- 67: signals -------------------------------------------------------------------------

MEAN='2|10|12|15|30|37|38|39|32|33'     # halt, or are the C library's own
! is_sanitized || MEAN+='|4|6|7|8|11'      # the sanitizer dies of these
check_eq '67: signals that are no request to halt can be sent' '' "$(shell \
    'i=1; while [ $i -le 64 ]; do case $i in '"$MEAN"') ;; *) kill -$i 1 || echo $i ;; esac; i=$((i + 1)); done')"
check '67: they do not halt' not guest_console_has 'halt'
guest_ok '67: well afterwards'

# ---- 68: a program that hears nothing ----------------------------------------------------

start=$(ms)
check '68: a program that blocks every signal: halt is answered' call halt
check_at_most '68: within the 5 s of the host, in ms' 5000 $(($(ms) - start))
check '68: and the machine ends' is_ended
assert_console_has '68: it was killed after the grace' 'did not end within 3000 ms: killed'

ns_start
check '67: configured' configure "$APPS/echo" main:app
shell 'kill -TERM 1' || true
check '67: SIGTERM halts' is_ended
assert_console_has '67: SIGTERM stops the program first' 'lifespan shutdown'

# What the table in agent.c promises; 37 to 39 are systemd's. What becomes of the machine is in
# tests/hosts.sh.
for request in INT:reboot TERM:reboot 39:reboot USR1:'power off' USR2:'power off' PWR:'power off' 37:'power off' \
    38:'power off'; do
    ns_start
    shell "kill -${request%:*} 1" || true
    check "67: signal ${request%:*} halts" is_ended
    assert_console_has "67: signal ${request%:*} means ${request#*:}" "halt: ${request#*:}"
done

# ---- 69: nothing to begin with -----------------------------------------------------------

NS_PREPARE='exec 0<&- 1>&- 2>&-'
ns_start
check '69: without descriptors: configured' configure "$APPS/tenant" main:app
check_eq '69: answers' tenant "$(request /)"
check_eq '69: what it starts has descriptors 0 to 2' 3 \
    "$(shell 'for fd in 0 1 2; do eval "command : <&$fd" 2>/dev/null && echo $fd; done' | wc -l)"
check '69: halts' halt

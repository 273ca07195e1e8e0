#!/usr/bin/env bash
# What a tenant can do to PID 1 of a real guest: threats T2 and T3, items 65 to 69 of the list
# of bad inputs. What needs no guest of these is in tests/pid1.sh.
. "$(dirname "$0")/lib.sh"

GUEST_MEMORY=256M
SMALL='agent.limit.program_memory_percent=30 agent.limit.program_pids_percent=3'   # soon full

# In the guest: python CODE, one line without apostrophes; prints what it prints.
guest_python() { shell "python3 -c '$1' 2>&1"; }

processor_ms() { shell 'cat /proc/1/stat' | awk '{ print ($14 + $15) * 10 }'; }
zombies() { shell 'cat /proc/[0-9]*/stat 2>/dev/null' | awk '$3 == "Z"' | wc -l; }
has_no_zombies() { [ "$(zombies)" = 0 ]; }
answers() { [ "$("${GOOD[@]}" 2>/dev/null)" = tenant ]; }

GOOD=(request /)
need gcc libc6-dev
cp -r "$APPS/tenant" "$T/program"
gcc -O2 -Wall -Wextra -static -o "$T/program/orphans" "$TESTS/orphans.c"
boot $SMALL

# ---- T3: what a program inherits ---------------------------------------------------------

# Python runs this module before anything else; a variable that begins with PYTHON makes the
# agent start an interpreter of its own for the configuration.
guest_python 'import os; os.makedirs("/opt/aleph/libs"); open("/opt/aleph/libs/sitecustomize.py", "w").write("import os, sys\nfds = os.listdir(\"/proc/self/fd\")\nif sys.argv[0] != \"-c\": open(\"/tmp/fds\", \"w\").write(\" \".join(fds))\n")'
check 'T3: configured' configure "$T/program" main:stubborn --env PYTHONDONTWRITEBYTECODE=1
check_eq 'T3: a program begins with descriptors 0 to 4 (5 is the list)' '0 1 2 3 4 5' "$(shell 'cat /tmp/fds')"
check_eq 'T3: a command with 0 to 2 (3 is the list)' '0 1 2 3' "$(shell 'ls /proc/self/fd' | xargs)"
check_eq 'T3: PID 1 is not chosen when memory ends' -1000 "$(shell 'cat /proc/1/oom_score_adj')"
check_eq 'T3: a command can be' 0 "$(shell 'cat /proc/self/oom_score_adj')"
check_eq 'T3: a program can be' 0 "$(request /adj)"
check_eq 'PID 1 and what it starts are SCHED_BATCH' '3 3' "$(shell 'sed "s/.*) //" /proc/1/stat /proc/self/stat | cut -d " " -f 39' | xargs)"
check_eq 'T3: no inherited descriptor leads out of PID 1' '' \
    "$(shell 'for fd in /proc/1/fd/*; do f=/proc/1/fdinfo/${fd##*/}; [ ${fd##*/} -le 2 ] || grep -q "flags:.*02[0-9]\{6\}$" $f || readlink $fd; done')"
check_match 'T3: the ports are taken' 'Address already in use' \
    "$(guest_python 'import socket as s; s.socket(s.AF_VSOCK).bind((s.VMADDR_CID_ANY, 52))')"
check_match 'T3: ctrl-alt-del does not reboot by itself' '^0$' "$(shell 'cat /proc/sys/kernel/ctrl-alt-del')"
baseline

# ---- T2: other peers ---------------------------------------------------------------------

guest_python 'import ctypes, glob, os; f = os.open(glob.glob("/lib/modules/*/kernel/net/vmw_vsock/vsock_loopback.ko")[0], 0); print(ctypes.CDLL(None).syscall(313, f, b"", 0))' >"$T/insmod"
check_eq 'T2: vsock loopback is loaded' 0 "$(cat "$T/insmod")"
KNOCK='import socket as s
def knock(cid, port):
    c = s.socket(s.AF_VSOCK); c.settimeout(5)
    try:
        c.connect((cid, port)); c.sendall(b"halt"); return c.recv(99)
    except ConnectionError: return b""'
shell "echo $(base64 -w 0 <<<"$KNOCK") | base64 -d >/tmp/knock.py"
for cid in 1 3; do
    for port in 52 80; do
        check_eq "T2: CID $cid is closed at once, port $port" "b''" \
            "$(shell "cd /tmp && python3 -c 'import knock; print(knock.knock($cid, $port))' 2>&1 | tail -n 1")"
    done
done
guest_ok 'T2: well afterwards'

# ---- 65: orphans -------------------------------------------------------------------------

before=$(processor_ms) start=$(ms)
check '65: 3,000 orphans of a double fork' shell '/opt/orphans 3000 2>&1; echo status $?'
took=$(($(ms) - start)) used=$(($(processor_ms) - before))
check_eq '65: could be made' 'status 0' "$(cat "$T/check.out")"
check '65: all are reaped' wait_for 5 has_no_zombies
check_at_most "65: percent of a processor that PID 1 used, in $took ms" 50 $((used * 100 / took))
guest_ok '65: well afterwards'

# ---- 67: signals -------------------------------------------------------------------------

check '67: signals that are no request to halt' shell \
    'i=1; while [ $i -le 64 ]; do case $i in 2|10|12|15|30|37|38|39|32|33) ;; *) kill -$i 1 || echo $i ;; esac; i=$((i + 1)); done'
check_eq '67: all could be sent' '' "$(cat "$T/check.out")"
check '67: they do not halt' not guest_console_has 'halt'
guest_ok '67: well afterwards'

# ---- 66 and the end of memory ------------------------------------------------------------

refused 'OOM: the error names it' 1 'was killed.*: out of memory' request /eat
check 'OOM: the program is restarted' wait_for 20 answers
guest_ok 'OOM: well afterwards'

request /bomb >"$T/bomb" 2>&1 &
BOMB=$!
is_full() { [ "$(shell 'cat /sys/fs/cgroup/program/pids.events' | awk '{ print $2 }')" -gt 0 ]; }
check '66: a fork bomb meets its limit' wait_for 60 is_full
start=$(ms)
refused '66: the agent still answers' 1 'configured already' configure "$APPS/hello" main:app
check_at_most '66: at once, in ms' 3000 $(($(ms) - start))
check_eq '66: a command is still run' here "$(shell 'echo here')"
shell 'echo 1 >/sys/fs/cgroup/program/cgroup.kill'
check '66: the program is restarted when it has been killed' wait_for 30 answers
check '66: nothing of it is left' wait_for 10 has_no_zombies
wait "$BOMB" || true
check_match '66: whoever set it off is told' 'killed by signal 9' "$(cat "$T/bomb")"
guest_ok '66: well afterwards'

# ---- 68: a program that hears nothing ----------------------------------------------------

start=$(ms)
check '68: a program that blocks every signal: halt is answered' call halt
check_at_most '68: within the 5 s of the host, in ms' 5000 $(($(ms) - start))
check '68: and the machine ends' wait_for 3 is_gone "$GUEST_QEMU_PID"
assert_console_has '68: it was killed after the grace' 'did not end within 3000 ms: killed'

# ---- 69: nothing to begin with -----------------------------------------------------------

# An initramfs whose init comes after the usual one and takes its place: all drivers are there,
# as if built in, and no module; nothing is mounted.
overriding_initramfs "$T/initrd" "$MODULES_DISK $MODULES_REST" <<'INIT'
$bb mkdir /bare
$bb mount -t tmpfs tmpfs /bare
$bb mkdir /bare/upper /bare/work /bare/root
$bb mount -t overlay -o lowerdir=/root,upperdir=/bare/upper,workdir=/bare/work overlay /bare/root
$bb rm -r /bare/root/dev /bare/root/proc /bare/root/usr/lib/modules
$bb mount -o remount,ro /bare/root
$bb umount /dev
$bb umount /proc
exec $bb switch_root /bare/root /sbin/init <&- >&- 2>&-
INIT
boot -- -initrd "$T/initrd"
check '69: configured' configure "$APPS/tenant" main:app
check_eq '69: answers' tenant "$(request /)"
check_eq '69: has mounted /proc and /dev' 2 "$(shell 'cat /proc/mounts' | grep -cE ' (/proc proc|/dev devtmpfs) ')"
check_eq '69: is protected' -1000 "$(shell 'cat /proc/1/oom_score_adj')"
check_eq '69: without modules' '' "$(shell 'ls /lib/modules 2>/dev/null')"
assert_console_has '69: has found the console' 'ready .* ms after init'
shell 'kill -PWR 1' || true
check '67: SIGPWR halts' wait_for 6 is_gone "$GUEST_QEMU_PID"
assert_console_has '67: and says so' 'halt: '

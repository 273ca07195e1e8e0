#!/usr/bin/env bash
# A guest from the kernel's first call of /sbin/init to the reboot: what a program finds there,
# what both fronts carry, how it ends. (When it is ready: ready.sh.)
. "$(dirname "$0")/lib.sh"

MIB=1048576
HASH=$(printf '0123456789abcdef%.0s' 1 2 3 4)

# The timeline's rows as `MILLISECONDS-SINCE-INIT MILLISECONDS NAME`.
timeline() { sed -nE 's/.* boot: +[0-9.]+ +([0-9.]+) +([0-9.]+)  (.*)/\1 \2 \3/p' "$CONSOLE" | tr -d '\r'; }
has_timeline() { timeline | grep -q 'ready said'; }

timeline_has_modules() { timeline | awk '$3 == "modules"' | grep -q .; }

carry() { "$PYTHON" -B "$TESTS/carry.py" "$SOCK" "$@"; }

# carries NAME ARGUMENT…: on both ports.
carries() {
    local port
    for port in 52 80; do
        check "boot: $1, port $port" carry "$port" "${@:2}"
        sed 's/^/   /' "$T/check.out"
    done
}

# mounted TYPE PATH OPTION…
mounted() {
    local type=$1 path=$2 option line
    shift 2
    line=$(shell 'cat /proc/mounts' | grep -E "^[^ ]+ $path $type ")
    for option; do
        grep -qE "[ ,]$option(,|=| )" <<<"$line" || { echo "no $option: $line"; return 1; }
    done
}

# peer CODE: as the host, without the agent's own code. `peer` is the guest.
peer() {
    "$PYTHON" -B -c '
import sys
sys.path.insert(0, sys.argv[1])
from peer import Peer, zipped
peer = Peer(sys.argv[2])
exec(sys.argv[3])' "$TESTS" "$SOCK" "$1"
}

is_halted_by_peer() {
    peer 'assert peer.raw(b"halt") == b"STOP\nSTOPZ\n"'
    wait_for 5 is_gone "$GUEST_QEMU_PID"
}

halts() {
    local start took
    start=$(ms)
    check "boot: halt $1 answers STOP, STOPZ" is_halted_by_peer
    took=$(($(ms) - start))
    check_at_most "boot: halt $1 ends the machine within 5 s, in ms" 5000 "$took"
}

# ---- the places ------------------------------------------------------------------------

boot agent.log=debug agent.limit.linger_ms=100     # the device tells no client of a half-close
check_eq 'boot: the ready message is heard' 1 "$(grep -c '2\.0\.0' "$GUEST/ready")"
check 'boot: root is an overlay' mounted overlay / rw
check 'boot: the old root is at /rom, read-only' mounted ext4 /rom ro
check 'boot: /proc' mounted proc /proc nosuid nodev noexec
check 'boot: /sys' mounted sysfs /sys nosuid nodev noexec
check 'boot: /dev' mounted devtmpfs /dev
check 'boot: /dev/pts' mounted devpts /dev/pts gid=5 ptmxmode=666
check 'boot: /dev/shm' mounted tmpfs /dev/shm nosuid nodev
check 'boot: /run' mounted tmpfs /run nosuid nodev
check 'boot: cgroup2' mounted cgroup2 /sys/fs/cgroup
check_eq 'boot: programs have a cgroup with limits' 'cpu memory pids' \
    "$(shell 'cat /sys/fs/cgroup/program/cgroup.controllers' | tr ' ' '\n' | grep -xE 'cpu|memory|pids' | sort | xargs)"
check_eq 'boot: to processes, three quarters of what the kernel has' same \
    "$(shell 'cd /sys/fs/cgroup/program; [ $(cat pids.max) = $(($(cat /proc/sys/kernel/threads-max) * 75 / 100)) ] && echo same')"
check_eq 'boot: and to memory, most of it' yes \
    "$(shell 'set -- $(grep MemTotal /proc/meminfo) $(cat /sys/fs/cgroup/program/memory.max); [ $(($4 / 1024)) -lt $(($2 * 98 / 100)) -a $(($4 / 1024)) -gt $(($2 * 8 / 10)) ] && echo yes')"
check_eq 'boot: /rom cannot be written' 2 "$(shell 'touch /rom/x; echo $?' | tail -n 1 | sed s/1/2/)"
check_eq 'boot: / can be written' yes "$(shell 'echo yes >/etc/x && cat /etc/x')"
LOOPBACK='import socket as s; l = s.create_server(("127.0.0.1", 0)); s.create_connection(l.getsockname()); print("up")'
check_eq 'boot: loopback is up' up "$(shell "python3 -c '$LOOPBACK'")"

check 'boot: a configuration is taken' configure "$APPS/echo" main:app --hash "$HASH"
NAME=$("$PYTHON" -c 'import base64, sys
print(base64.b32encode(bytes.fromhex(sys.argv[1])).decode().strip("=").lower())' "$HASH")
check_eq 'boot: the hash names the host' "$NAME" "$(shell 'cat /proc/sys/kernel/hostname')"
check_match 'boot: and the program knows' "\"ALEPH_ADDRESS_TO_USE\": \"$NAME\"" "$(request /env)"
refused 'boot: a second configuration' 1 'configured' configure "$APPS/echo" main:app

# ---- what it carries -------------------------------------------------------------------

check 'boot: 1,000 requests on one connection' carry 80 in_turn 1000
sed 's/^/   /' "$T/check.out"
check_at_most 'boot: VmHWM of PID 1 after 1,000 requests, in KiB' 2047 "$(pid1_kib VmHWM)"
carries 'a request body of 3 MiB' upload $((3 * MIB))
carries 'a response of 3 MiB' single $((3 * MIB))
carries 'a response of 3 MiB in 50 parts' parts 50 $((3 * MIB / 50 + 1))
carries '64 requests at once' at_once 64
carries 'a request of 2 s delays no other' beside 20
checks_from env PYTHONDONTWRITEBYTECODE=1 timeout 120 "$PYTHON" "$TESTS/http_raw.py" "hybrid:$SOCK:80" "$CONSOLE" 0 table
baseline
for port in 52 80; do
    before=$(pid1_kib VmRSS)
    check "boot: a request body of 16 MiB, port $port" carry "$port" upload $((16 * MIB - 1024))
    sleep 0.2
    check_at_most "boot: VmRSS after it, in KiB, was $before" $((before + 256)) "$(pid1_kib VmRSS)"
done
guest_ok 'boot: well afterwards'
refused 'boot: os._exit(3) in a request: the error names it' 1 'exited with exit code 3' request /exit/3
check_match 'boot: the next request is answered by a new process' '"lifespans": 1' "$(request /state)"
check_match 'boot: os._exit(3) in a request on port 80' '^HTTP/1.1 502 .*' "$(http /exit/3 -i)"
check_match 'boot: and the next there' '"lifespans": 1' "$(http /state)"
guest_ok 'boot: well after both'
halts 'with a program'
assert_console_has 'boot: lifespan shutdown at halt' 'lifespan shutdown'

# ---- other boots -----------------------------------------------------------------------

boot agent.log=debug guest.modules=root
check 'boot: without vsock and overlay the agent loads them' wait_for 10 timeline_has_modules
check 'boot: root is an overlay then, too' mounted overlay / rw
halts 'before a configuration'

boot agent.log=debug agent.limit.overlay_percent=5 agent.limit.no_such=1 agent.nonsense
assert_console_has 'boot: an unknown limit is named' 'agent.limit.no_such=1: '
assert_console_has 'boot: an unknown option is named' 'agent.nonsense: no such option'
check 'boot: the independent peer configures' peer '
code = zipped({"main.py": open("'"$APPS/echo/main.py"'").read()})
assert peer.configure(code, "main:app", variables={"GREETING": "grüezi"}) == {"success": True}'
check 'boot: its request is answered' peer '
reply = peer.request("/env")
assert set(reply) == {"headers", "body", "output", "output_data"}, reply
assert reply["headers"]["status"] == 200 and "gr\\u00fcezi" in reply["body"]["body"].decode(), reply'
check 'boot: its event is answered' peer 'reply = peer.event("hello"); assert reply["body"]["event"] == "hello", reply'
check_match 'boot: an event by agent call' '"event": ?"\{' "$(event '{"a": 1}')"
baseline
for clock in 1970-01-01 2038-01-19 tomorrow yesterday; do
    clock=$(LC_ALL=C date -u -d "$clock" '+%a, %d %b %Y')
    shell "date -s '$clock 23:00'" >"$T/clock"
    check_match "78: clock set to $clock: answered, and dated so" "^date: $clock 23:0" "$(http /env -f -D - -o /dev/null)"
    check "78: clock set to $clock: the wire" request /env
done
guest_ok '78: well afterwards'
check_match 'boot: a full overlay is an error of whoever fills it' 'No space left' \
    "$(shell 'head -c 200000000 /dev/zero >/full; ls -l /full')"
check_at_most 'boot: the overlay is capped, in MiB' 50 "$(shell 'du -m /full' | cut -f 1)"
guest_ok 'boot: well with a full overlay'

# A host that begins to listen late. "modules loaded" is the last that the initramfs says.
start_guest
console_has 'modules loaded' 60
sleep 15
hear_ready "$SOCK"
await_ready 10
check 'boot: a host that listens 15 s late hears ready' grep -q '2\.0\.0' "$GUEST/ready"
check 'boot: and can configure' configure "$APPS/hello" main:app
check_eq 'boot: and is answered' hello "$(request /)"
check 'boot: no timeline without agent.log=debug' not has_timeline

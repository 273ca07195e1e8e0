#!/usr/bin/env bash
# Halt of real guests that have volumes: items 73 and 74 of the list of bad inputs, and twenty
# halts in a row under load. Runs alone: it measures the 5 s that the host gives, two guests at
# a time. Full matrix: four minutes.
TEST_SECONDS=${TEST_SECONDS:-900}
. "$(dirname "$0")/lib.sh"

need e2fsprogs python3-msgpack
HALTS=${HALTS:-20}                  # under load, each way of LOAD in turn
LOAD=('load' 'load, mid-upload' 'load, twice' 'load, the host hangs up' 'load, a busy mount'
    'load, the bridge open' 'load, a !command')

new_disk() {
    rm -f "$T/disk"
    truncate -s 32M "$T/disk"
    mke2fs -q -t ext4 "$T/disk"
}

is_clean() {
    ! dumpe2fs -h "$T/disk" 2>/dev/null | grep needs_recovery && e2fsck -fn "$T/disk"
}

on_disk() { debugfs -R "cat $1" "$T/disk" 2>/dev/null; }

boot_with_disk() {
    new_disk
    boot "$@" -- -drive "file=$T/disk,format=raw,if=virtio"
}

ends_clean() {
    check "$1: the machine ends" wait_for 8 is_gone "$GUEST_QEMU_PID"
    check "$1: the volume is clean" is_clean
}

peer() { checks_from "$PYTHON" -B "$TESTS/halt_peer.py" "$SOCK" "$1"; }

# Holds the volume from outside of the program's cgroup: an open file, a mount on top, one of
# the same disk elsewhere, a mount namespace of its own.
occupy() {
    shell 'mkdir -p /data/top /mnt/again; mount -t tmpfs top /data/top; mount --bind /data /mnt/again'
    shell 'setsid sh -c "cd /mnt/again; exec sleep 1000" </dev/null >/data/held 2>&1 & sleep 0.2'
    shell 'setsid unshare -m sh -c "cd /data/top; exec sleep 1000" </dev/null >>/data/held 2>&1 & sleep 0.5'
    shell 'grep -c " /mnt/again \| /data" /proc/mounts; grep -ls sleep /proc/[0-9]*/comm | wc -l' | xargs
}

# ---- 73 and 74, under load ---------------------------------------------------------------

under_load() {
    local clause=$1
    boot_with_disk
    check "$clause: configured" configure "$APPS/load" main:app --volume vdb:/data:rw
    [[ $clause != *busy* ]] || check_eq "$clause: mounts, processes" "3 2" "$(occupy)"
    peer "$clause"
    ends_clean "$clause"
    check_eq "$clause: what was written is on disk" "${clause// /-}" "$(on_disk token)"
    check_eq "$clause: the children wrote" 100 "$(debugfs -R 'ls -p' "$T/disk" 2>/dev/null | grep -c child-)"
}

# ---- 73, the others ----------------------------------------------------------------------

idle() {
    boot_with_disk
    check '73 idle: configured' configure "$APPS/files" main:app --volume vdb:/data:rw
    check_eq '73 idle: written' '4 bytes' "$(request -d kept /data/token)"
    peer '73 idle'
    ends_clean '73 idle'
    check_eq '73 idle: what was written is on disk' kept "$(on_disk token)"
}

stuck() {
    boot_with_disk
    check '73 stuck app: configured' configure "$APPS/load" main:app --volume vdb:/data:rw
    peer '73 stuck app'
    ends_clean '73 stuck app'
}

# A swap file keeps its file system open although nothing runs any more: after halt_ms it is
# made read-only by force.
held() {
    boot_with_disk
    check '73 held by the kernel: configured' configure "$APPS/files" main:app --volume vdb:/data:rw
    check_eq '73 held by the kernel: swaps' /data/swap \
        "$(shell 'head -c 4000000 /dev/zero >/data/swap; chmod 600 /data/swap; mkswap -q /data/swap; python3 -c "import ctypes; ctypes.CDLL(None).swapon(b\"/data/swap\", 0)"; tail -n 1 /proc/swaps' | cut -d ' ' -f 1)"
    peer '73 held by the kernel'
    assert_console_has '73 held by the kernel: is said' '/dev/vdb is still held'
    ends_clean '73 held by the kernel'
}

# Less time than the program takes: its files are open still.
out_of_time() {
    boot_with_disk agent.limit.halt_ms=1500
    check '73 out of time: configured' configure "$APPS/load" main:app --volume vdb:/data:rw
    peer 'load, 73 out of time'
    assert_console_has '73 out of time: is said' 'not done within 1500 ms'
    ends_clean '73 out of time'
}

# The volume is mounted, the program loads; or the next volume's device is waited for.
mid_config() {
    local name=$1 pid
    shift
    boot_with_disk agent.limit.device_ms=30000
    mkdir -p "$T/slow"
    echo 'import time; open("/data/token", "w").write("kept"); time.sleep(60)' >"$T/slow/main.py"
    configure "$T/slow" main:app --volume vdb:/data:rw "$@" >"$T/configured" 2>&1 &
    pid=$!
    check "$name: the volume is mounted" wait_for 20 is_mounted
    sleep 1
    peer "$name"
    check "$name: who configured is told" not wait "$pid"
    check_match "$name: why" 'halting' "$(cat "$T/configured")"
    ends_clean "$name"
}

is_mounted() { shell 'cat /proc/mounts' | grep -q ' /data ext4 '; }

lane() {
    local i
    for ((i = $1; i < HALTS; i += 2)); do
        under_load "${LOAD[i % ${#LOAD[@]}]} $i"
    done
    if [ "$1" = 0 ]; then
        idle
        out_of_time
        mid_config '73 mid-config, the program loads'
    else
        stuck
        held
        mid_config '73 mid-config, volumes' --volume vdz:/srv
    fi
}

if [ $# -gt 0 ]; then
    lane "$1"
    exit
fi
guest_image "$TEST_IMAGE" >&2
LANES=()
for i in 0 1; do
    bash "$0" $i >"$T/lane-$i" 2>"$T/lane-$i.err" &
    LANES+=($!)
done
wait "${LANES[@]}" || true
checks_from cat "$T/lane-0" "$T/lane-1"

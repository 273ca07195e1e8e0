#!/usr/bin/env bash
# Other hosts than the usual guest: a distribution's own kernel and initramfs, the agent as
# /init of an initramfs, a kernel that mounts the root itself, a machine without PCI.
# And how each kind of request to halt ends the machine. Full matrix: it makes an image of a
# whole distribution.
TEST_SECONDS=${TEST_SECONDS:-600}   # its image takes some minutes to make
. "$(dirname "$0")/lib.sh"

GUEST_MEMORY=512M
GOOD=(request /)

# ends_by REASON NAME COMMAND…: the command ends the machine, and QEMU says that reason for it:
# guest-shutdown is power off, guest-reset reboot.
ends_by() {
    local reason=$1 name=$2 events
    shift 2
    spawn "$GUEST/events" "$PYTHON" -c '
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
lines = s.makefile("rw")
for command in ["qmp_capabilities"] + sys.argv[2:]:
    lines.write(json.dumps({"execute": "human-monitor-command", "arguments": {"command-line": command}}
                           if " " in command else {"execute": command}))
    lines.flush()
for line in lines:
    event = json.loads(line)
    if event.get("event") == "SHUTDOWN":
        print(event["data"]["reason"], flush=True)' "$T/qmp" ${QMP:+"$QMP"}
    events=$SPAWNED
    [ $# = 0 ] || "$@" >/dev/null 2>&1 || true
    wait_for 10 is_gone "$GUEST_QEMU_PID" || fail "$name: ends" "$(tail -n 5 "$CONSOLE")"
    wait_for 3 is_gone "$events" || true
    rm -f "$T/qmp"
    check_eq "$name: $reason" "$reason" "$(cat "$GUEST/events")"
}

# start [QEMU ARGUMENT…]: with the arguments KERNEL for the kernel and a monitor.
KERNEL=()
start() { boot "${KERNEL[@]}" -- -qmp "unix:$T/qmp,server=on,wait=off" "$@"; }

mounted() { shell 'cat /proc/mounts' | grep -qE "$1"; }
serves() {
    check "$1: configured" configure "$APPS/hello" main:app
    check_eq "$1: answers" hello "$(request /)"
}

# ---- Debian's own kernel and initramfs ----------------------------------------------------

# distribution_file NAME TO: of the /boot of that image.
distribution_file() {
    local name
    name=$(debugfs -R 'ls -p /boot' "$GUEST_IMAGE" 2>/dev/null | cut -d / -f 6 | grep "^$1-")
    debugfs -R "dump /boot/$name $2" "$GUEST_IMAGE" 2>/dev/null
    [ -s "$2" ]
}

TEST_IMAGE=debian-12-distribution
guest_image "$TEST_IMAGE" >&2
distribution_file vmlinuz "$T/vmlinuz"
distribution_file initrd.img "$T/initrd.img"
KERNEL=(root=/dev/vda )
start -kernel "$T/vmlinuz" -initrd "$T/initrd.img"
check 'distribution: root is an overlay' mounted '^overlay / overlay rw'
check_match 'distribution: the agent has loaded vsock' '^vmw_vsock_virtio_transport ' "$(shell 'cat /proc/modules')"
serves distribution
baseline
guest_ok 'distribution: the standing rule'
QMP=system_powerdown ends_by guest-shutdown 'distribution: the power button'
assert_console_has 'distribution: the power button is the reason' 'halt: power button'
TEST_IMAGE=debian-12-test

# ---- as /init -----------------------------------------------------------------------------

guest_image "$TEST_IMAGE" >&2
initramfs "$T/disk.cpio" $MODULES_DISK
initramfs "$T/full.cpio" $MODULES_DISK $MODULES_REST $MODULES_EXTRA
KERNEL=()
start -initrd "$T/disk.cpio"
check 'init: the root is /dev/vda without being told' mounted '^/dev/vda /rom ext4 ro'
check 'init: below an overlay' mounted '^overlay / overlay rw'
check_match "init: vsock and overlay come from the root's modules, which stay" modules.dep "$(shell 'ls /lib/modules/$(uname -r)')"
check 'init: no mount hides them' not mounted ' /lib/modules '
serves init
ends_by guest-reset 'init: halt' halt

# ---- no initramfs ---------------------------------------------------------------------------

# Of the disks that Debian's kernel knows by itself QEMU has NVMe. Such a kernel mounts the root
# and nothing else, /dev included.
true | cpio -o -H newc --quiet >"$T/nothing.cpio"
KERNEL=(root=/dev/nvme0n1 rootwait agent.log=debug)
start -initrd "$T/nothing.cpio" -device nvme,serial=1,drive=nvme \
    -drive "file=$GUEST_IMAGE,format=raw,if=none,id=nvme,readonly=on"
check 'kernel alone: its root is below an overlay' mounted '^/dev/(root|nvme0n1) /rom ext4 ro'
check 'kernel alone: /dev' mounted '^devtmpfs /dev devtmpfs'
assert_console_has 'kernel alone: the agent has loaded what was wanted' 'boot: .* modules'
serves 'kernel alone'
ends_by guest-reset 'kernel alone: halt' halt

# ---- a root that is written ----------------------------------------------------------------

# In the background, with a file open, so that only its end makes the file system clean.
HOLD='(exec 9>/held; while echo held >&9; do :; done) >/dev/null 2>&1 & sleep 0.5; echo started'
cp --sparse=always "$GUEST_IMAGE" "$T/disk"
KERNEL=(root=/dev/vdb rw rootfstype=ext4 rootflags=nodelalloc)
start -initrd "$T/full.cpio" -drive "file=$T/disk,format=raw,if=none,id=disk" -device virtio-blk-pci,drive=disk
check 'init: root=, rootfstype=, rootflags= and rw are heard' mounted '^/dev/vdb / ext4 rw,.*nodelalloc'
check_eq 'init: the root is written' yes "$(shell 'echo yes >/written; cat /written')"
serves 'writable root'
check_eq 'init: and being written' started "$(shell "$HOLD")"
ends_by guest-reset 'writable root: halt' halt
check 'halt: the root is clean' e2fsck -fn "$T/disk"
check_match 'halt: and says so' 'state: +clean$' "$(dumpe2fs -h "$T/disk" 2>/dev/null)"
check_eq 'halt: what was written is there' yes "$(debugfs -R 'cat /written' "$T/disk" 2>/dev/null)"

# ---- a root that has nothing, on squashfs --------------------------------------------------

bare_root() {
    mkdir -p "$T/bare"/{bin,dev,proc,sys,run,tmp,etc}
    cp "$(command -v busybox)" "$T/bare/bin/busybox"
    ln -s busybox "$T/bare/bin/sh"
    mksquashfs "$T/bare" "$T/squashfs" -quiet -no-progress -all-root >/dev/null
}
need squashfs-tools
bare_root
SQUASHFS=(-drive "file=$T/squashfs,format=raw,if=none,id=disk,readonly=on" -device virtio-blk-pci,drive=disk)
KERNEL=(root=/dev/vdb)
start -initrd "$T/full.cpio" "${SQUASHFS[@]}"
check 'init: the type is found, its module loaded' mounted '^/dev/vdb /rom squashfs ro'
check_match 'init: modules that the root lacks come from the initramfs' '/btrfs.ko:' \
    "$(shell 'busybox cat /lib/modules/*/modules.dep')"
sleep 1
QMP='sendkey ctrl-alt-delete' ends_by guest-reset 'ctrl-alt-del'
start -initrd "$T/full.cpio" "${SQUASHFS[@]}"
sleep 2                             # the power button is looked for after a second
ends_by guest-shutdown 'poweroff of busybox' shell 'busybox poweroff'

# ---- a machine without PCI ------------------------------------------------------------------

# Emulated, this machine has no clock by which the kernel could find the processor's pace.
GUEST_MACHINE=microvm,rtc=on GUEST_BUS=device
KERNEL=(pci=off tsc_early_khz=1000000)
start -initrd "$T/full.cpio"
check_match 'microvm: no PCI' '^0$' "$(shell 'ls /sys/bus/pci/devices 2>/dev/null | wc -l')"
check_match 'microvm: its disk is virtio by MMIO' '/platform/.*/virtio0/' "$(shell 'readlink -f /sys/block/vda')"
check 'microvm: root is an overlay' mounted '^overlay / overlay rw'
serves microvm
QMP=system_powerdown ends_by guest-shutdown 'microvm: the power button'
GUEST_MACHINE=q35 GUEST_BUS=pci

# ---- no root -------------------------------------------------------------------------------

# waits NAME ROOT REGEX: it says why, and stands.
waits() {
    KERNEL=("root=$2")
    start_guest "${KERNEL[@]}" -- -initrd "$T/full.cpio" "${@:4}"
    check "$1: the console tells" console_has "root=$2: $3.*; waiting for it" 60
    sleep 3
    check "$1: and it waits" is_alive "$GUEST_QEMU_PID"
    check "$1: without repeating itself" test "$(grep -c 'waiting for it' "$CONSOLE")" = 1
}
head -c 1M /dev/urandom >"$T/noise"
waits 'no disk' /dev/vdz 'No such file'
waits 'a disk of noise' /dev/vdb 'none of the file systems' \
    -drive "file=$T/noise,format=raw,if=none,id=disk" -device virtio-blk-pci,drive=disk

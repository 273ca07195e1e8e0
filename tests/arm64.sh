#!/usr/bin/env bash
# The agent for arm64, under emulation. As a process of this machine it runs the programs of
# this machine; in a machine of its own it is /init and PID 1, with Debian's kernel for arm64
# and nothing else. Full matrix: it needs a compiler and an emulator of their own.
. "$(dirname "$0")/lib.sh"

need qemu-user-static qemu-system-arm gcc-aarch64-linux-gnu libc6-dev-arm64-cross
"$GUEST_ROOT/build.sh" --arch aarch64 >&2
ARM64=$T/agent-aarch64
cp "$GUEST_ROOT/out/agent-aarch64" "$ARM64"
check_release 'shortcoming 14: out/agent-aarch64' "$ARM64" AArch64 704

# serves NAME REGEX REQUEST…: request and http take the same arguments.
serves() {
    check_match "$1: answers on port 52" "$2" "$(request "${@:3}")"
    check_match "$1: answers HTTP" "$2" "$(http "${@:3}")"
}

# ---- as a process: qemu-user ---------------------------------------------------------------

check_match 'shortcoming 14: out/agent-aarch64 --help' '^agent [0-9.]+ - ' "$(qemu-aarch64-static "$ARM64" --help)"

# A script in the agent's place: only the agent is emulated, what it starts is not.
NS_PREPARE="cp $ARM64 agent-aarch64"'
    printf "%s\n" "#!/bin/sh" "exec /usr/bin/qemu-aarch64-static /agent-aarch64 \"\$@\"" >"$folder/agent"'
ns_start
check 'shortcoming 14: init for arm64, emulated, says ready' grep -q qemu-aarch64-static "/proc/$PID1/cmdline"
check 'arm64 process: Python is configured' configure "$APPS/echo" main:app
head -c 2250000 /dev/urandom | base64 -w 0 >"$T/body"
SHA=$(sha256sum <"$T/body")
serves 'arm64 process: with a body of 3 MB' "\"body_sha256\": \"${SHA%% *}\"" /body?a=b -X POST -d "@$T/body"
serves 'arm64 process: in 100 parts' '^.{6400}$' /stream/100/64
check 'arm64 process: halts' halt
NS_PREPARE=''

# ---- as a machine: qemu-system ---------------------------------------------------------------

# Debian's kernel for arm64, by the function that fetches the one for this machine.
fetch_arm64_kernel() {
    eval "$(declare -f guest_fetch_kernel | sed 's/amd64/arm64/g')"
    DEBIAN_MIRROR=$(guest_mirror)
    export DEBIAN_MIRROR
    echo 'APT { Architecture "arm64"; Architectures { "arm64"; }; };' >"$1.apt"
    APT_CONFIG=$1.apt guest_fetch_kernel "$1"
    rm "$1.apt"
}

# What `boot` needs: the kernel, the agent as /init with its modules, a root of empty folders.
guest_image() {
    export -f fetch_arm64_kernel
    GUEST_KERNEL=$GUEST_CACHE/kernel-arm64-$(declare -f guest_fetch_kernel fetch_arm64_kernel \
        guest_unpack_kernel guest_pick_modules | guest_hash - <(echo "$MODULES_DISK,$MODULES_REST,$MODULES_EXTRA"))
    guest_once "$GUEST_KERNEL" fetch_arm64_kernel
    GUEST_INITRAMFS=$T/initramfs GUEST_IMAGE=$T/root.ext4
    AGENT=$ARM64 initramfs "$GUEST_INITRAMFS" $MODULES_DISK $MODULES_REST
    mkdir -p "$T/root"/{dev,proc,sys,run,tmp,etc}
    mke2fs -q -t ext4 -d "$T/root" "$GUEST_IMAGE" 4M >/dev/null
}

guest_accel() { GUEST_ACCEL=tcg; }

guest_need
GUEST_EMULATOR=qemu-system-aarch64 GUEST_MACHINE=virt GUEST_EMULATED=max GUEST_MEMORY=256M
GUEST_ARGS=${GUEST_ARGS/ttyS0/ttyAMA0}
mke2fs -q -t ext4 "$T/volume" 8M >/dev/null
mkdir "$T/program"
aarch64-linux-gnu-gcc -O2 -static -o "$T/program/server" "$GUEST_ROOT/runtimes/conformance/server.c"
boot -- $GUEST_NIC -drive "file=$T/volume,format=raw,if=none,id=volume" -device virtio-blk-pci,drive=volume
check_match 'shortcoming 14: an arm64 guest says ready' '2\.0\.0' "$(cat "$GUEST/ready")"
check 'arm64 guest: a program, a volume and an address are configured' configure "$T/program" server \
    --interface executable --volume vdb:/mnt/data:rw --ip 10.0.2.15/24 --route 10.0.2.2
serves 'arm64 guest' 'static C: GET /' /
check 'arm64 guest: halts' halt
assert_console_has 'arm64 guest: by a reset' 'reboot: Restarting system'
check 'arm64 guest: the volume is clean' e2fsck -fn "$T/volume"
check_match 'arm64 guest: it was mounted' '^Mount count: +1$' "$(dumpe2fs -h "$T/volume" 2>/dev/null)"

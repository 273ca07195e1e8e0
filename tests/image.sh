#!/usr/bin/env bash
# Images of other people's trees: `./build.sh image --from`, and `check`, which boots one. What is wrong
# is said, and nothing half-made has the final name. The official ones: runtimes.sh.
. "$(dirname "$0")/lib.sh"

need musl-tools busybox-static squashfs-tools e2fsprogs >&2

image() { "$GUEST_ROOT/build.sh" image "$@"; }
listing() { unsquashfs -d '' -ll "$1"; }

# A tree in Alpine's manner: musl as a shared library, busybox, /bin and /sbin folders of their own.
alpine_tree() {
    mkdir -p "$1"/{bin,sbin,lib,etc,usr/bin,usr/sbin}
    cp /usr/lib/x86_64-linux-musl/libc.so "$1/lib/ld-musl-x86_64.so.1"
    cp /bin/busybox "$1/bin/busybox"
    ln -s /bin/busybox "$1/bin/sh"
    ln -s /bin/busybox "$1/sbin/init"
    musl-gcc -O2 -o "$1/usr/bin/server" "$GUEST_ROOT/runtimes/conformance/server.c"
    echo 'ID=alpine-style' >"$1/etc/os-release"
}

# What makes a file an ELF executable for another machine is its head.
arm_tree() {
    mkdir -p "$1"/{bin,usr}
    printf '\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0' >"$1/bin/busybox"
}

alpine_tree "$T/alpine"
arm_tree "$T/arm"
mkdir -p "$T/outside" "$T/leads/bin"
ln -s ../outside "$T/leads/sbin"
cp -r "$T/alpine" "$T/merged"
mv "$T/merged/sbin"/* "$T/merged/usr/sbin/"
rmdir "$T/merged/sbin"
ln -s /usr/sbin "$T/merged/sbin"

# ---- packing ------------------------------------------------------------------------------------

check 'image: a folder becomes a squashfs' image --from "$T/alpine" --out "$T/alpine.squashfs"
check 'image: the agent is its init' cmp "$AGENT" <(unsquashfs -cat "$T/alpine.squashfs" sbin/init)
check_match 'image: the old init is kept' '^l.*/sbin/init.old -> /bin/busybox' "$(listing "$T/alpine.squashfs")"
tar -C "$T/alpine" -cf "$T/alpine.tar" .
check 'image: so does a tarball' image --from "$T/alpine.tar" --out "$T/again.squashfs"
check 'image: with the same bytes' cmp "$T/alpine.squashfs" "$T/again.squashfs"
cp -r "$T/alpine" "$T/copy"
touch "$T/copy"/*
for name in alpine copy; do
    check "image: $name as ext4" image --from "$T/$name" --format ext4 --out "$T/$name.ext4"
done
check 'image: ext4 has the same bytes, wherever and whenever the tree was made' cmp "$T/alpine.ext4" "$T/copy.ext4"
check 'image: ext4 is clean' e2fsck -fn "$T/alpine.ext4"
SHA=$(sha256sum <"$T/alpine.ext4")
check 'image: --verify' image --verify "${SHA%% *}" "$T/alpine.ext4"
refused 'image: --verify of another' 1 'is not' image --verify "${SHA%% *}" "$T/alpine.squashfs"

check 'image: /sbin as a link from the root' image --from "$T/merged" --out "$T/merged.squashfs"
check 'image: leads to a folder of the tree' cmp "$AGENT" <(unsquashfs -cat "$T/merged.squashfs" usr/sbin/init)

# ---- what is wrong is said ------------------------------------------------------------------------

nothing_left() { [ ! -e "$T/none" ] && [ ! -e "$T/none.part" ] && [ ! -e "$T/none.part.tree" ]; }

# wrong NAME REGEX COMMAND…: it fails, says why, and leaves nothing.
wrong() {
    refused "image: $1" 1 "$2" "${@:3}"
    check "image: $1: nothing is left" nothing_left
}

tar -C "$T" -cf "$T/other.tar" alpine/etc
head -c 100000 "$T/alpine.tar" >"$T/short.tar"
wrong 'a recipe that is not there' 'no recipe nonsense; there are: .*debian-12-python' image nonsense --out "$T/none"
wrong 'a source that is not there' 'is not there' image --from "$T/missing" --out "$T/none"
wrong 'another architecture' 'wrong architecture: .* ELF machine 183' image --from "$T/arm" --out "$T/none"
wrong 'no root file system' 'no root file system: neither /usr nor /bin' image --from "$T/other.tar" --out "$T/none"
wrong 'a link out of the tree' '/sbin of the tree leads out of it' image --from "$T/leads" --out "$T/none"
check_eq 'image: a link out of the tree: nothing is written there' '' "$(ls "$T/outside")"
wrong 'half a tarball' 'cannot unpack|does not build' image --from "$T/short.tar" --out "$T/none"
wrong 'an interpreter that it lacks' 'the tree has no python3' image --from "$T/alpine" --needs python3 --out "$T/none"
wrong 'no such format' 'no format iso' image --from "$T/alpine" --format iso --out "$T/none"
wrong 'no such folder' 'cannot write to' image --from "$T/alpine" --out "$T/nowhere/none"

# A disk of 2 MB, which the tree does not fit on.
full_disk() {
    unshare --mount bash -c 'mount -t tmpfs -o size=2m tmpfs "$1" && "$2" image --from "$3" --out "$1/none"
        status=$?; ls "$1" >"$4"; exit $status' - "$1" "$GUEST_ROOT/build.sh" "$T/alpine" "$T/left"
}
mkdir "$T/small"
refused 'image: a full disk' 1 'cannot (un)?pack .*0 left on its disk' full_disk "$T/small"
check_eq 'image: a full disk: nothing is left' '' "$(cat "$T/left")"

no_network() { unshare --net "$GUEST_ROOT/build.sh" image debian-12-python --mirror http://mirror.invalid/debian --out "$T/none"; }
wrong 'no network' 'does not have bookworm, or there is no network' no_network

nobody() {
    chmod 755 "$T"
    setpriv --reuid 65534 --regid 65534 --clear-groups env HOME=/tmp "$GUEST_ROOT/build.sh" image --from "$T/alpine" --out "$T/none"
}
wrong 'no permission' 'ermission denied|cannot write to' nobody

# interrupted SECONDS: in the midst of it.
interrupted() { timeout -s INT "$1" "$GUEST_ROOT/build.sh" image --from / --out "$T/none"; }
interrupted 1 >"$T/out" 2>&1 || true
check 'image: interrupted: nothing is left' wait_for 5 nothing_left

# ---- check --------------------------------------------------------------------------------------

"$GUEST_ROOT/runtimes/check.sh" "$T/alpine.squashfs" >"$T/table" 2>&1 || true
for row in ready configuration executable volumes halt; do
    check_match "check: an Alpine-style image: $row" "^$row +ok " "$(cat "$T/table")"
done
check_match 'check: what the image does not have' '^node +- +no node in the image' "$(cat "$T/table")"
check_match 'check: the sum' '^5 passed, 0 failed$' "$(cat "$T/table")"

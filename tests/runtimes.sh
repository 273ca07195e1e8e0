#!/usr/bin/env bash
# The official images, each from its recipe: a runtime passes check, an instance boots to a login over
# the network. Full matrix: some minutes for each.
TEST_SECONDS=${TEST_SECONDS:-3600}
. "$(dirname "$0")/lib.sh"
. "$GUEST_ROOT/runtimes/image.sh"

need squashfs-tools btrfs-progs openssh-client dosfstools mtools >&2

image() { "$GUEST_ROOT/build.sh" image "$@"; }
sha() { sha256sum <"$1"; }

# runtime NAME ROW…: it is built, and passes these rows of check and fails none.
runtime() {
    local name=$1 row
    shift
    check "$name: is built" image "$name" --out "$T/$name"
    "$GUEST_ROOT/runtimes/check.sh" "$T/$name" >"$T/table" 2>&1 || fail "$name: check" "$(cat "$T/table")"
    for row; do
        check_match "$name: $row" "^$row +ok " "$(cat "$T/table")"
    done
}

# sdk NAME: the SDK is there, with what it needs, for the Python of the image.
sdk() {
    unsquashfs -q -n -d "$T/tree" "$T/$1" >/dev/null 2>&1
    check_eq "$1: the SDK" /opt/aleph/libs "$(chroot "$T/tree" env PYTHONPATH=/opt/aleph/libs PYTHONDONTWRITEBYTECODE=1 python3 -OO -c '
import aleph.sdk.chains.ethereum, aleph.sdk.client, aleph.sdk.vm.app, aleph.sdk.vm.cache, fastapi
print(fastapi.__file__.removesuffix("/fastapi/__init__.py"))' 2>&1 | tail -n 1)"
    rm -rf "$T/tree"
}

ALWAYS='ready configuration executable volumes halt'
runtime debian-11-python-node $ALWAYS asgi event wsgi node
runtime debian-12-python $ALWAYS asgi event wsgi node
runtime debian-13-python $ALWAYS asgi event wsgi node
runtime node-lts $ALWAYS node
runtime python-min $ALWAYS asgi event wsgi
runtime node-min $ALWAYS node
for name in debian-11-python-node debian-12-python debian-13-python; do
    sdk "$name"
done

# Guests of this script boot the images that it made.
guest_image() { GUEST_IMAGE=$T/$1; }

# example NAME CODE PATH REGEX: a program of examples/ starts in the image, and answers.
example() {
    local TEST_IMAGE=$1
    boot
    check "$1: the example $2 starts" configure "$GUEST_ROOT/examples/$2" main:app
    check_match "$1: the example $2 answers" "$4" "$(request "$3" || true)"
}
guest_need
for name in debian-11-python-node debian-12-python debian-13-python python-min; do
    example "$name" hello-python / 'Hello'
    [ "$name" = python-min ] || example "$name" fastapi '/items/7?q=red' '"item":7,"q":"red"'
done
stop

check_at_most 'python-min: bytes' $((16 << 20)) "$(stat -c %s "$T/python-min")"
check_at_most 'node-min: bytes' $((32 << 20)) "$(stat -c %s "$T/node-min")"

# ---- twice -----------------------------------------------------------------------------------------

mkdir "$T/cache"
check 'debian-12-python: once more, from nothing' \
    env IMAGE_CACHE="$T/cache" "$GUEST_ROOT/build.sh" image debian-12-python --out "$T/again"
check_eq 'debian-12-python: the same bytes' "$(sha "$T/debian-12-python")" "$(sha "$T/again")"
for name in first second; do
    check "debian-12-python: as ext4, $name" image debian-12-python --format ext4 --out "$T/$name.ext4"
done
check 'debian-12-python: the same bytes as ext4' cmp "$T/first.ext4" "$T/second.ext4"

# Every path, and of what is not a folder all but the times that mkfs.btrfs chooses (of a folder at the
# end of a leaf, btrfs restore loses mode and time).
manifest() {
    mkdir "$T/files"
    btrfs restore -mSx "$1" "$T/files" >/dev/null
    (
        cd "$T/files"
        find . | sort
        find . ! -type d -print0 | sort -z | tar -c --null -T - --numeric-owner --xattrs --format=posix \
            --pax-option=delete=atime,delete=ctime
    ) | sha256sum
    rm -rf "$T/files"
}
check 'debian-12-python: as btrfs' image debian-12-python --format btrfs --out "$T/first.btrfs"
check 'debian-12-python: as btrfs, from nothing' \
    env IMAGE_CACHE="$T/cache" "$GUEST_ROOT/build.sh" image debian-12-python --format btrfs --out "$T/second.btrfs"
check_eq 'debian-12-python: the same files as btrfs' "$(manifest "$T/first.btrfs")" "$(manifest "$T/second.btrfs")"
rm -rf "$T/cache" "$T"/*.ext4 "$T"/*.btrfs "$T/again"

# ---- instances ---------------------------------------------------------------------------------------

# The disk that cloud-init reads, as aleph.im's hosts write it: a user's key, a name, fixed addresses.
seed() {
    [ -e "$T/key" ] || ssh-keygen -q -t ed25519 -N '' -f "$T/key"
    printf '%s\n' '#cloud-config' 'users:' '  - name: tester' '    shell: /bin/bash' \
        "    ssh_authorized_keys: ['$(cat "$T/key.pub")']" >"$T/user-data"
    printf '%s\n' 'instance-id: one' 'local-hostname: instance-under-test' >"$T/meta-data"
    printf '%s\n' 'ethernets:' '  eth0:' '    match: {driver: virtio_net}' '    addresses: [10.0.2.15/24, "fec0::15/64"]' \
        '    gateway4: 10.0.2.2' '    gateway6: "fec0::2"' '    nameservers: {addresses: [10.0.2.3]}' 'version: 2' >"$T/network-config"
    truncate -s 1M "$T/seed"
    mkfs.vfat -n CIDATA "$T/seed" >/dev/null
    mcopy -i "$T/seed" "$T"/{user-data,meta-data,network-config} ::
}

login() {
    ssh -q -i "$T/key" -p "$PORT" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=5 \
        -o BatchMode=yes tester@127.0.0.1 "$@"
}

reached() { is_gone "$GUEST_QEMU_PID" || login true; }

# Whatever it does within so many seconds on an emulated processor.
INSTANCE_S=420

# instance NAME WHAT [OPTION of image…]: WHAT stands in its os-release.
instance() {
    local name=$1 what=$2 said
    shift 2
    check "$name: is built" image "$name" "$@" --out "$T/$name" || return 0
    check "$name: is a clean btrfs" btrfs check -q "$T/$name"
    new_folder
    PORT=$((20000 + RANDOM % 10000))
    truncate -s 4G "$T/$name"
    guest_qemu tcg -append "${GUEST_ARGS/panic=1/panic=1 systemd.show_status=false}" \
        -drive "file=$T/$name,format=raw,if=none,id=root" -device virtio-blk-pci,drive=root \
        -drive "file=$T/seed,format=raw,if=none,id=seed,readonly=on" -device virtio-blk-pci,drive=seed \
        -netdev "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:$PORT-:22" -device virtio-net-pci,netdev=net,romfile=
    wait_for "$INSTANCE_S" reached || true
    said=$(login 'hostname; cat /proc/1/comm; ip -4 -o addr show scope global | wc -l' | tr '\n' ' ' || true)
    check_eq "$name: a login over the network, by the key of cloud-init" 'instance-under-test systemd 1 ' "$said"
    check_match "$name: is what it says" "$what" "$(login 'cat /etc/os-release' || true)"
    [ "$said" ] || tail -n 30 "$CONSOLE" >&2
    guest_stop
    rm -f "$T/$name"
}

MODULES_MORE='crc32c_generic btrfs vfat nls_ascii nls_cp437'
guest_need
seed
instance debian-11 'Debian.*11'
instance debian-12 'Debian.*12'
instance debian-13 'Debian.*13'
# Ubuntu's archive does not answer everywhere: what a tarball must have is what Debian's has.
instance ubuntu-22.04 'Debian.*13' --base "$(ls -t "$IMAGE_CACHE"/debian-13-*.tar | grep -v python | head -n 1)"
if [ -n "${UBUNTU_MIRROR-}" ]; then
    instance ubuntu-22.04 'Ubuntu.*22.04' --mirror "$UBUNTU_MIRROR"
else
    refused 'ubuntu-22.04: without an archive it says what is missing' 1 'archive of Ubuntu; --base TARBALL' image ubuntu-22.04
fi

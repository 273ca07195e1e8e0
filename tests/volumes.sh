#!/usr/bin/env bash
# Volumes in real guests: what is mounted where and how, clean file systems after halt, threat
# T6 and items 59 to 61 of the list of bad inputs, code on a disk of its own.
. "$(dirname "$0")/lib.sh"

need e2fsprogs squashfs-tools btrfs-progs xfsprogs

FILES=$APPS/files
DISKS=$T/disks
LETTERS=bcdefghijklmnopqrstuvwxyz
mkdir "$DISKS"

# ---- Images ------------------------------------------------------------------------------

tree() {
    local folder=$DISKS/$1.tree
    mkdir -p "$folder"
    echo "of $1" >"$folder/name"
    echo "$folder"
}

squashfs() { mksquashfs "$DISKS/$1.tree" "$DISKS/$1" -quiet -no-progress -all-root >"$T/mksquashfs"; }
ext() { truncate -s "${3:-8M}" "$DISKS/$1" && mke2fs -q -t "$2" -d "$DISKS/$1.tree" "$DISKS/$1"; }
blank() { truncate -s "$2" "$DISKS/$1"; }
# overwrite DISK OFFSET: with bytes that mean nothing, from standard input.
overwrite() { dd of="$DISKS/$1" bs=1 seek="$2" conv=notrunc status=none; }

# What a malicious image holds: a setuid program, a device node, a link to each place.
make_hostile() {
    local folder
    folder=$(tree hostile)
    cp "$(command -v id)" "$folder/suid"
    chmod 4755 "$folder/suid"
    mknod "$folder/node" b 254 0
    ln -s /proc "$folder/proc"
    ln -s /proc/self/root "$folder/magic"
    ln -s /usr/sbin "$folder/sbin"
    ln -s nowhere "$folder/dangling"
    ln -s /srv "$folder/srv"
}

make_disks() {
    local name
    for name in plain corrupt_squashfs; do tree $name >"$T/made"; done
    head -c 200000 /dev/urandom >"$DISKS/corrupt_squashfs.tree/bulk"
    mkdir -p "$(tree packages)/greetings"
    echo 'TEXT = "from a volume"' >"$DISKS/packages.tree/greetings/__init__.py"
    tree ext4 >"$T/made"
    tree ext2 >"$T/made"
    tree corrupt_ext4 >"$T/made"
    tree dirty >"$T/made"
    mkdir -p "$(tree btrfs)"
    make_hostile
    for name in plain packages corrupt_squashfs hostile; do squashfs $name; done
    ext ext4 ext4 16M
    ext ext2 ext2
    ext dirty ext4
    ext corrupt_ext4 ext4
    blank btrfs 128M
    mkfs.btrfs -q -r "$DISKS/btrfs.tree" "$DISKS/btrfs" >"$T/made"
    blank xfs 320M
    mkfs.xfs -q "$DISKS/xfs"
    blank zero 1M
    blank swap 1M
    mkswap -q "$DISKS/swap" >"$T/made" 2>&1
    # squashfs(5): the bytes behind the magic are the superblock; ext4: the group descriptors.
    head -c 60 /dev/urandom | overwrite corrupt_squashfs 30
    head -c 4096 /dev/urandom | overwrite corrupt_ext4 2048
    # What a machine leaves that loses its power while it writes: the journal's superblock says
    # that there is something to replay, the superblock that it is needed.
    debugfs -w -R 'jo -c' "$DISKS/dirty" >"$T/made" 2>&1 || true
    printf 'jo\njw -b 333 /dev/zero\njc\n' | debugfs -w -f - "$DISKS/dirty" >"$T/made" 2>&1
}

# disks NAME[,OPTION of -drive]…: sets DRIVES, and DEVICE[NAME] to what the guest calls it.
declare -A DEVICE
disks() {
    local entry name i=0
    DRIVES=() DEVICE=()
    for entry; do
        name=${entry%%,*}
        DEVICE[$name]=vd${LETTERS:i++:1}
        DRIVES+=(-drive "file=$DISKS/$name,format=raw,if=virtio,werror=report,rerror=report${entry#"$name"}")
    done
}

# volume NAME PATH[:OPTION]…: the option of `configure`.
volume() { echo "--volume ${DEVICE[$1]}:$2"; }

# mounted_as TYPE PATH OPTION…
mounted_as() {
    local type=$1 path=$2 option line
    shift 2
    line=$(shell 'cat /proc/mounts' | grep -E "^/dev/[^ ]+ $path $type ") || { echo "no $type on $path"; return 1; }
    for option; do
        grep -qE "[ ,]$option(,| )" <<<"$line" || { echo "no $option: $line"; return 1; }
    done
}

volumes_mounted() { shell 'cat /proc/mounts' | grep -c '^/dev/vd[b-z] ' || true; }

# wrong NAME REGEX --volume…: the configuration is refused with that text, nothing stays
# mounted of it, also not the good volume that comes first, and the guest is well.
wrong() {
    local name=$1 regex=$2
    shift 2
    refused "$name" 1 "$regex" configure "$FILES" main:app $(volume plain /first) "$@"
    check_eq "$name: nothing stays mounted" 0 "$(volumes_mounted)"
    guest_ok "$name: well afterwards"
}

# is_clean NAME COMMAND…: the checker of its file system has nothing to say.
is_clean() {
    local name=$1
    shift
    check "$name" "$@"
    sed -n '/[Ww]arning\|[Ee]rror/p' "$T/check.out"
}

ext_is_clean() {
    ! dumpe2fs -h "$1" 2>&1 | grep needs_recovery && e2fsck -fn "$1" &&
        [ "$(dumpe2fs -h "$1" 2>/dev/null | sed -n 's/^Filesystem state: *//p')" = clean ]
}

# ---- 59 and 60, T6: what is refused --------------------------------------------------------

make_disks
disks plain ext4 ext2 corrupt_squashfs corrupt_ext4 zero swap hostile dirty,readonly=on packages
boot agent.limit.device_ms=300 -- "${DRIVES[@]}"
GOOD=(shell 'echo hello')
baseline

wrong '59: a missing device is named' 'volume vdz on /data: there is no disk /dev/vdz' --volume vdz:/data
wrong '59: a device name that climbs' 'volumes: "../sda" is no device name' --volume ../sda:/data
wrong '59: a device name with a slash' 'volumes: "block/vdb" is no device name' --volume block/vdb:/data
wrong '59: no device name' 'volumes: "" is no device name' --volume :/data
wrong '59: a device that is no disk' 'volume tty on /data: /dev/tty is no disk' --volume tty:/data
wrong '59: a long device name' 'is no device name' --volume "$(printf 'a%.0s' {1..200}):/data"
wrong '59: the same device twice' 'volumes: vdb stands twice' $(volume plain /data)
wrong '59: the same place twice' 'are both for /first' $(volume ext4 //first/./:rw)
wrong '59: the device of the root' 'volume vda on /data: /dev/vda is in use already' --volume vda:/data
for place in / /proc /sbin /sys /dev /dev/shm /usr /usr/sbin /etc /run/agent /rom/opt //proc//1; do
    wrong "59: over $place" 'is a place of the system' $(volume ext4 $place:rw)
done
wrong '59: a relative place' 'mount "data" is no absolute path' $(volume ext4 data:rw)
wrong '59: no place' 'mount "" is no absolute path' $(volume ext4 '')
wrong '59: a place that climbs' 'mount "/data/../proc" is no absolute path' $(volume ext4 /data/../proc)
wrong '59: a place of 4 KiB' 'mount has 4096 bytes, at most 1023' $(volume ext4 "/$(printf 'a%.0s' {1..4095})")
wrong '59: a part of 256 bytes' 'mount point cannot be made: File ?name too long' $(volume ext4 "/$(printf 'a%.0s' {1..256})")
wrong '59: on a file' 'mount point cannot be made: Not a directory' $(volume ext4 /etc/passwd)
wrong '59: in a read-only volume' 'mount point cannot be made: Read-only' $(volume ext4 /first/new)

wrong '60: a corrupt squashfs' 'volume vde on /data: squashfs cannot be mounted: damaged' $(volume corrupt_squashfs /data)
wrong '60: a corrupt ext4' 'volume vdf on /data: ext4 cannot be mounted: damaged' $(volume corrupt_ext4 /data:rw)
wrong '60: squashfs to be written' 'volume vdk on /data: squashfs is on it, which cannot be written' $(volume packages /data:rw)
wrong '60: a wrong type' 'volume vdh on /data: swap is on it, which cannot be mounted' $(volume swap /data)
wrong '60: zeros' 'volume vdg on /data: no file system' $(volume zero /data:rw)
wrong '60: a read-only device asked rw' 'volume vdj on /data: /dev/vdj is read-only' $(volume dirty /data:rw)
wrong '60: a dirty journal on a read-only device' 'vdj on /data: ext4 cannot be mounted: it was not unmounted cleanly' \
    $(volume dirty /data)

refused '60: the program does not start' 1 'no module' configure "$FILES" nowhere:app $(volume ext4 /data:rw)
check_eq '60: the program does not start: nothing stays mounted' 0 "$(volumes_mounted)"

# What an image makes of the way to a mount point inside it.
wrong 'T6: through a link to /proc' 'a place of the system|cannot be made' $(volume hostile /h) $(volume ext4 /h/proc/sys:rw)
wrong 'T6: a link to /proc itself' 'its mount point is /proc, a place' $(volume hostile /h) $(volume ext4 /h/proc:rw)
wrong 'T6: through a link of the kernel' 'cannot be made: Symbolic link loop|Too many levels' \
    $(volume hostile /h) $(volume ext4 /h/magic/srv:rw)
wrong 'T6: a link to /usr/sbin' 'its mount point is /usr/sbin, a place' $(volume hostile /h) $(volume ext4 /h/sbin:rw)
wrong 'T6: a dangling link' 'mount point cannot be made' $(volume hostile /h) $(volume ext4 /h/dangling:rw)

check 'T6: configured' configure "$FILES" main:app $(volume hostile /h) $(volume ext2 /lib/more:rw) $(volume ext4 /h/srv/deep:rw)
check 'T6: no setuid, no devices' mounted_as squashfs /h ro nosuid nodev
check_eq 'T6: a setuid program gives nothing' 65534 \
    "$(shell "setpriv --reuid 65534 --clear-groups /h/suid -u 2>&1 || true")"
check_match 'T6: a device node opens nothing' 'Permission denied' "$(shell 'cat /h/node 2>&1')"
check '59: a link of the distribution is no system place' mounted_as ext4 /usr/lib/more rw nosuid nodev
check 'T6: a link that leads to a harmless place' mounted_as ext4 /srv/deep rw
check_eq '59: well afterwards' files "$(request /)"
check 'T6: halts' halt
check '60: a file system without journal is clean' ext_is_clean "$DISKS/ext2"

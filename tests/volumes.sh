#!/usr/bin/env bash
# Volumes in real guests: what is mounted where and how, clean file systems after halt, threat
# T6 and items 59 to 61 of the list of bad inputs, code on a disk of its own.
TEST_SECONDS=${TEST_SECONDS:-600}
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

# A program whose start is a script: answers with the file that is asked for.
make_program() {
    printf '#!/bin/sh\ncd "$(dirname "$0")"\nexec node server.js "$@"\n' >"$1/run.sh"
    chmod 755 "$1/run.sh"
    cat >"$1/server.js" <<'END'
const fs = require('fs')
require('http').createServer((request, response) => {
  response.end(request.url === '/args' ? process.argv.slice(2).join(' ') : fs.readFileSync('.' + request.url))
}).listen(process.env.PORT, process.env.HOST)
END
}

make_disks() {
    local name
    for name in plain corrupt_squashfs; do tree $name >"$T/made"; done
    make_program "$DISKS/plain.tree"
    head -c 200000 /dev/urandom >"$DISKS/corrupt_squashfs.tree/bulk"
    mkdir -p "$(tree packages)/greetings"
    echo 'TEXT = "from a volume"' >"$DISKS/packages.tree/greetings/__init__.py"
    tree ext4 >"$T/made"
    tree ext2 >"$T/made"
    tree corrupt_ext4 >"$T/made"
    echo original >"$(tree dirty)/name"
    tree ext3 >"$T/made"
    tree late >"$T/made"
    echo original >"$(tree asked_ro)/name"
    mkdir -p "$(tree btrfs)/inner"
    mkdir -p "$(tree modules)/greetings"
    tree code >"$T/made"
    cp "$FILES/main.py" "$DISKS/code.tree"
    make_hostile
    for name in plain packages modules code corrupt_squashfs hostile; do squashfs $name; done
    ext ext4 ext4 16M
    ext ext2 ext2
    ext ext3 ext3
    ext late ext4
    leave_dirty dirty
    leave_dirty asked_ro
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
}

# What a machine leaves that loses its power while it writes: the journal has what is to be in
# the file "name", the file itself has it not yet.
leave_dirty() {
    local block
    ext "$1" ext4
    block=$(debugfs -R 'blocks /name' "$DISKS/$1" 2>"$T/made")
    { echo replayed; head -c 1024 /dev/zero; } | head -c 1024 >"$T/block"
    printf 'jo\njw -b %d %s\njc\n' $block "$T/block" | debugfs -w -f - "$DISKS/$1" >"$T/made" 2>&1
    dumpe2fs -h "$DISKS/$1" 2>"$T/made" | grep -q needs_recovery || die "the journal of $1 has nothing to replay"
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

# peer_configure 'PATH=DEVICE…': as the host, without the agent's own code.
peer_configure() {
    "$PYTHON" -B -c '
import sys
sys.path.insert(0, sys.argv[1])
from peer import Peer
volumes = [dict(zip(("mount", "device"), pair.split("=")), read_only=False) for pair in sys.argv[3].split()]
reply = Peer(sys.argv[2]).configure(b"", "main:app", "squashfs", volumes=volumes)
assert reply == {"success": True}, reply' "$TESTS" "$SOCK" "$1"
}

# mounted_as TYPE PATH OPTION…
mounted_as() {
    local type=$1 path=$2 option line
    shift 2
    line=$(shell 'cat /proc/mounts' | grep -E "^/dev/[^ ]+ $path $type ") || { echo "no $type on $path"; return 1; }
    for option; do
        grep -qE "[ ,]$option(,| )" <<<"$line" || { echo "no $option: $line"; return 1; }
    done
}

# wrong NAME REGEX --volume…: the configuration is refused with that text, and the guest is well:
# its good request lists the mounts, so nothing stays of it, also not the good volume.
wrong() {
    local name=$1 regex=$2
    shift 2
    refused "$name" 1 "$regex" configure "$FILES" main:app $(volume plain /first) "$@"
    guest_ok "$name: well afterwards, with the mounts of before"
}

ext_is_clean() {
    ! dumpe2fs -h "$1" 2>&1 | grep needs_recovery && e2fsck -fn "$1" &&
        [ "$(dumpe2fs -h "$1" 2>/dev/null | sed -n 's/^Filesystem state: *//p')" = clean ]
}

xfs_is_clean() {
    ! xfs_logprint -t "$DISKS/xfs" | grep -q 'log needs to be recovered\|<DIRTY>' && xfs_repair -n "$DISKS/xfs"
}

# ---- 59 and 60, T6: what is refused --------------------------------------------------------

make_disks
disks plain ext4 ext2 corrupt_squashfs corrupt_ext4 zero swap hostile dirty,readonly=on packages xfs
boot agent.limit.device_ms=300 -- "${DRIVES[@]}"
GOOD=(shell 'while read -r line; do echo "$line"; done </proc/mounts')    # starts no process
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
for place in / /proc /sbin /rom/opt //proc//1; do         # unit.c has them all
    wrong "59: over $place" 'is a place of the system' $(volume ext4 $place:rw)
done
refused 'call: a volume without a place' 2 'expected DEVICE:DIR' configure "$FILES" main:app --volume vdb
refused 'call: an unknown word of a volume' 2 '"ro" is not rw or trusted' configure "$FILES" main:app --volume vdb:/x:ro
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
shell 'rm -r /lib/modules/*/kernel/fs/xfs'
wrong '60: a type that this kernel lacks' 'volume vdl on /data: xfs cannot be mounted: this kernel has no such' $(volume xfs /data)
wrong '60: zeros' 'volume vdg on /data: no file system' $(volume zero /data:rw)
wrong '60: a read-only device asked rw' 'volume vdj on /data: /dev/vdj is read-only' $(volume dirty /data:rw)
wrong '60: a dirty journal on a read-only device' 'vdj on /data: ext4 cannot be mounted: it was not unmounted cleanly' \
    $(volume dirty /data)

refused '60: the program does not start' 1 'no module' configure "$FILES" nowhere:app $(volume ext4 /data:rw)
guest_ok '60: the program does not start: well afterwards, with the mounts of before'

# What an image makes of the way to a mount point inside it.
wrong 'T6: through a link to /proc' 'a place of the system|cannot be made' $(volume hostile /h) $(volume ext4 /h/proc/sys:rw)
wrong 'T6: a link to /proc itself' 'its mount point is /proc, a place' $(volume hostile /h) $(volume ext4 /h/proc:rw)
wrong 'T6: through a link of the kernel' 'cannot be made: Symbolic link loop|Too many levels' \
    $(volume hostile /h) $(volume ext4 /h/magic/srv:rw)
wrong 'T6: a link to /usr/sbin' 'its mount point is /usr/sbin, a place' $(volume hostile /h) $(volume ext4 /h/sbin:rw)
wrong 'T6: a dangling link' 'mount point cannot be made' $(volume hostile /h) $(volume ext4 /h/dangling:rw)

GOOD=(request /name)
check 'T6: configured, with a script on squashfs' configure - 'run.sh one two' --interface executable $(volume hostile /h) $(volume ext2 /lib/more:rw) $(volume ext4 /h/srv/deep:rw)
check 'T6: no setuid, no devices' mounted_as squashfs /h ro nosuid nodev
check_eq 'T6: a setuid program gives nothing' 65534 \
    "$(shell "setpriv --reuid 65534 --clear-groups /h/suid -u 2>&1 || true")"
check_match 'T6: a device node opens nothing' 'Permission denied' "$(shell 'cat /h/node 2>&1')"
check '59: a link of the distribution is no system place' mounted_as ext[24] /usr/lib/more rw nosuid nodev
check 'T6: a link that leads to a harmless place' mounted_as ext4 /srv/deep rw
check_eq 'squashfs code: Node by a script' 'of plain' "$(request /name)"
check_eq 'squashfs code: the script has its arguments' 'one two' "$(request /args)"
check 'squashfs code: of an executable' mounted_as squashfs /opt/code ro nosuid nodev
baseline
guest_ok '59: well afterwards'
check 'T6: halts' halt
check '60: a file system without journal is clean' ext_is_clean "$DISKS/ext2"

# ---- what is mounted ---------------------------------------------------------------------

disks plain ext4 btrfs xfs packages modules ext3 dirty asked_ro late
mkdir "$T/input"
echo 'of the input' >"$T/input/input"
boot -- "${DRIVES[@]}"
# A volume inside another comes first here, and is mounted after it.
check 'volumes: configured' configure "$FILES" main:app --input "$T/input" \
    $(volume ext3 /var/lib/store/in/side:rw) $(volume ext4 /var/lib/store:rw) $(volume plain /data/more/plain) \
    $(volume late /data:rw) $(volume btrfs /mnt/btrfs:rw) $(volume xfs /mnt/btrfs/inner:rw:trusted) \
    $(volume packages /opt/packages) $(volume modules /opt/node_modules) $(volume dirty /srv/dirty:rw) \
    $(volume asked_ro /srv/asked)
baseline
check 'volumes: squashfs' mounted_as squashfs /data/more/plain ro nosuid nodev
check 'volumes: writable ext4' mounted_as ext4 /var/lib/store rw nosuid nodev
check 'volumes: writable ext3, inside it' mounted_as ext4 /var/lib/store/in/side rw nosuid nodev
check 'volumes: writable btrfs' mounted_as btrfs /mnt/btrfs rw nosuid nodev
check 'volumes: writable xfs, inside it' mounted_as xfs /mnt/btrfs/inner rw
check 'volumes: a trusted one may have setuid and devices' not mounted_as xfs /mnt/btrfs/inner nosuid
check 'volumes: over /opt/packages' mounted_as squashfs /opt/packages ro
check 'volumes: over /opt/node_modules' mounted_as squashfs /opt/node_modules ro
check 'volumes: over /data' mounted_as ext4 /data rw
check_eq 'volumes: a squashfs is read' 'of plain' "$(request /data/more/plain/name)"
check_eq 'volumes: input data is unpacked into one' 'of the input' "$(request /data/input)"
check_eq 'volumes: a package from /opt/packages' 'from a volume' "$(request /import)"
check_eq '60: a dirty journal is replayed' replayed "$(request /srv/dirty/name)"
check_eq '60: also for reading, on a disk that can be written' replayed "$(request /srv/asked/name)"
check_eq '60: what is asked for reading cannot be written' EROFS "$(request -d x /srv/asked/new || true)"
PLACES='/var/lib/store /var/lib/store/in/side /data /mnt/btrfs /mnt/btrfs/inner /srv/dirty'
for place in $PLACES; do
    check_eq "volumes: $place is written" '4 bytes' "$(request -d kept $place/kept)"
    shell "ln $place/kept $place/again; head -c 300000 /dev/urandom >$place/bulk"
done
guest_ok 'volumes: well afterwards'
check 'volumes: halts' halt
for name in ext4 ext3 late dirty asked_ro; do
    check "volumes: $name is clean after halt" ext_is_clean "$DISKS/$name"
done
check 'volumes: btrfs is clean after halt' btrfs check "$DISKS/btrfs"
check 'volumes: xfs is clean after halt' xfs_is_clean

# ---- after the halt; 61; code on a disk of its own ---------------------------------------

# Reading or writing what is in the block of this file ends with an error of the disk.
blank sick 8M
tree sick >"$T/made"
head -c 4096 /dev/urandom >"$DISKS/sick.tree/bad"
ext sick ext4
SECTOR=$(($(debugfs -R 'blocks /bad' "$DISKS/sick" 2>"$T/made" | awk '{ print $1 }') * 2))
sick_rule() { echo ",inject-error.$1.event=none,inject-error.$1.iotype=$2,inject-error.$1.errno=5,inject-error.$1.sector=$SECTOR"; }
SICK="driver=blkdebug,image.driver=file,image.filename=$DISKS/sick$(sick_rule 0 read)$(sick_rule 1 write)"

disks code ext4 ext3 late btrfs xfs
boot -- "${DRIVES[@]}" -drive "$SICK,if=virtio,werror=report,rerror=report"
DEVICE[sick]=vdh
refused 'squashfs code: its disk is the code only' 1 'vdb stands twice; vdb is the code' \
    configure - main:app --volume vdb:/x
check 'squashfs code: configured by the independent peer' peer_configure \
    "/a=${DEVICE[ext4]} /b=${DEVICE[ext3]} /c=${DEVICE[late]} /d=${DEVICE[btrfs]} /e=${DEVICE[xfs]} /f=${DEVICE[sick]}"
baseline
check 'squashfs code: where it is' mounted_as squashfs /opt/code ro nosuid nodev
check_eq 'squashfs code: folder and sys.path' '/opt/code /opt/code /opt/packages' "$(request /dir)"
for place in /a /b /c /d /e; do
    check_eq "volumes: $place has what was written before the halt" kept "$(request $place/again)"
done

check_eq '61: EIO when reading is the program'\''s matter' EIO "$(request /f/bad || true)"
check_eq '61: and when writing' EIO "$(head -c 4096 /dev/urandom | request -d @- /f/bad || true)"
guest_ok '61: well afterwards'
check_eq '61: ENOSPC, too' ENOSPC "$(head -c 9000000 /dev/zero | request -d @- /b/bulk || true)"
guest_ok '61: well with a full volume'
check_eq '61: what was there is' kept "$(request /b/kept)"
check '61: halts' halt
check '61: the full one is clean' ext_is_clean "$DISKS/ext3"

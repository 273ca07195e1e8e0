#!/usr/bin/env bash
# bench/guest.sh INIT FOLDER [IMAGE]: a guest of a Debian root whose /sbin/init is the file INIT, with
# its vsock and its console in FOLDER, until standard input ends. An init0.sh gets the init1.py
# beside it, and the packages that the two need. Of an IMAGE, its own init, unless INIT is another.
set -euo pipefail
. "$(dirname "$0")/../runtimes/guest.sh"

INIT=$1 GUEST=$2 IMAGE=${3:-}

# init_over: the usual initramfs, but the root's /sbin/init is INIT. Prints the file.
init_over() {
    mkdir "$GUEST/over"
    cp "$INIT" "$GUEST/over/over"
    guest_initramfs_init | sed 's/^exec .*/$bb mount -o bind \/over \/root\/sbin\/init\n&/' >"$GUEST/over/init"
    chmod 755 "$GUEST/over/init"
    guest_initramfs_over "$GUEST/over" "$GUEST/initramfs"
    echo "$GUEST/initramfs"
}

if [ "$IMAGE" ]; then
    guest_need
    GUEST_IMAGE=$IMAGE
    [ -z "$INIT" ] || GUEST_INITRAMFS=$(init_over)
elif [[ $INIT == */init0.sh ]]; then
    AGENT=$(realpath "$INIT")
    guest_image debian-12-scripts
    debugfs -w -f - "$GUEST_IMAGE" >/dev/null 2>&1 <<END_OF_COMMANDS
mkdir /overlay
cd /root
rm init1.py
write "${AGENT%/*}/init1.py" init1.py
set_inode_field init1.py mode 0100755
END_OF_COMMANDS
else
    AGENT=$(realpath "$INIT")
    guest_image debian-12-run
fi
guest_boot bench.guest
read -r || true

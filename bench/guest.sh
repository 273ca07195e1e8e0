#!/usr/bin/env bash
# bench/guest.sh INIT FOLDER: a guest of a Debian root whose /sbin/init is the file INIT, with
# its vsock and its console in FOLDER, until standard input ends. An init0.sh gets the init1.py
# beside it, and the packages that the two need.
set -euo pipefail
. "$(dirname "$0")/../runtimes/guest.sh"

AGENT=$(realpath "$1")
GUEST=$2
if [[ $AGENT == */init0.sh ]]; then
    guest_image debian-12-scripts
    debugfs -w -f - "$GUEST_IMAGE" >/dev/null 2>&1 <<END_OF_COMMANDS
mkdir /overlay
cd /root
rm init1.py
write "${AGENT%/*}/init1.py" init1.py
set_inode_field init1.py mode 0100755
END_OF_COMMANDS
else
    guest_image debian-12-run
fi
guest_boot bench.guest
read -r || true

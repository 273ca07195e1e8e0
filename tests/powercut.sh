#!/usr/bin/env bash
# Item 75 of the list of bad inputs: the power goes at random instants while a program writes.
#
# A guest whose QEMU is stopped with SIGSTOP has a disk exactly as SIGKILL at that instant would
# leave it: what QEMU has written is in the image, what the guest still holds is not. So one
# guest gives as many cuts as are wanted, each a copy of the image; the last cut is a SIGKILL.
# Then guests mount the copies, as the next boot would: each must have the last number that the
# program acknowledged, after fsync. Full matrix: two minutes.
. "$(dirname "$0")/lib.sh"

need e2fsprogs
CUTS=${CUTS:-50}
PER_GUEST=25                        # disks that fit into one
SEED=${SEED:-$RANDOM}

needs_recovery() { dumpe2fs -h "$1" 2>/dev/null | grep -q needs_recovery; }

are_clean() {
    local i
    for i; do
        ! needs_recovery "$T/cuts/$i" && e2fsck -fn "$T/cuts/$i" || { echo "cut $i"; return 1; }
    done
}

truncate -s 16M "$T/disk"
mke2fs -q -t ext4 "$T/disk"
mkdir "$T/cuts"
boot -- -drive "file=$T/disk,format=raw,if=virtio"
check '75: configured' configure "$APPS/load" main:app --volume vdb:/data:rw
echo "   seed $SEED"
checks_from "$PYTHON" -B "$TESTS/powercut.py" cut "$SOCK" "$GUEST_QEMU_PID" "$T/disk" "$T/cuts" "$CUTS" "$SEED"
stop 2>"$T/killed"
DIRTY=0
for ((i = 1; i <= CUTS; i++)); do
    ! needs_recovery "$T/cuts/$i" || DIRTY=$((DIRTY + 1))
done
check_eq '75: cuts that left a journal to replay' "$CUTS" "$DIRTY"

letters=(b c d e f g h i j k l m n o p q r s t u v w x y z)
for ((first = 1; first <= CUTS; first += PER_GUEST)); do
    drives=() volumes=() names=()
    for ((i = first; i < first + PER_GUEST && i <= CUTS; i++)); do
        drives+=(-drive "file=$T/cuts/$i,format=raw,if=virtio")
        volumes+=(--volume "vd${letters[i - first]}:/cuts/$i:rw")
        names+=("$i")
    done
    boot -- "${drives[@]}"
    check "75: cuts $first and up: the next boot mounts them" configure "$APPS/files" main:app "${volumes[@]}"
    checks_from "$PYTHON" -B "$TESTS/powercut.py" compare "$SOCK" "$T/cuts" "${names[@]}"
    check "75: cuts $first and up: halts" halt
    check "75: cuts $first and up: clean after it" are_clean "${names[@]}"
done

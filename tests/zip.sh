#!/usr/bin/env bash
# Archives, in namespaces: items 52 to 58 of the list of bad inputs and threat T7. Each evil
# archive is refused whole, with a reason and without a trace; then a good one still works.
. "$(dirname "$0")/lib.sh"

peer() { PYTHONDONTWRITEBYTECODE=1 "$PYTHON" "$TESTS/zip_peer.py" "$SOCK" "$@"; }

ns_start
GOOD=(shell 'echo hello')
baseline
for item in 52 53 54 55 56 57 58; do
    checks_from peer "$item"
    guest_ok "after $item"
done
checks_from peer accept deflate
check_eq 'after all refusals a program answers' good "$(request /)"

for case in stored zip64 descriptor-64 duplicates links executable; do
    ns_start
    checks_from peer accept "$case"
    check_match "$case: it is in /data" '^[1-9]' "$(shell 'find /data -mindepth 1 | grep -c .')"
done

#!/usr/bin/env bash
# How soon after the kernel has started /sbin/init a guest says that it is ready. Runs alone: it
# measures time.
. "$(dirname "$0")/lib.sh"

READY=()                            # tenths of a millisecond, of every boot

# The timeline's rows as `MILLISECONDS-SINCE-INIT MILLISECONDS NAME`.
timeline() { sed -nE 's/.* boot: +[0-9.]+ +([0-9.]+) +([0-9.]+)  (.*)/\1 \2 \3/p' "$CONSOLE" | tr -d '\r'; }
has_timeline() { timeline | grep -q 'ready said'; }

# From the start of init to ready, without what loading modules took.
note_ready() {
    wait_for 10 has_timeline || die 'no boot timeline in the console'
    READY+=("$(timeline | awk '$3 == "modules" { m += $2 } /ready said/ { printf "%d", ($1 - m) * 10 }')")
    timeline | awk '{ printf "%s%s %s", (NR > 1 ? ", " : "   stages in ms: "), substr($0, index($0, $3)), $2 }
        END { print "" }'
}

for modules in initramfs root initramfs root initramfs; do
    boot agent.log=debug guest.modules=$modules
    note_ready
done
MEDIAN=$(printf '%s\n' "${READY[@]}" | sort -n | sed -n 3p)
check_at_most "ready after init started, median of ${READY[*]}, in tenths of a ms" 600 "$MEDIAN"

#!/usr/bin/env bash
# input_data and output_data in namespaces: shortcoming 10 of the two scripts, and what a
# program can leave in /data.
. "$(dirname "$0")/lib.sh"

# peer CASE…: each, then the standing rule.
peer() {
    local case
    for case; do
        checks_from "$PYTHON" -B "$TESTS/data_peer.py" "$SOCK" "$case"
        [ "$case" = configure ] || guest_ok "after $case"
    done
}

# The number of the last process; the command that asks is one.
last_process() { shell 'cat /proc/loadavg' | awk '{ print $5 }'; }

GOOD=(request /)
ns_start --limit reply_bytes=4194304 --limit zip_entries=2000
peer configure
baseline
peer unchanged changes unfit at_once hung_up too_large cost too_many

ns_start --limit data_ms=200
peer configure
baseline
peer too_slow

ns_start
checks_from "$PYTHON" -B "$TESTS/data_peer.py" "$SOCK" executable

ns_start
check 'data: without /data: configured' configure "$APPS/files" main:app
first=$(last_process)
second=$(last_process)
for i in {1..20}; do request / >/dev/null; done
check_eq '10: without /data 20 requests cost no process' $((second - first)) $(($(last_process) - second))

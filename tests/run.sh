#!/usr/bin/env bash
# Runs the unit tests and tests/*.sh: what holds before a change lands, or the full matrix
# (tests/run.sh all), or those named (tests/run.sh http zip). Guests run the release. Scripts
# that need no guest run with the sanitizer build; named, or in the full matrix, with the
# release as well. Some scripts at a time, except those that measure time. Failures come with
# what their script printed; the last line is `N passed, N failed`.
set -euo pipefail

cd "$(dirname "$0")/.."
. runtimes/guest.sh

LOGS=$(mktemp -d /tmp/tests.XXXXXX)
trap 'rm -rf "$LOGS"' EXIT
trap 'exit 130' INT TERM

# Not a test, or with a home of their own above.
is_test() { [[ $1 != lib && $1 != run ]]; }
is_for_guests() { grep -qsE '^[^#]*\b(boot|start_guest|new_guest)\b' "tests/$1.sh"; }
needs_no_guest() { grep -qsE '^[^#]*(\bns_start\b|"\$AGENT" (run|hash)\b)' "tests/$1.sh"; }
# What the head of a script says of it: that it disturbs others, or minds being disturbed; that
# it takes long for what it adds.
head_says() { sed '/^[^#]/q' "tests/$1.sh" 2>/dev/null | grep -q "$2"; }
runs_alone() { head_says "$1" 'Runs alone'; }
is_for_matrix() { head_says "$1" 'Full matrix'; }

seconds_for() {
    case $1 in
    build | fuzz | halt | hosts | node | volumes) echo 900 ;;
    check | runtimes) echo 3600 ;;
    *) echo 700 ;;
    esac
}

# run_script LABEL COMMAND…: what it prints goes to a log, with a line more when it dies
# without having said why.
run_script() {
    local label=$1 log=$LOGS/$1.log status=0 start=$SECONDS
    shift
    timeout -k 10 "$(seconds_for "${label%% *}")" "$@" >"$log" 2>&1 </dev/null || status=$?
    if [ "$status" != 0 ] && ! grep -q '^FAIL ' "$log"; then
        echo "FAIL $label: ended with status $status" >>"$log"
    elif [ "$status" = 0 ] && ! grep -q '^ok ' "$log"; then
        echo "FAIL $label: made no check" >>"$log"
    fi
    if grep -q '^FAIL ' "$log"; then
        printf '%s\n' "-- $label ($((SECONDS - start)) s)" "$(cat "$log")"
    else
        echo "-- $label ($((SECONDS - start)) s): $(grep -c '^ok ' "$log") ok"
    fi
}

# The image that the guests boot, made beside the scripts that need none. A failed guest is a
# failure of every script that needs one, and is said once, loudly.
make_guests() {
    if (guest_image debian-12-test) >"$LOGS/guests.log" 2>&1; then
        echo yes >"$LOGS/guests"
        [[ " $* " != *' hosts '* ]] || (guest_image debian-12-distribution) >>"$LOGS/guests.log" 2>&1 || true
        return
    fi
    cat "$LOGS/guests.log"
    echo '!!!! NO GUEST CAN BE BOOTED HERE: every test that needs one counts as failed !!!!'
    echo 'FAIL guests: cannot be booted' >>"$LOGS/guests.log"
    echo no >"$LOGS/guests"
}

guests_work() {
    until [ -s "$LOGS/guests" ]; do sleep 0.5; done
    [ "$(cat "$LOGS/guests")" = yes ]
}

JOBS=3                              # they wait as much as they work
GUESTS=''                           # yes: some script needs one
LONGEST='build boot programs volumes guest_init executables'    # first, or one is left at the end

# Some at a time, then those that run alone.
run_all() {
    local name alone=() running=0
    for name; do
        if runs_alone "$name"; then
            alone+=("$name")
            continue
        fi
        if [ "$running" = "$JOBS" ]; then
            wait -n || true
            running=$((JOBS - 1))
        fi
        run_one "$name" &
        running=$((running + 1))
    done
    wait
    for name in "${alone[@]}"; do
        run_one "$name"
    done
}

# One script, and what else its name stands for.
run_one() {
    local name=$1
    if [ "$name" = unit ]; then
        run_script unit out/debug/unit
    elif is_for_guests "$name" && ! guests_work; then
        echo "FAIL $name: no guest can be booted" >"$LOGS/$name.log"
    elif is_for_guests "$name" || ! needs_no_guest "$name" || [ ! -x out/debug/agent ]; then
        run_script "$name" bash "tests/$name.sh"
    else
        [ "$WHAT" = usual ] || run_script "$name" bash "tests/$name.sh"
        AGENT=out/debug/agent run_script "$name (sanitizers)" bash "tests/$name.sh"
    fi
}

main() {
    local names=("$@") name file chosen=()
    WHAT=named
    if [ $# = 0 ] || [ "$*" = all ]; then
        WHAT=${1:-usual}
        names=($LONGEST)
        [ ! -x out/debug/unit ] || names+=(unit)
        for file in tests/*.sh; do
            name=${file##*/} name=${name%.sh}
            [[ " $LONGEST " == *" $name "* ]] || { [ "$WHAT" = usual ] && is_for_matrix "$name"; } || names+=("$name")
        done
    fi
    for name in "${names[@]}"; do
        name=${name##*/} name=${name%.sh}
        ! is_test "$name" || chosen+=("$name")
        ! is_for_guests "$name" || GUESTS=yes
    done
    [ -z "$GUESTS" ] || make_guests "${chosen[@]}" &
    run_all "${chosen[@]}"
    summary
}

summary() {
    local passed failed
    passed=$(cat "$LOGS"/*.log | grep -c '^ok ' || true)
    failed=$(cat "$LOGS"/*.log | grep -c '^FAIL ' || true)
    if [ "$failed" != 0 ]; then
        echo
        grep -h '^FAIL ' "$LOGS"/*.log
    fi
    [ "$passed" != 0 ] || [ "$failed" != 0 ] || { echo 'no test ran'; failed=1; }
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ]
}

main "$@"

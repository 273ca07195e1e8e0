#!/usr/bin/env bash
# Every fuzz target for half a minute (FUZZ_SECONDS), on what it found before and from its own
# seeds; `./build.sh fuzz NAME SECONDS` runs one for longer. Full matrix: the agent is compiled
# for each.
TEST_SECONDS=${TEST_SECONDS:-900}
. "$(dirname "$0")/lib.sh"

SECONDS_EACH=${FUZZ_SECONDS:-30}

# What a target says when it fails: its demand, the sanitizer's report, and the input.
fuzz_report() {
    grep -aE -A 12 '^fuzz|ERROR: |runtime error: ' "$T/fuzz.log" | head -n 40
    grep -aE 'Test unit written to|^Base64: ' "$T/fuzz.log" || tail -n 5 "$T/fuzz.log"
}

fuzz() {
    local name=$1 runs
    if ! "$GUEST_ROOT/build.sh" fuzz "$name" "$SECONDS_EACH" >"$T/fuzz.log" 2>&1; then
        fail "fuzz $name" "$(fuzz_report)"
        return
    fi
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$T/fuzz.log")
    check "fuzz $name (${runs:-no} runs)" test "${runs:-0}" -gt 100
}

for target in "$TESTS"/fuzz_*.c; do
    target=${target##*/fuzz_}
    fuzz "${target%.c}"
done

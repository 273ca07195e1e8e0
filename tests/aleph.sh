#!/usr/bin/env bash
# The supervisor's wire in namespaces, driven by tests/aleph_peer.py: threat T1 and items 36 to
# 51 and 81 of the list of bad inputs, and what good input must give. After each item the
# standing rule holds.
. "$(dirname "$0")/lib.sh"

need iproute2 >&2

peer() { checks_from "$PYTHON" -B "$TESTS/aleph_peer.py" "$SOCK" "$@"; }

# item NAME…: each, then the standing rule.
item() {
    local name
    for name; do
        peer "$name"
        guest_ok "after $name"
    done
}

in_guest() { nsenter -t "$PID1" --mount --net --uts -- "$@"; }
applied() { in_guest sh -c 'hostname; cat /etc/resolv.conf /etc/hosts; ip -o addr show eth0; ip route; ip -6 route; ls /opt; ls -d /data/*' 2>&1 || true; }
lines_with() { grep -c "$1" "$CONSOLE" || true; }

not_configured() {
    GOOD=(shell 'echo hello')
    baseline
    item item_not_configured item36 item37
    local before lines
    before=$(pid1_kib VmHWM)
    peer item38
    is_sanitized || check_at_most '38: nothing was allocated, KiB more at the peak' 256 $(($(pid1_kib VmHWM) - before))
    guest_ok 'after item38'
    item item39 item40 item41 item42
    assert_console_has '40: an unknown key is logged' 'unknown key "unknown_ext" ignored'
    item item43 item47_errors split_conf threat1 hangups same_size
    undo
    lines=$(lines_with 'refused: no byte within')
    peer silent
    is_sanitized || wait_for 3 memory_is_back || true
    guest_ok 'after silent'
    check_at_most 'silent connections: lines in the log' 2 $(($(lines_with 'refused: no byte within') - lines))
}

# 43: what a failed configuration applied is taken back.
undo() {
    check '43: a NIC to configure' nsenter -t "$PID1" --net -- ip link add eth0 type veth peer name eth0-peer
    local before after
    before=$(applied)
    peer undone
    after=$(applied)
    check_eq '43: a half applied configuration is undone' "$before" "$after"
    refused '43: a gateway that the kernel refuses' 1 'network: ipv6_gateway: Invalid argument' \
        configure "$APPS/hello" main:app --hash beef --dns 192.0.2.53 --ip 192.0.2.7 --route 192.0.2.1 \
        --ipv6 2001:db8::7/64 --ipv6-gateway ff02::1
    check_eq '43: what came before it is undone' "$before" "$(applied)"
    guest_ok 'after undone'
}

configured() {
    peer configure
    check_eq '42: LD_PRELOAD does not reach pid 1' '' "$(tr '\0' '\n' <"/proc/$PID1/environ" | grep LD_PRELOAD || true)"
    GOOD=(request /good)
    baseline
    item item44 item45 item46 item49 item50 item51 item81 headers_rebuilt concurrency large events failures threat1
}

ns_start --limit head_ms=1500 --limit silent_ms=6000 --limit reply_bytes=8388608
not_configured
configured
peer halt_split
check 'halt ends init' wait_for 6 is_gone "$NS_PID"

ns_start --limit command_ms=4000 --limit command_out_bytes=16777216 --limit commands=4 --limit conns=32
GOOD=(shell 'echo hello')
baseline
item crowd item48
shell 'rm -f /bin/sh /usr/bin/sh'
peer item48_no_shell
peer halt_plain
check '47: halt ends init' wait_for 6 is_gone "$NS_PID"

ns_start
peer halt_line
check '47: halt and a newline ends init' wait_for 6 is_gone "$NS_PID"

ns_start
peer halt_bytes
check '47: halt byte by byte ends init' wait_for 6 is_gone "$NS_PID"

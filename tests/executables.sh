#!/usr/bin/env bash
# What people really run as an executable, in real guests: scripts, Node, static binaries.
. "$(dirname "$0")/lib.sh"

need squashfs-tools

# Over both fronts: both NAME EXPECTED PATH
both() {
    check_eq "$1, port 52" "$2" "$(request "$3")"
    check_eq "$1, port 80" "$2" "$(http "$3")"
}

# ---- From a disk: a script, and what it becomes ---------------------------------------------

# become COMMAND REGEX: the program ends and comes back as another, which answers so.
become() {
    shell "echo '$1' >/tmp/program; kill \$(cat /sys/fs/cgroup/program/cgroup.procs)"
    check "$1: comes up" wait_for 20 eval 'http / -i | grep -qE "'"$2"'"'
}

numbers() { seq -f %05g -s '' 0 999; }

node_http() {
    both 'node http' 'node GET /x?a=%26%2B+x&b 0' '/x?a=%26%2B+x&b'
    head -c 3000000 /dev/zero >"$T/body"
    check_eq 'node http: a 3 MB body, port 52' 'node POST /body 3000000' "$(request -X POST -d "@$T/body" /body)"
    check_eq 'node http: a 3 MB body, port 80' 'node POST /body 3000000' "$(http /body --data-binary "@$T/body")"
    both 'node http: 1,000 chunks' "$(numbers)" /stream
    check_eq 'node http: both cookies' 2 "$(http / -i | grep -c '^Set-Cookie: [ab]=')"
    GOOD=(http /good)
    baseline
    guest_ok 'node http: well afterwards'
}

python_http() {
    become 'python3 serve.py' 'http\.js'
    check_match 'python http.server: a file, port 80' '^exec ' "$(http /run.sh)"
    check_match 'python http.server: a file, port 52' '^exec ' "$(request /run.sh)"
    check_match 'python http.server: a listing' 'websocket\.py' "$(http /)"
    check_match 'python http.server: nothing there' '^HTTP/1.1 404 ' "$(http /nowhere -i)"
    check_eq 'python http.server: a body' 'python took 3000000' "$(http / --data-binary "@$T/body")"
    GOOD=(http /serve.py)
    baseline
    guest_ok 'python http.server: well afterwards'
}

websocket() {
    become 'python3 websocket.py' '^HTTP/1.1 426 '
    check_eq 'websocket: a plain request is answered by the program' 426 "$(http / -o /dev/null -w '%{http_code}')"
    checks_from env PYTHONDONTWRITEBYTECODE=1 timeout 60 "$PYTHON" "$TESTS/proxy_websocket.py" "$SOCK"
}

from_disk() {
    local start
    mksquashfs "$APPS/executables" "$T/code" -quiet -no-progress -all-root >"$T/mksquashfs"
    mkdir "$T/exits"
    printf '#!/bin/sh\necho no database >&2\nexit 7\n' >"$T/exits/run.sh"
    boot agent.limit.backoff_max_ms=200 agent.limit.exec_wait_ms=4000 -- -drive "file=$T/code,format=raw,if=virtio,readonly=on"
    refused 'a program that exits at once: its exit code is told' 1 'exited with exit code 7' executable "$T/exits" run.sh
    refused 'a program that exits at once: its output is told' 1 'no database' executable "$T/exits" run.sh
    start=$(ms)
    check 'squashfs: a program that takes 10 s to listen is configured' executable - run.sh --encoding squashfs
    check_at_most 'a program that takes 10 s to listen is configured before, ms' 9500 $(($(ms) - start))
    both 'a program that takes 10 s to listen: requests wait' 'node GET /x 0' /x
    check 'a program that takes 10 s to listen: they did wait' test $(($(ms) - start)) -ge 9900
    node_http
    python_http
    websocket
    check 'squashfs: halts' halt
}

# ---- One file ------------------------------------------------------------------------------

static_c() {
    gcc -O2 -static -o "$T/static" "$GUEST_ROOT/runtimes/conformance/server.c"
    boot
    check 'static binary of C as plain code: configured' executable "$T/static" server
    both 'static binary of C' 'static C: GET /x?y HTTP/1.1' '/x?y'
    GOOD=(http /)
    baseline
    guest_ok 'static binary of C: well afterwards'
}

from_disk
static_c

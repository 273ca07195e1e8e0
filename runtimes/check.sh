#!/usr/bin/env bash
# check.sh IMAGE - boots an image and looks whether its init does what a host may expect of a
# runtime: ./build.sh check IMAGE. Prints a table; exit code 1 if something fails. Any init will
# do that speaks the wire of port 52, and any root file system that the guests' kernel can mount.
set -euo pipefail
cd "$(dirname "$0")/.."
IMAGE=$(realpath "${1:?usage: ./build.sh check IMAGE}")
. runtimes/guest.sh

[ -f "$IMAGE" ] || die "$IMAGE is no file"
MODULES_MORE='ext4 crc32c_generic btrfs'       # of the root, or of a volume, before init runs
GUEST_IMAGE=$IMAGE
READY_S=${CHECK_READY_S:-90}
STARTED=''

CHECK=$(mktemp -d /tmp/check.XXXXXX)
trap 'trap "" TERM; guest_stop; rm -rf "$CHECK"' EXIT
trap 'exit 130' INT TERM

ROWS='ready configuration executable volumes asgi event wsgi node halt'
declare -A RESULT=() DETAIL=()

# row NAME RESULT DETAIL: the first failure of a row stays.
row() {
    [ "${RESULT[$1]-}" != FAIL ] || return 0
    RESULT[$1]=$2 DETAIL[$1]=${3%%$'\n'*}
}

# expect ROW WHAT EXPECTED COMMAND…: what the command prints is that.
expect() {
    local name=$1 what=$2 expected=$3 got status=0
    shift 3
    got=$("$@" 2>&1) || status=$?
    if [ "$status" = 0 ] && [ "$got" = "$expected" ]; then
        row "$name" ok "$what"
    else
        row "$name" FAIL "$what: expected ${expected:0:60}, got ${got:0:200}"
        return 1
    fi
}

# fails ROW WHAT REGEX COMMAND…: it fails, and says why.
fails() {
    local name=$1 what=$2 regex=$3 got
    shift 3
    if got=$("$@" 2>&1); then
        row "$name" FAIL "$what: taken for good"
    elif ! grep -qE "$regex" <<<"$got"; then
        row "$name" FAIL "$what: no such reason: ${got:0:200}"
    else
        row "$name" ok "$what"
    fi
}

call() { timeout 100 "$AGENT" call "$GUEST/v.sock" "$@"; }
ms() { date +%s%3N; }

# start [QEMU ARGUMENT…]: up to ready.
start() {
    local before ready
    guest_stop
    STARTED=yes
    GUEST=$CHECK/$((++BOOTS))
    mkdir "$GUEST"
    say "boot $BOOTS"
    spawn "$GUEST/ready" "$AGENT" call "$GUEST/v.sock" ready --timeout "$READY_S"
    ready=$SPAWNED
    before=$(ms)
    if ! guest_boot -- "$@"; then
        row ready FAIL "the kernel does not boot: $(tail -n 1 "$GUEST/qemu.log")"
        STARTED=''
    fi
    wait_for "$READY_S" is_any_gone "$ready" "$GUEST_QEMU_PID" || true
    if is_gone "$ready" && wait "$ready"; then
        row ready ok "$(cat "$GUEST/ready"), $(($(ms) - before)) ms after the machine was started"
    else
        row ready FAIL "no message on port 52 within $READY_S s; its console ends with: $(tail -n 3 "$GUEST/console" | tr -d '\r' | tr '\n' '|')"
        STARTED=''
    fi
    unspawn "$ready"
    [ -n "$STARTED" ]
}
BOOTS=0

# configured ROW ARGUMENT…
configured() {
    local name=$1 got
    shift
    got=$(call configure "$@" 2>&1) || { row "$name" FAIL "its configuration: $got"; return 1; }
}

# has PATH: in the guest, as its executable sees it.
has() { call request -i "/file$1" >"$CHECK/has" 2>&1 && grep -aqm 1 '200' <(head -n 1 "$CHECK/has"); }

make_programs() {
    mkdir "$CHECK/executable" "$CHECK/squash"
    gcc -O2 -static -o "$CHECK/executable/server" runtimes/conformance/server.c
    echo "on a squashfs" >"$CHECK/squash/known"
    mksquashfs "$CHECK/squash" "$CHECK/ro.squashfs" -quiet -no-progress >/dev/null
    truncate -s 16M "$CHECK/rw.ext4"
    mke2fs -q -t ext4 "$CHECK/rw.ext4"
    head -c 3000000 /dev/urandom | base64 -w 0 >"$CHECK/body"
}

disk() { echo "-drive file=$1,format=raw,if=none,id=$2 -device virtio-blk-pci,drive=$2"; }

# ---- The boots ---------------------------------------------------------------------------------

PYTHON3=yes NODE=yes                # until the executable has looked

executable_boot() {
    start $(disk "$CHECK/ro.squashfs",readonly=on ro) $(disk "$CHECK/rw.ext4" rw) || return 0
    fails configuration 'a program that is not there is refused, and another may follow' . \
        call configure "$CHECK/executable" missing --interface executable
    if ! configured configuration "$CHECK/executable" server --interface executable \
        --volume vdb:/mnt/ro --volume vdc:/mnt/rw:rw; then
        row executable FAIL 'not configured'
        row volumes FAIL 'not configured'
        return
    fi
    expect executable 'a static program answers' 'static C: GET / HTTP/1.1' call request / || return 0
    expect volumes 'squashfs is read' 'on a squashfs' call request /file/mnt/ro/known || true
    expect volumes 'ext4 is written' written call request -d 'kept' /file/mnt/rw/kept || true
    has /usr/bin/python3 || has /usr/local/bin/python3 || PYTHON3=''
    has /usr/bin/node || has /usr/local/bin/node || NODE=''
    halt_check
    volume_check
}

halt_check() {
    local before
    before=$(ms)
    if ! call halt >"$CHECK/halt" 2>&1; then
        row halt FAIL "$(cat "$CHECK/halt")"
    elif ! wait_for 10 is_gone "$GUEST_QEMU_PID"; then
        row halt FAIL 'the machine runs on'
    else
        row halt ok "answered, and the machine was off after $(($(ms) - before)) ms"
    fi
    guest_stop
}

volume_check() {
    local kept
    kept=$(debugfs -R 'cat /kept' "$CHECK/rw.ext4" 2>/dev/null)
    [ "$kept" = kept ] || row volumes FAIL 'what was written is not there after halt'
    e2fsck -fn "$CHECK/rw.ext4" >"$CHECK/fsck" 2>&1 || row volumes FAIL "not clean after halt: $(tail -n 1 "$CHECK/fsck")"
    row volumes ok 'squashfs read, ext4 written, there and clean after halt'
}

python_boots() {
    if [ -z "$PYTHON3" ]; then
        row asgi - 'no python3 in the image'
        row event - 'no python3 in the image'
        row wsgi - 'no python3 in the image'
        return
    fi
    start || return 0
    fails configuration 'a module that does not load is refused, and another may follow' 'not_there' \
        call configure runtimes/conformance not_there:app
    if configured asgi runtimes/conformance main:app; then
        expect asgi 'path, query, a body of 4 MB' \
            "{\"method\": \"POST\", \"path\": \"/a b\", \"query\": \"c=%26&d\", \"sha256\": \"$(sha256sum <"$CHECK/body" | cut -d ' ' -f 1)\"}" \
            call request -d "@$CHECK/body" '/a%20b?c=%26&d' || true
        expect event 'aleph.message is answered' '{"heard": "hello"}' call event --text hello || true
    else
        row event FAIL 'not configured'
    fi
    start || return 0
    ! configured wsgi runtimes/conformance main:wsgi ||
        expect wsgi 'path and query' 'wsgi /x?y=z' call request '/x?y=z' || true
}

node_boot() {
    if [ -z "$NODE" ]; then
        row node - 'no node in the image'
        return
    fi
    start || return 0
    ! configured node runtimes/conformance server.js || expect node 'GET' 'node GET /x?y' call request '/x?y' || true
}

table() {
    local name passed=0 failed=0
    echo
    for name in $ROWS; do
        case ${RESULT[$name]-} in
        ok) passed=$((passed + 1)) ;;
        FAIL) failed=$((failed + 1)) ;;
        -) ;;
        *) failed=$((failed + 1)) RESULT[$name]=FAIL DETAIL[$name]='was not reached' ;;
        esac
        printf '%-14s %-5s %s\n' "$name" "${RESULT[$name]}" "${DETAIL[$name]}"
    done
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ]
}

need gcc libc6-dev squashfs-tools
guest_need
make_programs
executable_boot
python_boots
node_boot
guest_stop
table

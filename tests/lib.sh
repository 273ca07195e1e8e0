# lib.sh - what every test script starts with:
#
#     . "$(dirname "$0")/lib.sh"
#     boot                                      # a guest that has said ready; or: ns_start
#     configure "$APPS/hello" main:app
#     check_eq 'hello: answers' hello "$(request /)"
#     guest_ok 'hello: well afterwards'
#
# A script prints one line per check, `ok NAME` or `FAIL NAME: why`, and exits with 0 when
# all are ok. It runs alone, for TEST_SECONDS at most, in a temporary folder $T that goes
# with it, and so do all the processes that it started. A failed check does not end the
# script; any other command that fails does, and counts as a failed check.
#
# Where things run is the script's choice: `boot` is a real guest, `ns_start` the agent's
# init in namespaces of this machine, faster and also for the sanitizer build
# (AGENT=out/debug/agent). Both set SOCK, so call, configure, request, event, shell, halt,
# http, pid1_kib and guest_ok mean the same in either.

set -euo pipefail

if [ -z "${TEST_UNDER_TIMEOUT-}" ]; then
    TEST_UNDER_TIMEOUT=1 exec timeout -k 10 "${TEST_SECONDS:-600}" bash "$0" "$@"
fi
unset TEST_UNDER_TIMEOUT

. "$(dirname "${BASH_SOURCE[0]}")/../runtimes/guest.sh"

need coreutils curl mount python3 python3-msgpack util-linux >&2

PYTHON=/usr/bin/python3             # Debian's: it has the msgpack package
TESTS=$GUEST_ROOT/tests
APPS=$TESTS/apps
TEST_NAME=$(basename "$0" .sh)
TEST_IMAGE=${TEST_IMAGE:-debian-12-test}
T=$(mktemp -d /tmp/t.XXXXXX)        # short: socket addresses have 107 bytes
CHECKS=0 FAILED=0 STARTS=0
SOCK='' HTTP='' CONSOLE='' PID1='' BASELINE_KIB=''
GUEST_QEMU_PID='' GUEST_VSOCK_PID='' NS_PID='' NS_PREPARE='' HTTP_PID='' READY_PID=''

# Also when a signal ends it: without a trap of its own, bash does not wait for the command
# that it runs.
trap lib_end EXIT

[ -x "$AGENT" ] || die "$AGENT is not there: ./build.sh makes it"
if [[ $AGENT == *debug/* ]]; then SANITIZED=yes; else SANITIZED=''; fi
# A copy, so that a build meanwhile does not disturb.
cp "$AGENT" "$T/agent"
AGENT=$T/agent

# ---- Checks -------------------------------------------------------------------------------

pass() {
    CHECKS=$((CHECKS + 1))
    echo "ok $1"
}

# fail NAME WHY…: the first line of why goes beside the name, the rest below.
fail() {
    local name=$1 why
    shift
    why=$(head -c 4000 <<<"$*")
    CHECKS=$((CHECKS + 1)) FAILED=$((FAILED + 1))
    echo "FAIL $name: ${why%%$'\n'*}"
    [ "$why" = "${why%%$'\n'*}" ] || sed 's/^/    /' <<<"${why#*$'\n'}"
}

# check NAME COMMAND…: the command succeeds; what a failing one prints is why.
check() {
    local name=$1 status=0
    shift
    "$@" >"$T/check.out" 2>&1 || status=$?
    if [ "$status" = 0 ]; then
        pass "$name"
    else
        fail "$name" "status $status of $*"$'\n'"$(tail -n 20 "$T/check.out")"
    fi
}

# check_eq NAME EXPECTED ACTUAL
check_eq() {
    if [ "$2" = "$3" ]; then
        pass "$1"
    else
        fail "$1" "expected $(printf %q "$2" | head -c 500), got $(printf %q "$3" | head -c 500)"
    fi
}

# check_match NAME REGEX ACTUAL: an extended regular expression, for some line of ACTUAL.
check_match() {
    if grep -qE -e "$2" <<<"$3"; then
        pass "$1"
    else
        fail "$1" "nothing matches $2 in: $(head -c 1000 <<<"$3")"
    fi
}

# check_at_most NAME LIMIT ACTUAL: whole numbers.
check_at_most() {
    if [[ $3 =~ ^[0-9]+$ ]] && [ "$3" -le "$2" ]; then
        pass "$1 ($3)"
    else
        fail "$1" "$3 is not at most $2"
    fi
}

# refused NAME STATUS REGEX COMMAND…: the command ends with that status and prints that.
refused() {
    local name=$1 expected=$2 regex=$3 status=0
    shift 3
    "$@" >"$T/check.out" 2>&1 || status=$?
    if [ "$status" != "$expected" ]; then
        fail "$name" "status $status, not $expected: $(tail -n 5 "$T/check.out")"
    else
        check_match "$name" "$regex" "$(cat "$T/check.out")"
    fi
}

# checks_from COMMAND…: a program that makes checks of its own and prints one line for each, as
# this script does.
checks_from() {
    local line status=0
    "$@" >"$T/checks" 2>"$T/checks.err" || status=$?
    while IFS= read -r line; do
        case $line in
        'ok '*) pass "${line#ok }" ;;
        'FAIL '*)
            line=${line#FAIL }
            fail "${line%%: *}" "${line#*: }"
            ;;
        *) fail "$TEST_NAME: prints checks only" "$line" ;;
        esac
    done <"$T/checks"
    [ "$status" = 0 ] || fail "$TEST_NAME: ${*: -1}" "status $status"$'\n'"$(tail -n 5 "$T/checks.err")"
}

# not COMMAND…: succeeds when the command fails.
not() { ! "$@"; }

ms() { date +%s%3N; }

# ---- The release ------------------------------------------------------------------------

# check_release NAME FILE MACHINE KIB: as build.sh promises it to be.
check_release() {
    check "$1: static $3" is_static "$2" "$3"
    check "$1: stripped" is_stripped "$2"
    check "$1: no memory both writable and executable" has_no_writable_code "$2"
    check "$1: no path of this machine inside" names_no_folder "$2"
    check_at_most "$1: bytes" $(($4 << 10)) "$(stat -c %s "$2")"
}

is_static() {
    readelf -h "$1" | grep -q "Machine: .*$2" || { echo "not $2"; return 1; }
    readelf -h "$1" | grep -q 'EXEC' || { echo "not a plain executable"; return 1; }
    ! readelf -lW "$1" | grep -E 'INTERP|DYNAMIC'
}

is_stripped() { ! readelf -SW "$1" | grep -E 'symtab|debug'; }
has_no_writable_code() { ! readelf -lW "$1" | grep -E 'RWE|GNU_STACK.*E '; }
names_no_folder() { ! grep -aoE "$GUEST_ROOT|/usr/(lib|include|[a-z0-9_]*-linux-gnu)/[a-z]*" "$1"; }

# ---- Certificates ------------------------------------------------------------------------

# All in the folder $CERTS.
# authority NAME: its own key and certificate; issue NAME AUTHORITY SUBJECT USE KEY…: a key and its
# certificate, with that of the authority in NAME.chain.
authority() {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/CN=$1" \
        -keyout "$CERTS/$1.key" -out "$CERTS/$1.pem" 2>/dev/null
}

issue() {
    local name=$1 by=$2 subject=$3 use=$4
    shift 4
    openssl req -newkey "$@" -nodes -subj "$subject" -keyout "$CERTS/$name.key" -out "$CERTS/$name.csr" 2>/dev/null
    openssl x509 -req -in "$CERTS/$name.csr" -CA "$CERTS/$by.pem" -CAkey "$CERTS/$by.key" -CAcreateserial -days 2 \
        -extfile <(printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=%s\n' "$use") \
        -out "$CERTS/$name.pem" 2>/dev/null
    cat "$CERTS/$name.pem" "$CERTS/$by.pem" >"$CERTS/$name.chain"
}

# ---- Guests -------------------------------------------------------------------------------

# boot [KERNEL ARGUMENT…] [-- QEMU ARGUMENT…]: a guest with the agent as its init, up to its
# ready message, which is then in $GUEST/ready. It ends the one before. Not for a subshell.
boot() {
    new_guest
    hear_ready "$SOCK"
    run_guest "$@"
    await_ready 120
}

# start_guest, with the same arguments: nobody listens for ready, nothing is waited for.
start_guest() {
    new_guest
    run_guest "$@"
}

# Arguments for `boot --` that give the guest an eth0, which leads nowhere.
GUEST_NIC='-netdev user,id=net,restrict=on -device virtio-net-pci,netdev=net,romfile='

# initramfs PATH MODULE…: nothing but the agent as /init and kernel modules.
initramfs() {
    local path=$1 tree=$1.tree
    shift
    mkdir -p "$tree"
    cp "$AGENT" "$tree/init"
    [ $# = 0 ] || guest_pick_modules "$GUEST_KERNEL" "$tree" "$@"
    (cd "$tree" && find . | cpio -o -H newc --quiet -R 0:0) >"$path"
    rm -r "$tree"
}

# overriding_initramfs PATH MODULES: the usual one with an init of the script's own, whose lines
# after the mount of /dev/vda on /root come from standard input; $bb is busybox.
overriding_initramfs() {
    mkdir "$T/initramfs"
    {
        echo '#!/bin/busybox sh'
        echo "modules='$2'"
        cat <<'INIT'
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t devtmpfs dev /dev
$bb modprobe -a $modules
echo "guest: modules loaded"
until [ -b /dev/vda ]; do $bb usleep 5000; done
$bb mount -o ro /dev/vda /root
INIT
        cat
    } >"$T/initramfs/init"
    chmod 755 "$T/initramfs/init"
    guest_initramfs_over "$T/initramfs" "$1"
}

new_guest() {
    guest_image "$TEST_IMAGE" >&2
    new_folder
    SOCK=$GUEST/v.sock
}

run_guest() {
    if ! guest_boot "$@"; then
        fail "$TEST_NAME: the guest boots" "$(tail -n 5 "$GUEST/qemu.log")"
        exit 1
    fi
    start_forward
}

new_folder() {
    stop
    STARTS=$((STARTS + 1))
    GUEST=$T/$STARTS CONSOLE=$T/$STARTS/console
    mkdir "$GUEST"
}

# The program's HTTP as a Unix socket, from port 80 of the guest.
start_forward() {
    HTTP=$GUEST/http.sock
    spawn "$GUEST/forward.log" "$AGENT" forward --raw "unix:$HTTP" "hybrid:$SOCK:80"
    HTTP_PID=$SPAWNED
}

# hear_ready SOCKET: starts to listen for the ready message; await_ready SECONDS waits for it.
hear_ready() {
    spawn "$GUEST/ready" "$AGENT" call "$1" ready
    READY_PID=$SPAWNED
}

await_ready() {
    wait_for "$1" is_any_gone "$READY_PID" "${GUEST_QEMU_PID:-$NS_PID}" || true
    if is_alive "$READY_PID" || ! wait "$READY_PID"; then
        fail "$TEST_NAME: ready" "$(tail -q -n 20 "$GUEST/ready" "$CONSOLE" 2>/dev/null)"
        exit 1
    fi
    READY_PID=''
}

# Ends what runs. Consoles stay for the check at the end.
stop() {
    unspawn $HTTP_PID $READY_PID
    guest_stop
    [ -z "$NS_PID" ] || ns_stop
    HTTP_PID='' READY_PID='' SOCK='' HTTP='' BASELINE_KIB=''
}

# ---- Init in namespaces -------------------------------------------------------------------

# ns_start [OPTION of init…]: the agent as pid 1 of new namespaces, up to its ready message.
# Its root is this machine's, under an overlay: what it writes goes with it. It is told where
# to listen and where to say ready, so it never opens AF_VSOCK. NS_PREPARE is run in that root
# before.
ns_start() {
    [ "$(id -u)" = 0 ] || die 'namespaces need root'
    new_folder
    mkdir "$GUEST/root" "$GUEST/cgroup"
    cp "$AGENT" "$GUEST/agent"
    SOCK=unix:$GUEST/aleph.sock HTTP=$GUEST/http.sock
    hear_ready "unix:$GUEST/ready.sock"
    spawn "$CONSOLE" unshare --pid --mount --net --uts --ipc --fork --kill-child=KILL \
        bash -c "$(declare -f ns_enter ns_cgroup); NS_PREPARE=${NS_PREPARE@Q}; ns_enter \"\$@\"" - "$GUEST" "$@"
    NS_PID=$SPAWNED
    await_ready 20
    PID1=$(cat "/proc/$NS_PID/task/$NS_PID/children")
    PID1=${PID1% }
}

# In the new namespaces, as pid 1: makes the root and becomes the agent, which inherits
# nothing but its console.
ns_enter() {
    set -eu
    local folder=$1 root=$1/root/all node fd
    shift
    for fd in /proc/self/fd/*; do
        [ "${fd##*/}" -le 2 ] || eval "exec ${fd##*/}>&-"
    done
    mount -t cgroup2 cgroup2 "$folder/cgroup"
    mkdir "$folder/cgroup/$(ns_cgroup "$folder")"
    echo 0 >"$folder/cgroup/$(ns_cgroup "$folder")/cgroup.procs"
    umount "$folder/cgroup"
    mount -t tmpfs tmpfs "$folder/root"
    mkdir "$folder/root/upper" "$folder/root/work" "$root"
    mount -t overlay overlay "$root" \
        -o "lowerdir=/,upperdir=$folder/root/upper,workdir=$folder/root/work"
    mkdir -p "$root$folder"
    mount --bind "$folder" "$root$folder"
    mount -t proc proc "$root/proc"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    for node in null zero full random urandom tty; do
        : >"$root/dev/$node"
        mount --bind "/dev/$node" "$root/dev/$node"
    done
    mkdir -p "$root/dev/pts" "$root/dev/shm"
    cd "$root"
    [ -z "${NS_PREPARE-}" ] || eval "$NS_PREPARE"
    pivot_root . mnt
    umount -l /mnt
    exec unshare --cgroup "$folder/agent" init --listen "unix:$folder/aleph.sock" \
        --http "unix:$folder/http.sock" --ready "unix:$folder/ready.sock" "$@"
}

ns_cgroup() { echo "agent${1//\//-}"; }

ns_stop() {
    unspawn "$NS_PID"
    wait_for 5 is_gone "$PID1" || true
    unshare --mount bash -eu -c '
        mount -t cgroup2 cgroup2 "$1"
        for try in {1..30}; do
            find "$1/$2" -depth -type d -exec rmdir {} + 2>/dev/null && break
            sleep 0.1
        done' - "$GUEST/cgroup" "$(ns_cgroup "$GUEST")" || true
    NS_PID='' PID1=''
}

# ---- Talking to it ------------------------------------------------------------------------

call() { timeout 120 "$AGENT" call "$SOCK" "$@"; }
configure() { call configure "$@"; }
request() { call request "$@"; }
event() { call event "$@"; }
shell() { call shell "$@"; }

# http PATH [OPTION of curl…]: the HTTP front.
http() {
    local path=$1
    shift
    curl -sS --max-time 120 --unix-socket "$HTTP" "$@" "http://guest$path"
}

# Halts, and waits until the machine has ended.
halt() {
    call halt || return
    wait_for 6 is_gone "${GUEST_QEMU_PID:-$NS_PID}"
}

# executable DIR|FILE ENTRYPOINT [OPTION of configure…]
executable() { configure "$@" --interface executable; }

# upstream [OPTION of configure…]: the program apps/upstream, which does as it is told.
upstream() { executable "$APPS/upstream" server.py --env SIDE="$GUEST/side.sock" "$@"; }

# side JSON: what that program answers on its own channel; state EXPRESSION: what it has seen, as `it`.
side() {
    "$PYTHON" -c 'import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendall(sys.argv[2].encode() + b"\n")
sys.stdout.buffer.write(b"".join(iter(lambda: s.recv(65536), b"")))' "$GUEST/side.sock" "$1"
}

state() { side '{"state": true}' | "$PYTHON" -c 'import json, sys; print(eval(sys.argv[1], {"it": json.load(sys.stdin)}))' "$1"; }

# console_has REGEX [SECONDS]
console_has() { wait_for "${2:-5}" guest_console_has "$1"; }

# assert_console_has NAME REGEX
assert_console_has() {
    if console_has "$2"; then
        pass "$1"
    else
        fail "$1" "the console lacks $2"$'\n'"$(tail -n 20 "$CONSOLE")"
    fi
}

# ---- The standing rule ----------------------------------------------------------------------

# The good request of the standing rule; a script may set another.
GOOD=(request /)

# pid1_kib FIELD: of /proc/1/status, as RssAnon or VmHWM.
pid1_kib() {
    if [ -n "$NS_PID" ]; then
        cat "/proc/$PID1/status"
    else
        shell 'cat /proc/1/status'
    fi | awk -v field="$1:" '$1 == field { print $2 }'
}

# Takes the memory of pid 1 as the baseline that guest_ok compares with: when the program
# runs and has answered once. Without the pages of its file, which come the more of it has run.
baseline() {
    "${GOOD[@]}" >"$T/good"
    BASELINE_KIB=$(pid1_kib RssAnon)
}

# guest_ok NAME: the standing rule, after whatever was done to it: the process lives, the
# next good request is answered as before and in time, memory is back at the baseline, the
# kernel has not panicked. `baseline` comes first.
guest_ok() {
    local why
    if why=$(standing_rule 2>&1); then
        pass "$1"
    else
        fail "$1" "$why"$'\n'"$(tail -n 10 "$CONSOLE")"
    fi
}

standing_rule() {
    [ -n "$BASELINE_KIB" ] || { echo 'no baseline was taken'; return 1; }
    is_alive "${GUEST_QEMU_PID:-$NS_PID}" || { echo 'it has ended'; return 1; }
    good_in_time || return 1
    is_sanitized || wait_for 3 memory_is_back || { echo "RssAnon is $(pid1_kib RssAnon) KiB, was $BASELINE_KIB"; return 1; }
    ! guest_console_has "$BAD_CONSOLE" || { echo 'the console shows a crash'; return 1; }
}

# Every answer must be right; the fastest of some counts, as the machine has other work too.
good_in_time() {
    local limit=500 best=999999 try
    [ -z "$NS_PID" ] || is_sanitized || limit=100
    for try in {1..30}; do
        good_once || return 1
        [ "$TOOK" -ge "$best" ] || best=$TOOK
        [ "$best" -gt "$limit" ] || return 0
        sleep 0.1
    done
    echo "the next good request takes $best ms"
    return 1
}

# Sets TOOK, in ms. Of curl it is the request alone: on a busy machine most of the time goes
# by before curl has loaded its libraries.
good_once() {
    local start
    start=$(ms)
    if [ "${GOOD[0]}" = http ]; then
        "${GOOD[@]}" -w '%{stderr}%{time_total}' >"$T/good.now" 2>"$T/good.err" || { echo "the next good request fails: $(cat "$T/good.err")"; return 1; }
        TOOK=$(awk '{ print int($1 * 1000) }' "$T/good.err")
    else
        "${GOOD[@]}" >"$T/good.now" || { echo "the next good request fails: $(cat "$T/good.now")"; return 1; }
        TOOK=$(($(ms) - start))
    fi
    cmp -s "$T/good" "$T/good.now" || { echo "the next good request differs: $(head -c 500 "$T/good.now")"; return 1; }
}

memory_is_back() { [ "$(pid1_kib RssAnon)" -le $((BASELINE_KIB + 256)) ]; }

is_sanitized() { [ -n "$SANITIZED" ]; }

# ---- The end --------------------------------------------------------------------------------

BAD_CONSOLE='Kernel panic|BUG: |Oops: |ERROR: (Address|Leak)Sanitizer|runtime error: |Assertion .*failed'

lib_end() {
    local status=$? console before=$FAILED
    trap '' TERM INT
    set +e
    stop
    # What a signal has left behind of the command that it interrupted.
    kill $(cat /proc/$$/task/$$/children) 2>/dev/null
    for console in "$T"/*/console; do
        [ -e "$console" ] || continue
        ! grep -qaE "$BAD_CONSOLE" "$console" ||
            fail "$TEST_NAME: no crash in a console" "$(grep -aE -A 20 "$BAD_CONSOLE" "$console")"
    done
    [ "$STARTS" = 0 ] || [ "$FAILED" != "$before" ] || pass "$TEST_NAME: no crash in $STARTS consoles"
    [ "$status" = 0 ] || fail "$TEST_NAME: runs to its end" "ended with status $status"
    [ "$CHECKS" -gt 0 ] || fail "$TEST_NAME: has checks" 'none was made'
    if [ -n "${TEST_KEEP-}" ]; then
        echo "kept: $T"
    else
        rm -rf "$T"
    fi
    [ "$FAILED" = 0 ] || exit 1
    exit 0
}

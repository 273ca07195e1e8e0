#!/usr/bin/env bash
# What runs out: descriptors, space, a console that nobody reads, random bytes. Memory and system
# calls that fail one by one are tests/unit_faults.c's.
. "$(dirname "$0")/lib.sh"

need openssl strace >&2

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
CLOCK=$(getconf CLK_TCK)

# cpu_ms PID: what it has used.
cpu_ms() { awk -v hz="$CLOCK" '{ sub(/.*\) /, ""); print int(($12 + $13) * 1000 / hz) }' "/proc/$1/stat"; }

serves() { http / -f >"$T/first" 2>&1; }
is_good() { [ "$(http /)" = hello ]; }

# ---- 76: descriptors ------------------------------------------------------------------------------

# Holds 200 connections until its input ends.
hold() {
    "$PYTHON" -c 'import socket, sys
held = []
for i in range(200):
    s = socket.socket(socket.AF_UNIX)
    s.connect(sys.argv[1])
    held.append(s)
print("held", flush=True)
sys.stdin.read()' "$HTTP"
}

descriptors() {
    local before
    HTTP=$T/http.sock
    spawn "$T/log" prlimit --nofile=60:60 "$AGENT" run --listen "unix:$HTTP" "$APPS/hello" main:app
    RUN_PID=$SPAWNED
    check '76: EMFILE: it serves' wait_for 30 serves
    coproc HOLD { hold; }
    read -r -t 20 <&"${HOLD[0]}"
    check '76: EMFILE: it is said' wait_for 10 grep -qE 'accept: (No file descriptors available|Too many open files)' "$T/log"
    before=$(cpu_ms "$RUN_PID")
    sleep 2
    check_at_most '76: EMFILE: CPU used within 2 s, ms' 300 $(($(cpu_ms "$RUN_PID") - before))
    check_at_most '76: EMFILE: lines about it' 5 "$(grep -c 'accept: ' "$T/log")"
    eval "exec ${HOLD[1]}>&-"
    check '76: EMFILE: it goes on when they leave' wait_for 10 is_good
    unspawn "$RUN_PID"
}

# ---- 76: a console that nobody reads ---------------------------------------------------------------

console() {
    local n answers=''
    mkdir "$T/noisy"
    cat >"$T/noisy/main.py" <<'END'
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    print(("x" * 99 + "\n") * 1000, flush=True)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})
END
    mkfifo "$T/pipe"
    exec 8<>"$T/pipe"
    spawn "$T/pipe" "$AGENT" run --listen "unix:$HTTP" "$T/noisy" main:app
    RUN_PID=$SPAWNED
    check '76: a full console pipe: it serves' wait_for 30 serves
    for n in {1..20}; do answers+=$(http /); done
    check_eq '76: a full console pipe: every request is answered' "$(printf 'hello%.0s' {1..20})" "$answers"
    timeout 2 cat <&8 >"$T/piped" || true
    http / >"$T/first"
    timeout 1 cat <&8 >>"$T/piped" || true
    check '76: a full console pipe: what was dropped is counted' grep -aq 'console too slow, [0-9]* lines dropped' "$T/piped"
    unspawn "$RUN_PID"
    exec 8>&-
}

# ---- 76: space --------------------------------------------------------------------------------------

large_code() {
    mkdir -p "$T/large"
    cp "$APPS/hello/main.py" "$T/large/"
    head -c 3000000 /dev/urandom >"$T/large/blob"
}

# space NAME: a configuration that does not fit there, then one that does.
space() {
    refused "76: $1: the error is precise" 1 '"blob" cannot be written: No space left on device' configure "$T/large" main:app
    check_eq "76: $1: nothing is left of it" '' "$(shell 'ls /opt/blob /opt/main.py 2>/dev/null')"
    check "76: $1: the next one fits" configure "$APPS/hello" main:app
    check_eq "76: $1: and serves" hello "$(request /)"
}

full_folders() {
    large_code
    NS_PREPARE='mount -t tmpfs -o size=1M tmpfs opt'
    ns_start
    space 'ENOSPC on /opt'
    # Everything written goes to the overlay's upper folder.
    NS_PREPARE='mount -o remount,size=1M "$folder/root"'
    ns_start
    space 'ENOSPC on the overlay'
    refused '76: ENOSPC on the overlay: of whoever fills it' 0 'No space left' \
        shell 'head -c 3000000 /dev/zero >/full; ls -l /full'
    check_eq '76: ENOSPC on the overlay: still serves' hello "$(request /)"
    # Neither a byte nor a name more fits on /tmp, where the guest API's socket would be.
    NS_PREPARE='mount -t tmpfs -o size=4k,nr_inodes=16 tmpfs tmp
        mkdir -p "$root$folder"
        mount --bind "$folder" "$root$folder"
        for n in {1..16}; do echo x >"tmp/$n" || :; done 2>/dev/null'
    ns_start --api "unix:$T/none.sock"
    check '76: ENOSPC on /tmp: a configuration' configure "$APPS/hello" main:app
    assert_console_has '76: ENOSPC on /tmp: what is missing is said' '/tmp/socat-socket: No space left'
    check_eq '76: ENOSPC on /tmp: it serves' hello "$(request /)"
    stop
    NS_PREPARE=''
}

# ---- 80: entropy ------------------------------------------------------------------------------------

# traced_start CALL ERROR OPTION…: init, where init and all that it starts get this error from the call.
traced_start() {
    local real=$AGENT call=$1 error=$2 folder=$T/$((STARTS + 1)) inner=$GUEST_ROOT/out/agent
    shift 2
    ! is_sanitized || inner=$GUEST_ROOT/out/debug/agent     # $T may be out of the namespace's sight
    cat >"$T/traced" <<END
#!/bin/sh
export ASAN_OPTIONS=detect_leaks=0      # which uses ptrace(2) itself
exec strace -I 1 -D -f -qq -o $folder/strace -e trace=$call -e inject=$call:error=$error $inner "\$@"
END
    chmod 755 "$T/traced"
    AGENT=$T/traced
    NS_PREPARE='ulimit -c 0' ns_start "$@"
    AGENT=$real
}

entropy() {
    local tracer curl_pid folder=$T/$((STARTS + 1))
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=guest \
        -addext subjectAltName=DNS:guest -keyout "$T/key.pem" -out "$T/cert.pem" 2>/dev/null
    # As early in a boot (random(4)).
    traced_start getrandom EAGAIN --http "tls+unix:$folder/tls.sock" --tls-cert "$folder/cert.pem" --tls-key "$folder/key.pem"
    cp "$T/cert.pem" "$T/key.pem" "$folder"     # read when there are random bytes
    pass '80: no entropy: ready is said'
    assert_console_has '80: no entropy: TLS says why it waits' 'tls: the kernel has no random bytes yet: nobody is served by TLS'
    check '80: no entropy: a configuration' configure "$APPS/hello" main:app
    check_eq '80: no entropy: it serves' hello "$(request /)"
    check_eq '80: no entropy: and in plain HTTP' hello "$(http /)"
    spawn "$T/tls.out" curl -sS --max-time 20 --cacert "$T/cert.pem" --unix-socket "$GUEST/tls.sock" https://guest/
    curl_pid=$SPAWNED
    sleep 1
    check '80: no entropy: a TLS client waits' is_alive "$curl_pid"
    check_eq '80: no entropy: nothing is asked for that could wait' '' "$(grep -v GRND_NONBLOCK "$GUEST/strace" | grep getrandom || true)"
    tracer=$(awk '$1 == "TracerPid:" { print $2 }' "/proc/$PID1/status")
    kill "$tracer"
    check '80: then there is some: the TLS client is served' wait "$curl_pid"
    check_eq '80: with its answer' hello "$(cat "$T/tls.out")"
    stop
}

# ---- a kernel without memfd_create(2) ---------------------------------------------------------------

no_memfd() {
    traced_start memfd_create ENOSYS
    check 'no memfd: a configuration' configure "$APPS/echo" main:app
    assert_console_has 'no memfd: what is missing is said' 'no shared memory, long bodies go through its socket: Function not implemented'
    check_eq 'no memfd: a long body' 100000 "$(http /bytes/100000 | wc -c)"
    stop
}

# Time-outs of the shims must not hang on a clock that is set.
check '78: no shim looks at the wall clock' not grep -nE '\btime\.time\b|\bdatetime\.|\bDate\.now|new Date\b' "$GUEST_ROOT"/shims/*.*

for part in ${*:-descriptors console full_folders entropy no_memfd}; do "$part"; done

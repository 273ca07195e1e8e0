#!/usr/bin/env bash
# The HTTP front under slow and many clients: slowhttptest in its four modes, 10,000 idle
# connections, bodies of 1 GiB that one side takes late. Full matrix. Runs alone: it measures.
. "$(dirname "$0")/lib.sh"

is_sanitized && { pass 'nothing to measure of a sanitized agent'; exit; }
need slowhttptest wrk

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=$T
ulimit -n 20000

# start PROGRAM OPTION…: `agent run` on $PORT and $HTTP, up to its first answer.
start() {
    PORT=$((20000 + RANDOM % 10000)) HTTP=$T/http.sock
    spawn "$T/log" "$AGENT" run --listen "tcp:127.0.0.1:$PORT" --listen "unix:$HTTP" "${@:2}" "$APPS/$1" main:app
    RUN_PID=$SPAWNED
    wait_for 20 eval 'http / -f >"$T/first" 2>&1'
}

# While a command runs: good requests one after the other. Sets SLOWEST, in ms, and WRONG.
beside() {
    local start status
    SLOWEST=0 WRONG=0
    "$@" >"$T/slow" 2>&1 &
    while kill -0 $! 2>/dev/null; do
        start=$(ms)
        status=$(curl -sS --max-time 20 -o /dev/null -w '%{http_code}' "http://127.0.0.1:$PORT/bytes/100" 2>/dev/null) || true
        [ "$status" = 200 ] || WRONG=$((WRONG + 1))
        start=$(($(ms) - start))
        [ "$start" -le "$SLOWEST" ] || SLOWEST=$start
        sleep 0.1
    done
    wait $! || true
}

# slow NAME OPTION…: 1,000 connections of slowhttptest for 12 s.
slow() {
    local name=$1
    shift
    beside slowhttptest -c 1000 -r 500 -l 12 -p 3 "$@"
    check_match "$name: slowhttptest finds the service available" 'service available:.*YES' "$(cat "$T/slow")"
    check_eq "$name: and never not" 0 "$(grep -c 'service available:.*NO' "$T/slow" || true)"
    check_match "$name: it had connections open" 'connected: *.*[1-9]' "$(cat "$T/slow")"
    check_eq "$name: good requests that failed meanwhile" 0 "$WRONG"
    check_at_most "$name: the slowest of them, in ms" 5000 "$SLOWEST"
    check "$name: the agent lives" is_alive "$RUN_PID"
}

start echo
slow 'slow heads' -H -i 2 -t GET -x 24 -u "http://127.0.0.1:$PORT/"
slow 'slow bodies' -B -i 2 -s 8192 -t POST -x 10 -u "http://127.0.0.1:$PORT/"
slow 'ranges' -R -t HEAD -a 10 -b 3000 -u "http://127.0.0.1:$PORT/"
slow 'slow reads' -X -w 512 -y 1024 -n 5 -z 32 -k 3 -u "http://127.0.0.1:$PORT/bytes/1000000"

# ---- 10,000 idle connections -------------------------------------------------------------------

cat >"$T/idle.py" <<'END'
import socket, sys
idle = []
for _ in range(10000):
    idle.append(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
    idle[-1].sendall(b"GET / HTTP/1.1\r\nHost: guest\r\nCookie: %s\r\n\r\n" % (b"c" * 3000))
    assert idle[-1].recv(65536).startswith(b"HTTP/1.1 200")
print("ready", flush=True)
sys.stdin.read()
END

ticks() { awk '{ print $14 + $15 }' "/proc/$RUN_PID/stat"; }
resident() { awk '$1 == "VmRSS:" { print $2 }' "/proc/$RUN_PID/status"; }

# Nanoseconds of the agent's processor for one request, whatever else the machine does.
cost() {
    local before=$(ticks) done
    done=$(wrk -t1 -c64 -d3s "http://127.0.0.1:$PORT/" | awk '/ requests in / { print $1 }')
    echo $((($(ticks) - before) * 10000000 / done))
}

start hello
cost >/dev/null
PLAIN=999999 IDLE=999999 KIB=0
for _ in 1 2 3 4; do
    now=$(cost)
    PLAIN=$((now < PLAIN ? now : PLAIN))
    before=$(resident)
    coproc HOLDER { exec "$PYTHON" "$T/idle.py" "$PORT"; }
    read -r _ <&"${HOLDER[0]}"
    KIB=$(($(resident) - before > KIB ? $(resident) - before : KIB))
    now=$(cost)
    IDLE=$((now < IDLE ? now : IDLE))
    exec {HOLDER[1]}>&-
    wait "$HOLDER_PID" || true
done
check_at_most '10,000 idle connections, in KiB' 40000 "$KIB"
check_at_most "10,000 idle connections: nanoseconds of processor for a request, without them $PLAIN" $((PLAIN * 11 / 10)) "$IDLE"

# ---- bodies of 1 GiB ---------------------------------------------------------------------------

start echo
http /bytes/1048576 | http / --data-binary @- >/dev/null
checks_from env BODY_MIB=1024 SANITIZED= PYTHONDONTWRITEBYTECODE=1 "$PYTHON" "$TESTS/http_raw.py" "$HTTP" "$T/log" "$RUN_PID" memory

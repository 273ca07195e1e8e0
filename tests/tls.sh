#!/usr/bin/env bash
# TLS by clients that nobody here wrote (openssl, curl, Python, Node) and by handshakes of our own making;
# those stand in tls_peer.py.
. "$(dirname "$0")/lib.sh"

need openssl nodejs >&2

export TMPDIR=$T PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
CERTS=$T/certs
PORT=$((30000 + RANDOM % 10000))
URL=https://localhost:$PORT
mkdir "$CERTS"

EC='ec -pkeyopt ec_paramgen_curve:P-256'
authority ca
authority other
issue rsa ca /CN=localhost serverAuth rsa:2048
issue ec ca /CN=localhost serverAuth $EC
issue p384 ca /CN=localhost serverAuth ec -pkeyopt ec_paramgen_curve:P-384
issue client ca '/O=Ours, and theirs/CN=Zoë' clientAuth $EC -utf8
issue server ca /CN=server serverAuth $EC
issue stranger other /CN=stranger clientAuth $EC

# start OPTION…: `agent run` of $PROGRAM on $PORT by TLS and on $HTTP in the clear, with what is in $CERTS/now.*.
PROGRAM=echo
start() {
    HTTP=$T/http.sock
    spawn "$T/log" "$AGENT" run --listen "unix:$HTTP" --listen "tls+tcp:127.0.0.1:$PORT" --listen "tls+unix:$T/tls.sock" \
        --tls-cert "$CERTS/now.chain" --tls-key "$CERTS/now.key" "$@" "$APPS/$PROGRAM" main:app
    RUN_PID=$SPAWNED
    wait_for 20 serves && is_alive "$RUN_PID" || { fail "$TEST_NAME: $*: starts" "$(cat "$T/log")"; exit 1; }
}

serves() { http /bytes/1 -f >"$T/first" 2>&1 || is_gone "$RUN_PID"; }

finish() {
    local status=0
    kill "$RUN_PID"
    wait "$RUN_PID" || status=$?
    check_eq "$1: ends with 0" 0 "$status"
    check_eq "$1: no crash" '' "$(grep -E "$BAD_CONSOLE" "$T/log" || true)"
}

use() { cp "$CERTS/$1.chain" "$CERTS/now.chain" && cp "$CERTS/$1.key" "$CERTS/now.key"; }
get() { curl -sS --max-time 60 --cacert "$CERTS/ca.pem" "$@"; }
drive() { checks_from env PYTHONDONTWRITEBYTECODE=1 timeout 120 "$PYTHON" "$TESTS/tls_peer.py" "127.0.0.1:$PORT" "$CERTS" "$T/log" "$@"; }
s_client() { timeout 20 openssl s_client -connect "127.0.0.1:$PORT" -CAfile "$CERTS/ca.pem" "$@" </dev/null 2>&1 || true; }
# Which certificate is shown.
shown() { s_client | openssl x509 -noout -fingerprint 2>&1; }
fingerprint() { openssl x509 -noout -fingerprint -in "$CERTS/$1.pem"; }
descriptors() { find /proc/$RUN_PID/fd -lname 'socket:*' | wc -l; }
few_descriptors() { [ "$(descriptors)" -le "$1" ]; }

# The key of the last one stays.
check_curl() {
    local version key
    for key in ec p384 rsa; do
        [ "$key" = ec ] || finish "${USED:-}"
        USED=$key
        use $key
        start
        for version in 1.2 1.3; do
            check_eq "curl: TLS $version, key $key" '6 xxxxxx' \
                "$(get --tlsv$version --tls-max $version -w '%{size_download} ' -o "$T/body" "$URL/bytes/6"; cat "$T/body")"
        done
    done
}

check_clients() {
    local version out before
    check_eq 'a Unix socket' xx "$(get --unix-socket "$T/tls.sock" "https://localhost/bytes/2")"
    check_match 'plain HTTP beside it' '"scheme": "http".*"server": \["localhost", 80\]' "$(http /)"
    check_match 'the program is told what was connected to' "\"scheme\": \"https\".*\"server\": \\[\"127.0.0.1\", $PORT\\]" "$(get "$URL/")"
    check_match 'and on a Unix socket the port of the scheme' '"server": \["localhost", 443\]' \
        "$(get --unix-socket "$T/tls.sock" https://localhost/)"
    for version in 2 3; do
        out=$(s_client -tls1_$version -alpn h2,http/1.1)
        check_match "openssl: TLS 1.$version" "^New, TLSv1.$version, Cipher is (ECDHE|TLS)_?.*(GCM|POLY)" "${out//-/_}"
        check_match "openssl: TLS 1.$version: verified" 'Verif(y return code: 0|ication: OK)' "$out"
        check_match "openssl: TLS 1.$version: ALPN" 'ALPN protocol: http/1.1' "$out"
        check "openssl: TLS 1.$version: no ticket" not grep -q 'session ticket:' <<<"$out"
    done
    out=$( (echo R; sleep 1) | timeout 20 openssl s_client -tls1_2 -connect "127.0.0.1:$PORT" -CAfile "$CERTS/ca.pem" 2>&1 || true)
    check_match 'openssl: wants to renegotiate' RENEGOTIATING "$out"
    check_eq 'openssl: but may not' 1 "$(grep -c '^depth=0' <<<"$out")"
    check_match 'openssl: TLS 1.1 is refused' 'alert protocol version|Cipher is \(NONE\)' "$(s_client -tls1_1 -cipher 'ALL:@SECLEVEL=0')"
    check_eq 'Node: connects' '200 TLSv1.3 xxx' "$(node -e '
        const https = require("https"), fs = require("fs")
        const to = { port: process.argv[2], host: "localhost", family: 4, path: "/bytes/3", ca: fs.readFileSync(process.argv[1]) }
        https.get(to, (res) => {
            const by = res.socket.getProtocol()
            let text = ""
            res.on("data", (data) => { text += data }).on("end", () => console.log(res.statusCode, by, text))
        }).on("error", (e) => console.log(e.message))' "$CERTS/ca.pem" "$PORT")"
    drive suites transfers ends
    before=$(descriptors)
    drive breaks many garbage
    check 'nothing is left of them' wait_for 10 few_descriptors "$before"
    finish rsa
}

check_websocket() {
    use ec
    PROGRAM=websocket start
    drive websocket
    finish websocket
}

check_slow() {
    use ec
    start --limit silent_ms=700
    drive slow
    finish slow
}

# What the program is told of the client; the last word of a name is a field.
subject() { "$PYTHON" -c 'import json, sys; print([v for n, v in json.load(sys.stdin)["headers"] if "client" in n.lower()])'; }

check_clients_certificates() {
    local version out
    local forged=(-H 'X-Client-Subject: CN=root' -H 'x_client-SUBJECT: CN=root' -H 'Connection: X-Client-Subject')
    use rsa
    start --tls-ca "$CERTS/ca.pem"
    for version in 1.2 1.3; do
        local tls=(--tlsv$version --tls-max $version)
        check "$version: a client without a certificate is refused" not get "${tls[@]}" "$URL/bytes/1"
        check "$version: one of another authority is refused" not get "${tls[@]}" --cert "$CERTS/stranger.pem" --key "$CERTS/stranger.key" "$URL/bytes/1"
        check "$version: one that is for servers is refused" not get "${tls[@]}" --cert "$CERTS/server.pem" --key "$CERTS/server.key" "$URL/bytes/1"
        check_eq "$version: the program is told whose it is, by nobody else" "['O=Ours\\\\, and theirs, CN=Zo\\\\C3\\\\AB']" \
            "$(get "${tls[@]}" --cert "$CERTS/client.pem" --key "$CERTS/client.key" "${forged[@]}" "$URL/" | subject)"
    done
    check_match 'no certificate: the log says so' 'it has no certificate' "$(cat "$T/log")"
    check_match 'another authority: the log says so' 'of another authority' "$(cat "$T/log")"
    check_eq 'in the clear nobody is anybody' '[]' "$(http / "${forged[@]}" | subject)"
    finish certificates
}

reloaded() { [ "$(shown)" = "$(fingerprint "$1")" ]; }
log_has() { grep -q "$1" "$T/log"; }

check_reload() {
    use rsa
    start
    check_eq 'reload: the certificate before' "$(fingerprint rsa)" "$(shown)"
    mkfifo "$T/held"
    (cat "$T/held") | timeout 60 openssl s_client -quiet -connect "127.0.0.1:$PORT" -CAfile "$CERTS/ca.pem" >"$T/held.out" 2>&1 &
    exec 8>"$T/held"
    printf 'GET /bytes/4 HTTP/1.1\r\nHost: a\r\n\r\n' >&8
    check 'reload: a connection from before' wait_for 10 grep -q xxxx "$T/held.out"
    use ec
    kill -HUP "$RUN_PID"
    check 'reload: SIGHUP brings the new certificate' wait_for 10 reloaded ec
    printf 'GET /bytes/5 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n' >&8
    check 'reload: which goes on' wait_for 10 grep -q xxxxx "$T/held.out"
    exec 8>&-
    cp "$CERTS/rsa.key" "$CERTS/now.key"
    kill -HUP "$RUN_PID"
    check 'reload: a key that does not fit is no good' wait_for 10 log_has 'now.key: not the key of .*: the certificate and key from before stay'
    check_eq 'reload: and changes nothing' "$(fingerprint ec)" "$(shown)"
    : >"$CERTS/now.chain"
    kill -HUP "$RUN_PID"
    check 'reload: nor is an empty file' wait_for 10 log_has 'now.chain: no certificate'
    rm "$CERTS/now.chain"
    kill -HUP "$RUN_PID"
    check 'reload: nor is none' wait_for 10 log_has 'now.chain: No such file'
    check_eq 'reload: the service goes on' x "$(get "$URL/bytes/1")"
    finish reload
}

# ends NAME REGEX OPTION…: it does not come up, with 2.
ends() {
    local name=$1 regex=$2
    shift 2
    refused "$name" 2 "$regex" timeout 30 "$AGENT" run "$@" "$APPS/echo" main:app
}

check_failures() {
    local tls=(--listen "tls+tcp:127.0.0.1:$PORT")
    openssl rsa -aes128 -passout pass:x -in "$CERTS/rsa.key" -out "$CERTS/locked.key" 2>/dev/null
    ends 'a key that is none of the certificate' "ec.key: not the key of the certificate in .*rsa.pem" "${tls[@]}" --tls-cert "$CERTS/rsa.pem" --tls-key "$CERTS/ec.key"
    ends 'a key that is not there' 'none.key: No such file' "${tls[@]}" --tls-cert "$CERTS/rsa.pem" --tls-key "$CERTS/none.key"
    ends 'a key with a password' 'locked.key: no private key without a password' "${tls[@]}" --tls-cert "$CERTS/rsa.pem" --tls-key "$CERTS/locked.key"
    ends 'a certificate for a key' 'rsa.pem: no private key' "${tls[@]}" --tls-cert "$CERTS/rsa.pem" --tls-key "$CERTS/rsa.pem"
    ends 'a file without end' '/dev/zero: ' "${tls[@]}" --tls-cert /dev/zero --tls-key "$CERTS/rsa.key"
    ends 'a key for an authority' 'rsa.key: no certificate' "${tls[@]}" --tls-cert "$CERTS/rsa.pem" --tls-key "$CERTS/rsa.key" --tls-ca "$CERTS/rsa.key"
    ends 'a certificate without a key' 'needs a certificate and its key' "${tls[@]}" --tls-cert "$CERTS/rsa.pem"
    ends 'an address without a certificate' 'takes a certificate and its key' "${tls[@]}"
    ends 'a certificate without an address' 'no address to listen on is tls' --listen "unix:$T/s" --tls-cert "$CERTS/rsa.pem" --tls-key "$CERTS/rsa.key"
    ends 'TLS for the supervisor' 'wire: ' --wire "tls+unix:$T/w"
    for _ in {1..20}; do cat "$CERTS/rsa.pem"; done >"$CERTS/long.pem"
    ends 'more certificates than go into a record' 'long.pem: certificates of more than' "${tls[@]}" --tls-cert "$CERTS/long.pem" --tls-key "$CERTS/rsa.key"
}

# By a file, in the namespaces of a machine.
check_machine() {
    cat >"$T/agent.json" <<END
{"tls": {"certificate": "$CERTS/ec.chain", "key": "$CERTS/ec.key", "client_ca": "$CERTS/ca.pem"}}
END
    NS_PREPARE="mkdir -p .$CERTS && cp $CERTS/* .$CERTS/ && cp $T/agent.json .$T/"
    ns_start --http "tls+unix:$T/t" --http "tls+tcp:127.0.0.1:8443" --config "$T/agent.json"
    configure "$APPS/echo" main:app
    check_eq 'machine: by a file' "['CN=Zo']" "$(nsenter --net="/proc/$PID1/ns/net" curl -sS --max-time 60 --cacert "$CERTS/ca.pem" \
        --cert "$CERTS/client.pem" --key "$CERTS/client.key" https://127.0.0.1:8443/ | subject | sed 's/O=.*CN=Zo[^'"'"']*/CN=Zo/')"
    check_eq 'machine: plain HTTP beside it' xx "$(http /bytes/2)"
    halt
}

check_curl
check_clients
check_websocket
check_slow
check_clients_certificates
check_reload
check_failures
check_machine

#!/usr/bin/env bash
# Where a runtime's two-script init fell short, numbered as the supervisor's protocol numbers
# it: each named check is one that the old behaviour would fail. (10, /data packed again: data.sh;
# 14, arm64: arm64.sh; 15, sshd only where keys are given: ssh.sh.)
. "$(dirname "$0")/lib.sh"

need squashfs-tools

# folder NAME FILE: a folder in $T with the one file, from standard input. Prints it.
folder() {
    mkdir -p "$T/$1"
    cat >"$T/$1/$2"
    echo "$T/$1"
}

counts() { grep -ac "$1" "$CONSOLE" || true; }
# Of a processor, in hundredths of a second.
pid1_ticks() { awk '{ print $14 + $15 }' "/proc/$PID1/stat"; }
kill_program() { shell "for p in /proc/[0-9]*; do grep -qs '$1' \$p/cmdline && kill -KILL \${p#/proc/}; done" >"$T/killed" 2>&1 || true; }

asgi() {
    folder asgi main.py <<'END'
import asyncio, json

WANTED = {"http_version", "scheme", "server", "client", "raw_path", "root_path", "asgi", "state"}

async def lifespan(receive, send):
    for _ in range(2):
        message = await receive()
        print(message["type"], flush=True)
        await send({"type": message["type"] + ".complete"})

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body")
    parts = [b""]
    if scope["path"] == "/size":
        parts = [str(len(body)).encode()]
    elif scope["path"] == "/stream":
        parts = [b"x" * 1000] * 50
    elif scope["path"] == "/suspends":
        done, _ = await asyncio.wait([asyncio.ensure_future(receive())], timeout=0.3)
        parts = [b"no" if done else b"yes"]
    elif scope["path"] == "/lacks":
        parts = [json.dumps(sorted(WANTED - set(scope))).encode()]
    elif scope["path"] == "/raises":
        raise RuntimeError("on purpose")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body"})
    if scope["path"] == "/background":
        await asyncio.sleep(2)
        print("background done", flush=True)
END
}

asgi_program() {
    local start
    ns_start --log debug
    configure "$(asgi)" main:app --env 'TOKEN=secret-of-the-environment' >"$T/configured"
    head -c 3000000 /dev/zero >"$T/body"
    check_eq 'shortcoming 1: a body of many packets arrives whole' 3000000 "$(request -X POST -d "@$T/body" /size)"
    check_eq 'shortcoming 2: every body message comes back' 50000 "$(request /stream | wc -c)"
    check_eq 'shortcoming 4: receive() suspends after the body' yes "$(request /suspends)"
    check_eq 'shortcoming 4: nothing lacks in the scope' '[]' "$(request /lacks)"
    start=$(ms)
    request /background >"$T/reply"
    check_at_most 'shortcoming 5: the background task delays no reply, ms' 1500 $(($(ms) - start))
    assert_console_has 'shortcoming 5: and runs to its end' 'background done'
    request -X POST -d 'secret-of-the-body' -H 'X-Key: secret-of-a-header' '/size?secret-of-the-query' >"$T/reply"
    halt >"$T/reply" 2>&1 || true
    check_eq 'shortcoming 3: one lifespan startup' 1 "$(counts 'lifespan.startup')"
    check_eq 'shortcoming 3: one lifespan shutdown, at halt' 1 "$(counts 'lifespan.shutdown')"
    check_eq 'shortcoming 13: no secret is logged, at the level of debugging' 0 "$(counts 'secret-of')"
    stop
}

bare() {
    folder bare main.py <<'END'
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"bare"})
END
}

no_lifespan() {
    ns_start
    check 'shortcoming 3: an application without lifespan starts' configure "$(bare)" main:app
    check_eq 'shortcoming 3: and answers' bare "$(request /)"
    stop
}

plain_code() {
    ns_start
    printf '%s\n' 'GREETING = "hello"' 'def greet(): return GREETING.encode()' \
        'async def app(scope, receive, send):' \
        '    await send({"type": "http.response.start", "status": 200, "headers": []})' \
        '    await send({"type": "http.response.body", "body": greet()})' >"$T/plain.py"
    configure "$T/plain.py" app >"$T/configured"
    check_eq 'shortcoming 7: functions of plain code see its names' hello "$(request /)"
    stop
}

gateway() {
    folder gateway server.py <<'END'
import gzip, http.server, os, time

class Handler(http.server.BaseHTTPRequestHandler):
    posts = 0

    def do_GET(self):
        fields, body = {}, self.path.encode()
        if self.path == "/moved":
            fields, body = {"Location": "/elsewhere"}, b""
        elif self.path == "/gzip":
            fields, body = {"Content-Encoding": "gzip"}, gzip.compress(b"packed" * 1000)
        elif self.path == "/slow":
            time.sleep(7)
        elif self.path == "/posts":
            body = str(Handler.posts).encode()
        self.send_response(302 if self.path == "/moved" else 200)
        for name, value in {**fields, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        Handler.posts += 1
        self.connection.close()     # without an answer

http.server.ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
END
}

executable() {
    boot
    configure "$(gateway)" server.py --interface executable >"$T/configured"
    check_match 'shortcoming 8: a redirect is passed on' '^HTTP/1.1 302.*Location: /elsewhere' "$(http /moved -i | tr -d '\r' | tr '\n' ' ')"
    check_eq 'shortcoming 8: a query is not encoded twice, port 80' '/q?a=%26%2B+x&b' "$(http '/q?a=%26%2B+x&b')"
    check_eq 'shortcoming 8: nor on port 52' '/q?a=%26%2B+x&b' "$(request '/q?a=%26%2B+x&b')"
    check_eq 'shortcoming 8: a packed body keeps its length' 6000 "$(http /gzip | gzip -dc | wc -c)"
    check_match 'shortcoming 8: a POST without an answer is an error' '^HTTP/1.1 502' "$(http / -d x -i)"
    check_eq 'shortcoming 8: and is not repeated' 1 "$(http /posts)"
    check_eq 'shortcoming 8: an answer after 7 s is not cut' /slow "$(http /slow)"
    stop
}

hang_up() {
    "$PYTHON" - "${SOCK#unix:}" <<'END'
import socket, sys
for text in (b"1", b"1000", b"1000\n", b"1000\n\x8e\xaainput_data"):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(sys.argv[1])
        s.sendall(text)
END
}

setup_errors() {
    local before
    ns_start
    GOOD=(shell 'echo well')
    baseline
    check_eq 'shortcoming 9: loopback is up without another interface' 'lo 127.0.0.1' \
        "$(shell 'ls /sys/class/net; cat /proc/net/fib_trie' | grep -oxE 'lo|eth0| *.-- 127.0.0.1' | sed 's/.* //' | sort -ru | tr '\n' ' ' | sed 's/ $//')"
    before=$(pid1_ticks)
    hang_up
    sleep 1
    check_at_most 'shortcoming 12: a host that hangs up costs no processor, ticks of a second' 20 $(($(pid1_ticks) - before))
    guest_ok 'shortcoming 12: well afterwards'
    echo 'no archive' >"$T/bad.zip"
    refused 'shortcoming 11: an error in setup is reported' 1 'archive' configure "$T/bad.zip" main:app
    guest_ok 'shortcoming 11: and the machine stays'
    configure "$(asgi)" main:app >"$T/configured"
    check_match 'shortcoming 11: an exception is reported' 'RuntimeError: on purpose' "$(request /raises 2>&1)"
    kill_program worker.py
    check_eq 'shortcoming 11: a program that died is started again' '[]' "$(until http /lacks 2>/dev/null | grep '^\['; do sleep 0.1; done)"
    stop
}

# A guest with a read-only disk that takes no chmod, and a kernel that could panic.
guest() {
    mksquashfs "$(folder disk run.sh <<'END'
#!/bin/sh
exec python3 -m http.server "$PORT" --bind "$HOST" --directory /opt/code
END
)" "$T/disk.squashfs" -p 'run.sh m 755 0 0' -quiet -no-progress -all-root >"$T/mksquashfs"
    boot -- -drive "file=$T/disk.squashfs,format=raw,if=virtio,readonly=on"
    check 'shortcoming 6: an executable on read-only squashfs starts' configure - run.sh --interface executable
    check_match 'shortcoming 6: and answers' 'exec python3' "$(http /run.sh)"
    kill_program http.server
    check_match 'shortcoming 11: it died, and no kernel panicked' 'exec python3' \
        "$(for try in {1..50}; do http /run.sh 2>/dev/null | grep 'exec python3' && break; sleep 0.2; done)"
    check 'shortcoming 11: halts' halt
}

asgi_program
no_lifespan
plain_code
executable
setup_errors
guest

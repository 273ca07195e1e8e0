"""Drives ASGI WebSockets with frames of its own making; run by websocket.sh.

    websocket_raw.py SOCKET CONSOLE PID GROUP...

Arguments and output are those of http_raw.py; behind SOCKET runs apps/websocket.
"""
import base64
import hashlib
import json
import os
import random
import re
import struct
import time

from http_raw import CONSOLE, MIB, SANITIZED, Client, Ended, ask, console_since, equal, expect, main, rss_kib, settled

TEXT, BINARY, CLOSE, PING, PONG, MORE = 1, 2, 8, 9, 10, 0
KEY = base64.b64encode(bytes(range(16)))


def handshake(path=b"/echo", method=b"GET", version=b"13", key=KEY, more=b"", http=b"1.1"):
    return (method + b" " + path + b" HTTP/" + http + b"\r\nHost: guest\r\nUpgrade: WebSocket\r\n"
            b"Connection: keep-alive, Upgrade\r\n"
            + (b"Sec-WebSocket-Version: " + version + b"\r\n" if version is not None else b"")
            + (b"Sec-WebSocket-Key: " + key + b"\r\n" if key is not None else b"") + more + b"\r\n")


def frame(kind, payload=b"", fin=True, masked=True, rsv=0, size=None, length=None):
    """size: what the head claims; length: in how many bytes, 0, 2 or 8."""
    size = len(payload) if size is None else size
    mask = os.urandom(4) if masked else b""
    length = (0 if size < 126 else 2 if size < 65536 else 8) if length is None else length
    head = bytes([kind | (0x80 if fin else 0) | rsv << 4,
                  (size if length == 0 else 126 if length == 2 else 127) | (0x80 if masked else 0)])
    head += (size.to_bytes(length, "big") if length else b"") + mask
    if not masked or not payload:
        return head + payload
    key = int.from_bytes((mask * (len(payload) // 4 + 1))[:len(payload)], "big")
    return head + (int.from_bytes(payload, "big") ^ key).to_bytes(len(payload), "big")


class Socket:
    def __init__(self, path=b"/echo", more=b""):
        self.client = Client()
        self.sock = self.client.sock
        self.data = b""
        self.sock.sendall(handshake(path, more=more))
        while b"\r\n\r\n" not in self.data:
            self.fill()
        self.head, _, self.data = self.data.partition(b"\r\n\r\n")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def fill(self):
        more = self.sock.recv(1 << 18)
        if not more:
            raise Ended("after %.100r" % self.data)
        self.data += more

    def exactly(self, count):
        while len(self.data) < count:
            self.fill()
        found, self.data = self.data[:count], self.data[count:]
        return found

    def send(self, *args, **more):
        self.sock.sendall(frame(*args, **more))

    def frame(self):
        first, size = self.exactly(2)
        if size == 126:
            size, = struct.unpack("!H", self.exactly(2))
        elif size == 127:
            size, = struct.unpack("!Q", self.exactly(8))
        return first & 0x7f, bool(first & 0x80), self.exactly(size)

    def message(self):
        """A whole one: its kind and bytes; of a Close its code and reason."""
        kind, fin, data = self.frame()
        while not fin:
            more, fin, piece = self.frame()
            if more == CLOSE:
                kind, data = more, b""
            elif more != MORE:
                raise Ended("kind %d within a message" % more)
            data += piece
        if kind == CLOSE:
            return CLOSE, int.from_bytes(data[:2], "big") if data else None, data[2:].decode()
        return kind, data

    def ended(self, seconds):
        self.sock.settimeout(seconds)
        try:
            return self.data == b"" and self.sock.recv(1) == b""
        except ConnectionResetError:
            return True
        except OSError:
            return False


def told(name, *entries):
    """What the program has heard since it was asked last, in order."""
    wanted = [list(entry) for entry in entries]
    equal("%s: the program is told" % name, wanted, settled(lambda: json.loads(ask("/log").body), wanted))
    ask("/clear")


def group_handshakes():
    """26: what is no handshake of version 13."""
    def refused(name, status, **what):
        with Client() as client:
            client.send(handshake(**what))
            answer = client.response()
            equal("26 handshake: %s" % name, status, answer.status)
            return answer

    for version in (b"12", b"8", b"14", b"013", b"13, 8", b"", None):
        answer = refused("version %r is 426" % version, 426, version=version)
        equal("26 handshake: version %r is told 13" % version, "13", answer.get("sec-websocket-version"))
    for name, key in (("no key", None), ("an empty key", b""), ("15 bytes", base64.b64encode(bytes(15))),
                      ("17 bytes", base64.b64encode(bytes(17))), ("no base64", b"!" * 24), ("no padding", b"A" * 24),
                      ("16 bytes, unpadded", b"A" * 22), ("20 KB", b"A" * 20000)):
        refused("key: %s" % name, 400, key=key)
    refused("two keys", 400, more=b"Sec-WebSocket-Key: " + KEY + b"\r\n")
    refused("POST", 400, method=b"POST")
    refused("with a body", 400, more=b"Content-Length: 5\r\n")
    refused("with a chunked body", 400, more=b"Transfer-Encoding: chunked\r\n")
    equal("26 handshake: of HTTP/1.0 it is a plain request", 200, refused("HTTP/1.0", 200, http=b"1.0").status)
    refused("close before accept is 403", 403, path=b"/close")
    answer = refused("a denial has its status", 418, path=b"/deny")
    equal("26 handshake: a denial has fields and a body", ("tea", b"short and stout"), (answer.get("x-why"), answer.body))
    refused("an exception before accept is 500", 500, path=b"/raise")
    refused("a return before accept is 500", 500, path=b"/return")
    with Client() as client:
        client.send(handshake(b"/deny") + handshake(b"/close"))
        equal("26 handshake: the connection goes on after a denial", [418, 403], [client.response().status for _ in range(2)])
    ask("/clear")
    with Socket(b"/echo", b"Sec-WebSocket-Protocol: a, b\r\nSec-WebSocket-Protocol: c\r\n"
                b"Sec-WebSocket-Extensions: permessage-deflate\r\n") as ws:
        accept = base64.b64encode(hashlib.sha1(KEY + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        lines = ws.head.lower().split(b"\r\n")
        expect("accept: 101", lines[0].startswith(b"http/1.1 101 "), ws.head)
        expect("accept: the key is answered", b"sec-websocket-accept: " + accept.lower() in lines, ws.head)
        expect("accept: a subprotocol and a field of the program", b"sec-websocket-protocol: c" in lines and b"x-accepted: yes" in lines, ws.head)
        expect("accept: no extension, no Connection of the program",
               b"extensions" not in ws.head.lower() and b"connection: close" not in lines, ws.head)
    with Socket(b"/scope?a=%20b", b"Sec-WebSocket-Protocol: x,y\r\n") as ws:
        scope = json.loads(ws.message()[1])
        equal("scope", {"type": "websocket", "http_version": "1.1", "scheme": "ws", "path": "/scope", "query_string": "b'a=%20b'",
                        "root_path": "", "server": ["localhost", 80], "subprotocols": ["x", "y"], "extensions": {"websocket.http.response": {}},
                        "asgi": {"version": "3.0", "spec_version": "2.4"}, "state": {}}, scope)
    told("accept: clients that leave", (1006, ""), (1006, ""))
    with Client() as client:
        client.send(handshake(b"/late"))
        time.sleep(0.05)
    told("26 a client that leaves before it is accepted", (1006, "late"))


def group_frames():
    """Fragments, control frames between them, one byte at a time."""
    with Socket() as ws:
        for size in (0, 1, 125, 126, 65535, 65536, 262144 + 5):
            payload = random.Random(size).randbytes(size)
            ws.send(BINARY, payload)
            expect("binary: %d bytes come back" % size, ws.message() == (BINARY, payload))
        for _ in range(10):             # a stall would end with a ping
            ws.send(BINARY, bytes(1000000))
            expect("binary: 1,000,000 bytes come back at once", ws.message() == (BINARY, bytes(1000000)))
        text = "h\u00e9 \u20ac \U0001f600".encode()
        ws.send(TEXT, text)
        equal("text comes back", (TEXT, text), ws.message())
        for at in range(len(text) + 1):
            ws.sock.sendall(frame(TEXT, text[:at], fin=False) + frame(MORE, b"", fin=False) + frame(MORE, text[at:]))
        equal("text split anywhere, also within a character", [(TEXT, text)] * (len(text) + 1),
              [ws.message() for _ in range(len(text) + 1)])
        ws.sock.sendall(frame(BINARY, b"a", fin=False) + frame(PING, b"p" * 125) + frame(MORE, b"b", fin=False)
                        + frame(PONG, b"unasked") + frame(MORE, b"c"))
        equal("control frames within a message", [(PONG, b"p" * 125), (BINARY, b"abc")], [ws.message() for _ in range(2)])
        whole = frame(TEXT, b"abc", fin=False) + frame(PING, b"") + frame(MORE, b"d" * 200)
        for at in range(len(whole)):
            ws.sock.sendall(whole[at:at + 1])
        equal("one byte at a time", [(PONG, b""), (TEXT, b"abc" + b"d" * 200)], [ws.message() for _ in range(2)])
        for _ in range(3000):
            ws.sock.sendall(frame(BINARY) * 10)
            for _ in range(10):
                if ws.message() != (BINARY, b""):
                    raise Ended("an empty message changed")
            if SANITIZED:
                break
        expect("empty messages in turn", True)
        ws.send(CLOSE, struct.pack("!H", 3000) + "bye \u20ac".encode())
        equal("26 close: code and reason are answered", (CLOSE, 3000, "bye \u20ac"), ws.message())
        expect("26 close: the connection ends within 1 s", ws.ended(1))
    told("26 close", (3000, "bye \u20ac"))
    with Socket() as ws:
        ws.send(CLOSE)
        equal("close without a code: answered so", (CLOSE, None, ""), ws.message())
    told("close without a code", (1005, ""))
    with Socket(b"/bye?4999") as ws:
        equal("close of the program: code and reason", (CLOSE, 4999, "so it is"), ws.message())
        ws.send(CLOSE, struct.pack("!H", 4999))
        expect("26 close of the program, answered: the end within 1 s", ws.ended(1))
    told("close of the program", (4999, "bye"))
    start = time.monotonic()
    with Socket(b"/bye") as ws:
        ws.message()
        ws.sock.sendall(frame(TEXT, b"too late") * 1000)
        expect("26 close of the program, not answered: the end", ws.ended(10))
    expect("26 close of the program, not answered: soon", time.monotonic() - start < (10 if SANITIZED else 3), time.monotonic() - start)
    ask("/clear")
    with Socket() as ws:
        ws.send(TEXT, b"x")
        ws.message()
    told("26 a client that leaves", (1006, ""))
    with Socket(b"/return-open") as ws:
        equal("a return: closed with 1000", (CLOSE, 1000, ""), ws.message())
    with Socket(b"/throw") as ws:
        equal("an exception: closed with 1011", (CLOSE, 1011, ""), ws.message())
    with Socket(b"/both") as ws:
        equal("three messages at once do not mix", [b"a" * 300000, b"b" * 300000, b"c" * 300000],
              sorted(ws.message()[1] for _ in range(3)))


def group_wrong():
    """What breaks the protocol: closed with the code of RFC 6455, section 7.4, and the program is told."""
    def wrong(name, code, *pieces):
        with Socket() as ws:
            for piece in pieces:
                ws.sock.sendall(piece)
            equal("%s is %d" % (name, code), (CLOSE, code, ""), ws.message())
            ws.send(CLOSE, struct.pack("!H", code))
            expect("%s: the connection ends" % name, ws.ended(10))
        told(name, (code, ""))

    ask("/clear")
    wrong("a frame that is not masked", 1002, frame(TEXT, b"hello", masked=False))
    for bit in (1, 2, 4):
        wrong("reserved bit %d" % bit, 1002, frame(TEXT, b"hello", rsv=bit))
    for opcode in (3, 7, 11, 15):
        wrong("reserved opcode %d" % opcode, 1002, frame(opcode, b"x"))
    wrong("a continuation of nothing", 1002, frame(MORE, b"x"))
    wrong("a message within a message", 1002, frame(TEXT, b"x", fin=False), frame(TEXT, b"y"))
    for kind, name in ((PING, "ping"), (PONG, "pong"), (CLOSE, "close")):
        wrong("a %s of 126 bytes" % name, 1002, frame(kind, b"\x03\xe8" + b"x" * 124))
        wrong("a %s in fragments" % name, 1002, frame(kind, b"\x03\xe8", fin=False))
    wrong("a length in more bytes than it needs, 2", 1002, frame(TEXT, b"x" * 125, length=2))
    wrong("a length in more bytes than it needs, 8", 1002, frame(TEXT, b"x" * 200, length=8))
    wrong("a length of 2^63", 1002, frame(BINARY, size=1 << 63, length=8))
    for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535):
        wrong("a close with %d" % code, 1002, frame(CLOSE, struct.pack("!H", code)))
    wrong("a close that is no UTF-8", 1007, frame(CLOSE, b"\x03\xe8\xff"))
    for name, text in (("ff", b"ok\xff"), ("overlong", b"\xc0\xaf"), ("a surrogate", b"\xed\xa0\x80"), ("past U+10FFFF", b"\xf4\x90\x80\x80"),
                       ("cut short", b"\xe2\x82")):
        wrong("text that is no UTF-8: %s" % name, 1007, frame(TEXT, text))
        wrong("text that is no UTF-8: %s, split" % name, 1007, frame(TEXT, text[:1], fin=False), frame(MORE, text[1:]))
    limit = 1 << 20
    wrong("one byte past the limit", 1009, frame(BINARY, b"x", size=limit + 1))
    wrong("one byte past the limit in fragments", 1009, frame(BINARY, bytes(limit // 2), fin=False), frame(MORE, bytes(limit // 2), fin=False),
          frame(MORE, b"x"))
    wrong("a length of 2^62", 1009, frame(BINARY, b"x", size=1 << 62, length=8))
    with Socket() as ws:
        ws.send(BINARY, bytes(limit))
        expect("as much as the limit comes back", ws.message() == (BINARY, bytes(limit)))
    ask("/clear")


def group_pressure():
    """Memory is bounded in both directions."""
    def grown(name, before, most):
        kib = rss_kib() - before
        expect("%s (%d KiB more)" % (name, kib), SANITIZED or kib < most, "too much")

    before = rss_kib()
    with Socket(b"/send?" + b",".join([b"50000000"] * 3)) as ws:
        time.sleep(0.5)
        grown("150 MB to a client that does not read", before, 2048)
    before = rss_kib()
    for name, piece in (("messages", frame(BINARY, bytes(60000))), ("empty messages", frame(TEXT) * 5000), ("pings", frame(PING, bytes(125)) * 300)):
        with Socket(b"/idle" if name != "pings" else b"/echo") as ws:
            ws.sock.settimeout(0.5)
            sent = 0
            try:
                while sent < 64 * MIB:
                    sent += ws.sock.send(piece)
            except OSError:
                pass
            expect("%s to who does not read stop (%d KiB)" % (name, sent // 1024), sent < 16 * MIB, "they do not")
            grown("%s to who does not read" % name, before, 2048)
    ask("/clear")


def group_crash():
    """The worker dies: its WebSockets end with 1011."""
    others = [Socket() for _ in range(5)]
    others[0].send(TEXT, b"crash")
    equal("a program that crashes: 1011 for all", [(CLOSE, 1011, "")] * 5, [ws.message() for ws in others])
    for ws in others:
        ws.sock.close()


def group_hostile():
    """84: what a program may write for a WebSocket: the worker is killed, the client told with 1011."""
    for name, reason, frames in (
            ("a message of two kinds", "a message of two kinds", "13,0,61&14,1,62"),
            ("a body", "a body through a WebSocket", "11,0,61"),
            ("an end", "a body through a WebSocket", "11,1,"),
            ("a second head", "two heads", "10,0,65000000"),
            ("a message past its credit", "that it had no credit for", "14,1,x196597"),
            ("a close of no bytes", "closed a WebSocket with 0,", "15,0,"),
            ("a close of one byte", "closed a WebSocket with 0,", "15,0,e8"),
            ("a close with 1005", "with 1005,", "15,0,ed03"), ("a close with 1006", "with 1006,", "15,0,ee03"),
            ("a close with 65535", "with 65535,", "15,0,ffff"),
            ("a close whose reason is no UTF-8", "with 1000,", "15,0,e803ff"),
            ("a close whose reason is too long", "with 1000,", "15,0,e803" + "61" * 124)):
        at = os.path.getsize(CONSOLE)
        with Socket(b"/frames?" + frames.encode()) as ws:
            last = ws.message()
            while last[0] != CLOSE:
                last = ws.message()
        equal("84 %s: 1011" % name, (CLOSE, 1011, ""), last)
        expect("84 %s: on the console" % name, console_since(at, reason), "it lacks " + reason)
        equal("84 %s: another worker serves" % name, 200, ask("/").status)


def group_silence():
    """With websocket_ping_ms=300: a client is asked, and closed if it does not answer."""
    ask("/clear")
    with Socket() as ws:
        for _ in range(3):
            kind, data = ws.message()
            if kind != PING:
                break
            ws.send(PONG, data)
        equal("a client that answers pings stays", PING, kind)
        start = time.monotonic()
        last = [ws.message() for _ in range(2)]
        equal("a client that does not is closed", [(PING, b""), (CLOSE, 1011, "no answer to a ping")], last)
        expect("soon", time.monotonic() - start < 5, time.monotonic() - start)
        ws.send(CLOSE, struct.pack("!H", 1011))
        expect("and the connection ends", ws.ended(5))
    told("silence", (1006, ""))


def group_many(count=10000):
    """26: many idle sockets, at few KiB each, all of which still answer."""
    count = int(os.environ.get("MANY", count))
    before = rss_kib()
    sockets = [Socket() for _ in range(count)]
    kib = (rss_kib() - before) / count
    expect("26 %d idle sockets (%.1f KiB each)" % (count, kib), SANITIZED or kib < 16, "more than 16")
    for ws in sockets:
        ws.send(TEXT, b"here")
    expect("26 %d idle sockets: all answer" % count, [ws.message() for ws in sockets] == [(TEXT, b"here")] * count)
    for ws in sockets:
        ws.sock.close()


if __name__ == "__main__":
    main()

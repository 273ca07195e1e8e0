"""Drives the HTTP front with bytes of its own making; run by http.sh, and the base of frames.py.

    http_raw.py SOCKET CONSOLE PID GROUP...

SOCKET is the front's, a path, tcp:HOST:PORT or hybrid:PATH:PORT; behind it runs apps/echo.
CONSOLE is the file that the agent logs to, PID the agent. Each check is one line, `ok NAME` or `FAIL NAME: why`. It reads responses with
a parser of its own, so that a mistake of the agent's cannot hide on both ends.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import re
import select
import socket
import struct
import sys
import termios
import threading
import time

SOCKET, CONSOLE, PID = sys.argv[1:4]
MIB = 1 << 20
SANITIZED = bool(os.environ.get("SANITIZED"))
HOST = b"Host: guest\r\n"


def report(name, why=None):
    print("ok " + name if why is None else "FAIL %s: %s" % (name, str(why).replace("\n", " ")[:500]),
          flush=True)


def expect(name, condition, why="it is not so"):
    report(name, None if condition else why)


def equal(name, expected, actual):
    expect(name, expected == actual, "expected %.200r, got %.200r" % (expected, actual))


# ---- A client ---------------------------------------------------------------------------

class Ended(Exception):
    """The agent closed the connection where more was due."""


class Response:
    def __init__(self, version, status, headers):
        self.version, self.status, self.headers, self.body = version, status, headers, b""

    def get(self, name, default=None):
        return next((value for key, value in self.headers if key == name), default)


def connect(where):
    kind, _, rest = where.partition(":")
    place, _, port = rest.rpartition(":")
    if kind == "tcp":
        sock = socket.create_connection((place, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(place if kind == "hybrid" else where)      # waits while the queue is full, as it blocks still
    if kind == "hybrid":
        sock.sendall(b"CONNECT %s\n" % port.encode())
        while sock.recv(1) not in (b"\n", b""):
            pass
    return sock


class Client:
    def __init__(self, timeout=30):
        self.sock = connect(SOCKET)
        self.sock.settimeout(timeout)
        self.data = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def send(self, data):
        """All of it, or as much as is taken before the other side hangs up."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)

    def send_bytes(self, data, ends=True):
        """One byte at a time: each is read by the agent before the next is sent. An answer ends it."""
        room = bytearray(4)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for at in range(len(data)):
                self.sock.sendall(data[at:at + 1])
                end = time.monotonic() + 10
                if self.sock.family == socket.AF_INET:      # what it tells is not what was read
                    time.sleep(0.0003)
                while self.sock.family == socket.AF_UNIX and struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(room)))[0]:
                    if time.monotonic() > end:
                        raise TimeoutError("byte %d is not read" % at)
                    time.sleep(0.00003)
                if ends and at % 16 == 15 and self.has_answer():
                    break

    def has_answer(self):
        return bool(select.select([self.sock], [], [], 0)[0])

    def fill(self):
        more = self.sock.recv(65536)
        if not more:
            raise Ended("after %.200r" % self.data)
        self.data += more

    def until(self, mark):
        while mark not in self.data:
            self.fill()
        found, _, self.data = self.data.partition(mark)
        return found

    def exactly(self, count):
        parts = [self.data[:count]]
        self.data = self.data[count:]
        missing = count - len(parts[0])
        while missing:
            part = self.sock.recv(min(missing, MIB))
            if not part:
                raise Ended("%d bytes are missing" % missing)
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def rest(self):
        """Everything up to the end of the connection."""
        parts = [self.data]
        self.data = b""
        with contextlib.suppress(ConnectionResetError):
            while parts[-1] or len(parts) == 1:
                parts.append(self.sock.recv(MIB))
        return b"".join(parts)

    def is_ended(self):
        return self.rest() == b""

    def head(self):
        lines = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/(1\.[01]) (\d{3}) ([\x20-\x7e]*)", lines[0])
        if not match:
            raise ValueError("status line %r" % lines[0])
        headers = []
        for line in lines[1:]:
            field = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*", line)
            if not field:
                raise ValueError("field line %r" % line)
            headers.append((field[1].lower(), field[2]))
        return Response(match[1], int(match[2]), headers)

    def chunk(self):
        size = int(self.until(b"\r\n"), 16)
        data = self.exactly(size)
        if self.exactly(2) != b"\r\n":
            raise ValueError("a chunk does not end in CR LF")
        return data

    def response(self, method="GET"):
        found = self.head()
        length, coding = found.get("content-length"), found.get("transfer-encoding")
        if method == "HEAD" or found.status < 200 or found.status in (204, 304):
            return found
        if coding is not None and length is not None:
            raise ValueError("both a length and a transfer coding")
        if coding == "chunked":
            chunks = [self.chunk()]
            while chunks[-1]:
                chunks.append(self.chunk())
            found.body = b"".join(chunks)
        elif length is not None:
            found.body = self.exactly(int(length))
        else:
            found.body = self.rest()
        return found

    def ask(self, target, method="GET", headers=b"", body=b""):
        if body:
            headers += b"Content-Length: %d\r\n" % len(body)
        self.send(b"%s %s HTTP/1.1\r\n%s%s\r\n%s"
                  % (method.encode(), target.encode(), HOST, headers, body))
        return self.response(method)


def ask(target, *args):
    with Client() as client:
        return client.ask(target, *args)


def counts():
    """What the program has seen, this request not counted."""
    found = json.loads(ask("/counts").body)
    counts.asked += 1
    return found["begun"] - counts.asked, found["whole"], found["disconnects"]


counts.asked = 0


def seen_soon(index, value, seconds=5):
    """Waits until a count of the program has this value; returns what it is in the end."""
    end = time.monotonic() + seconds
    while counts()[index] != value and time.monotonic() < end:
        time.sleep(0.02)
    return counts()[index]


def rss_kib():
    with open("/proc/%s/status" % PID) as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])


def descriptors():
    return len(os.listdir("/proc/%s/fd" % PID))


def settled(value, expected, seconds=5):
    """The value in the end, which may take a moment to become what is expected."""
    end = time.monotonic() + seconds
    while value() != expected and time.monotonic() < end:
        time.sleep(0.02)
    return value()


# ---- Refusals ---------------------------------------------------------------------------

REFUSAL = re.compile(r"agent\[[\d.]+\]: http: refused with (\d+): (.*)")


class Log:
    """The refusals on the console. A message that repeats the one before it is folded there."""

    def __init__(self):
        self.at = 0
        self.last = None
        self.fresh()

    def fresh(self):
        with open(CONSOLE, "rb") as file:
            file.seek(self.at)
            text = file.read()
        self.at += len(text)
        found = REFUSAL.findall(text.decode("utf-8", "replace"))
        if found:
            self.last = found[-1]
        return found


def refused(log, raw, statuses, begun, way):
    """None, or what is wrong with the way in which this request is refused."""
    before = counts()
    log.fresh()
    last = log.last
    with Client() as client:
        (client.send_bytes if way == "bytes" else client.send)(raw)
        try:
            answer = client.response()
        except Exception as exc:
            return "no answer: %r" % exc
        if answer.status not in statuses:
            return "status %d: %.200r" % (answer.status, answer.body)
        if answer.get("connection") != "close":
            return "Connection is %r" % answer.get("connection")
        reason = answer.body.decode().rstrip("\n")
        if not 8 <= len(reason) <= 200 or "\n" in reason:
            return "the reason is %.200r" % reason
        if not client.is_ended():
            return "more comes after the answer"
    lines, this = log.fresh(), (str(answer.status), reason)
    if lines != [this] and not (lines == [] and last == this):
        return "logged as %r, answered %r" % (lines, this)
    after = counts()
    if after[0] - before[0] != begun:
        return "%d requests reached the program, not %d" % (after[0] - before[0], begun)
    if after[1] != before[1]:
        return "the program took it for a whole request"
    return None


def refuse(cases):
    """cases: name, request, expected statuses, and whether its head is good enough to be
    handed on."""
    log = Log()
    for name, raw, statuses, *more in cases:
        statuses = statuses if isinstance(statuses, tuple) else (statuses,)
        begun = 1 if more else 0
        for way in ("whole", "bytes") if len(raw) < 2000 else ("whole",):
            why = refused(log, raw, statuses, begun, way)
            if why:
                break
        report(name, None if why is None else "(sent in %s) %s" % (way, why))


def accept(cases):
    """cases: name, request."""
    for name, raw in cases:
        for way in ("whole", "bytes"):
            with Client() as client:
                (client.send_bytes if way == "bytes" else client.send)(raw)
                try:
                    answer = client.response()
                    why = None if answer.status == 200 else "status %d" % answer.status
                except Exception as exc:
                    why = repr(exc)
            if why:
                break
        report(name, None if why is None else "(sent in %s) %s" % (way, why))


def get(fields, version=b"HTTP/1.1", target=b"/"):
    return b"GET " + target + b" " + version + b"\r\n" + fields + b"\r\n"


def post(fields, body=b"hello"):
    return b"POST / HTTP/1.1\r\n" + HOST + fields + b"\r\n" + body


CHUNKS = b"5\r\nhello\r\n0\r\n\r\n"


def chunked(body):
    return post(b"Transfer-Encoding: chunked\r\n", body)


def group_parser():
    """What strict llhttp lets through and a server must not."""
    refuse([
        ("P1 no version, CR LF, fields and a body", b"POST /\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello", (400, 505)),
        ("P1 no version, LF, fields and a body", b"POST /\n" + HOST + b"Content-Length: 5\r\n\r\nhello", (400, 505)),
        ("P1 no version, alone", b"GET /\r\n\r\n", (400, 505)),
        ("P1 no version, LF alone", b"GET /\n\n", (400, 505)),
        ("P1 no version, space", b"GET / \r\n" + HOST + b"\r\n", (400, 505)),
        ("P2 no Host", get(b"X: y\r\n"), 400),
        ("P2 two Host", get(HOST + HOST), 400),
        ("P2 a bad Host", get(b"Host: a b\r\n"), 400),
        ("P3 HTTP/1.0 with Transfer-Encoding", b"POST / HTTP/1.0\r\n" + HOST
         + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS, 400),
        ("P3 HTTP/1.0 with Transfer-Encoding, keep-alive", b"POST / HTTP/1.0\r\n" + HOST
         + b"Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS, 400),
        ("P4 gzip, chunked", post(b"Transfer-Encoding: gzip, chunked\r\n", CHUNKS), (400, 501)),
        ("P5 A23 PRI", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 501),
        ("P5 A23 PRI with Host", b"PRI * HTTP/1.1\r\n" + HOST + b"\r\n", 501),
        ("P5 A23 CONNECT", b"CONNECT guest:80 HTTP/1.1\r\n" + HOST + b"\r\n", 501),
        ("P5 A23 CONNECT with a coding", b"CONNECT guest:80 HTTP/1.1\r\n" + HOST
         + b"Transfer-Encoding: gzip\r\n\r\nhello", 501),
        ("P5 A23 CONNECT of a path", b"CONNECT / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
        ("P5 A23 TRACE", b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    ])
    refuse([("26 a WebSocket request with a body",
             post(b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n", b"hello"), 400)])
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    for name, fields, body in (
            ("with a length", b"Content-Length: 5\r\n", b"hello"),
            ("with chunks", b"Transfer-Encoding: chunked\r\n", CHUNKS)):
        with Client() as client:
            client.send(post(upgrade + fields, body) + get(HOST, target=b"/second"))
            first, second = client.response(), client.response()
            equal("P6 upgrade %s: the body is the body" % name, (200, 5),
                  (first.status, json.loads(first.body)["body_bytes"]))
            equal("P6 upgrade %s: the next request is itself" % name, "/second",
                  json.loads(second.body)["path"])


def group_lengths():
    coding = b"Transfer-Encoding: chunked\r\n"
    length = b"Content-Length: 5\r\n"
    refuse([
        ("A1 length, then coding", post(length + coding, CHUNKS), 400),
        ("A1 coding, then length", post(coding + length, CHUNKS), 400),
        ("A1 coding and length 0", post(coding + b"Content-Length: 0\r\n", CHUNKS), 400),
        ("A1 both in a GET", get(HOST + length + coding), 400),
        ("A2 chunked twice", post(coding + coding, CHUNKS), (400, 501)),
        ("A2 chunked, then identity", post(coding + b"Transfer-Encoding: identity\r\n", CHUNKS), (400, 501)),
        ("A2 identity, then chunked", post(b"Transfer-Encoding: identity\r\n" + coding, CHUNKS), (400, 501)),
        ("A2 gzip, then chunked", post(b"Transfer-Encoding: gzip\r\n" + coding, CHUNKS), (400, 501)),
    ] + [("A3 coding %r" % value.decode("latin-1"),
          post(b"Transfer-Encoding: " + value + b"\r\n", CHUNKS), (400, 501))
         for value in (b"xchunked", b"chunked, identity", b"gzip, chunked", b"chunked, chunked", b"identity",
                       b"chun\tked", b"\tchunked\x0b", b"chunked\x0b", b"\x0bchunked", b"chun\x0bked",
                       b"chunked\0", b"\0chunked", b"chun\0ked", b"chunked\x0c", b"chunked;q=1",
                       b"\"chunked\"", b"'chunked'", b"", b",chunked", b"chunked,", b"chunked gzip", b"chunke")]
      + [("A4 length %r" % value.decode("latin-1"), post(b"Content-Length: " + value + b"\r\n"), 400)
         for value in (b"+5", b"-1", b"-0", b"0x5", b"5,5", b"5, 5", b"5 5", b"99999999999999999999",
                       b"18446744073709551621", b"9223372036854775808", b"", b" ", b"5a", b"a", b"5.0",
                       b"5;", b"5\t5", b"\xb2", b"5_0", b"1e1")]
      + [("A4 two lengths, the same", post(length + length), 400),
         ("A4 two lengths, not the same", post(length + b"Content-Length: 6\r\n"), 400)])
    accept([
        ("A3 coding with white space around", post(b"Transfer-Encoding: \t chunked \r\n", CHUNKS)),
        ("A3 coding in capitals", post(b"TRANSFER-ENCODING: CHUNKED\r\n", CHUNKS)),
        ("A4 length with zeros in front", post(b"Content-Length: 0005\r\n")),
        ("A4 length with white space around", post(b"Content-Length: \t 5 \r\n")),
    ])


def group_lines():
    begins = b"GET / HTTP/1.1"
    refuse([
        ("A5 LF after the request line", begins + b"\n" + HOST + b"\r\n", 400),
        ("A5 LF after a field", begins + b"\r\nHost: guest\nX: y\r\n\r\n", 400),
        ("A5 LF after the last field", begins + b"\r\nHost: guest\n\r\n", 400),
        ("A5 LF for the empty line", begins + b"\r\n" + HOST + b"\n", 400),
        ("A5 LF everywhere", begins + b"\nHost: guest\n\n", 400),
        ("A5 LF in a target", b"GET /a\nb HTTP/1.1\r\n" + HOST + b"\r\n", (400, 505)),
        ("A5 LF in a name", begins + b"\r\n" + HOST + b"X\nY: z\r\n\r\n", 400),
        ("A5 LF after a method", b"GET\n/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        ("A5 CR after the request line", begins + b"\r" + HOST + b"\r\n", 400),
        ("A5 CR in a value", begins + b"\r\n" + HOST + b"X: a\rb\r\n\r\n", 400),
        ("A5 CR before CR LF", begins + b"\r\n" + HOST + b"X: a\r\r\n\r\n", 400),
        ("A5 CR in a name", begins + b"\r\n" + HOST + b"X\rY: z\r\n\r\n", 400),
        ("A5 CR in a target", b"GET /a\rb HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        ("A5 CR for the empty line", begins + b"\r\n" + HOST + b"\rX", 400),
        ("A5 CR CR LF for the empty line", begins + b"\r\n" + HOST + b"\r\r\n", 400),
        ("A5 LF after a chunk's size", chunked(b"5\nhello\r\n0\r\n\r\n"), 400, True),
        ("A5 LF after a chunk's bytes", chunked(b"5\r\nhello\n0\r\n\r\n"), 400, True),
        ("A5 LF after the last chunk's size", chunked(b"5\r\nhello\r\n0\n\r\n"), 400, True),
        ("A5 LF for the last line", chunked(b"5\r\nhello\r\n0\r\n\n"), 400, True),
        ("A5 LF after a chunk's extension", chunked(b"5;a=b\nhello\r\n0\r\n\r\n"), 400, True),
        ("A5 CR after a chunk's size", chunked(b"5\rhello\r\n0\r\n\r\n"), 400, True),
        ("A5 CR after a chunk's bytes", chunked(b"5\r\nhello\r0\r\n\r\n"), 400, True),
        ("A5 CR in a chunk's extension", chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n"), 400, True),
        ("A5 nothing after a chunk's bytes", chunked(b"5\r\nhello0\r\n\r\n"), 400, True),
        ("A5 LF after a trailer", chunked(b"5\r\nhello\r\n0\r\nX: y\n\r\n"), 400, True),
        ("A5 CR in a trailer", chunked(b"5\r\nhello\r\n0\r\nX: a\rb\r\n\r\n"), 400, True),
        ("A5 LF for the line after a trailer", chunked(b"5\r\nhello\r\n0\r\nX: y\r\n\n"), 400, True),
        ("A6 folded by space", begins + b"\r\n" + HOST + b"X: a\r\n b\r\n\r\n", 400),
        ("A6 folded by tab", begins + b"\r\n" + HOST + b"X: a\r\n\tb\r\n\r\n", 400),
        ("A6 Host folded", begins + b"\r\nHost: guest\r\n .org\r\n\r\n", 400),
        ("A6 Host folded from its start", begins + b"\r\nHost:\r\n guest\r\n\r\n", 400),
        ("A6 length folded", post(b"Content-Length: 5\r\n 5\r\n"), 400),
        ("A6 coding folded", post(b"Transfer-Encoding:\r\n chunked\r\n", CHUNKS), 400),
        ("A6 a line of white space", begins + b"\r\n" + HOST + b" \r\nX: y\r\n\r\n", 400),
        ("A7 space before the colon of Host", begins + b"\r\nHost : guest\r\n\r\n", 400),
        ("A7 space before the colon of the length", post(b"Content-Length : 5\r\n"), 400),
        ("A7 space before the colon of the coding", post(b"Transfer-Encoding : chunked\r\n", CHUNKS), 400),
        ("A7 tab before a colon", begins + b"\r\n" + HOST + b"X\t: y\r\n\r\n", 400),
        ("A8 space before the first field", begins + b"\r\n " + HOST + b"\r\n", 400),
        ("A8 tab before the first field", begins + b"\r\n\t" + HOST + b"\r\n", 400),
        ("A8 space, then a good Host", begins + b"\r\n X: y\r\n" + HOST + b"\r\n", 400),
    ])


def group_bytes():
    controls = [byte for byte in range(32) if byte not in (9, 10, 13)] + [127]
    others = [byte for byte in range(32, 256) if byte > 126 or chr(byte) in "\"(),/;<=>?@[\\]{} "]
    refuse([("A9 byte 0x%02x in a value" % byte, get(HOST + b"X: a%cb\r\n" % byte), 400) for byte in controls]
           + [("A9 byte 0x%02x in a name" % byte, get(HOST + b"X%cY: z\r\n" % byte), 400)
              for byte in controls + [9] + [byte for byte in others if byte < 127 or byte in (0x80, 0xa0, 0xc3, 0xff)]]
           + [("A9 byte 0x%02x in a target" % byte, get(HOST, target=b"/a%cb" % byte), 400) for byte in controls]
           + [("A9 no name", get(HOST + b": y\r\n"), 400),
              ("A9 no colon", get(HOST + b"X\r\n"), 400),
              ("A9 NUL first", b"\0" + get(HOST), 400),
              ("A9 NUL in the method", b"GE\0T / HTTP/1.1\r\n" + HOST + b"\r\n", 400)])
    accept([("A9 a value may hold tab and bytes past ASCII", get(HOST + b"X: a\tb\x80\xff\r\n")),
            ("A9 a value may be empty", get(HOST + b"X:\r\nY: \r\n")),
            ("A9 a name may hold any token's bytes", get(HOST + b"!#$%&'*+-.^_`|~09azAZ: y\r\n"))])


def group_versions():
    refuse([("A10 %s" % text.decode(), b"GET / " + text + b"\r\n" + HOST + b"\r\n", (400, 505))
            for text in (b"HTTP/0.9", b"HTTP/9.9", b"HTTP/2.0", b"HTTP/1.2", b"HTTP/3", b"HTTP/1", b"HTTP/1.",
                         b"HTTP/1.10", b"HTTP/01.1", b"HTTP/11.1", b"HTTP/1,1", b"HTTP 1.1", b"HTTP/-1.1",
                         b"http/1.1", b"Http/1.1", b"HTTPS/1.1", b"ICE/1.0", b"RTSP/1.0", b"XTTP/1.1",
                         b"HTTP/1.1 x", b"HTTP/\xef\xbc\x91.1")]
           + [("A10 space after the version", get(HOST, b"HTTP/1.1 "), (400, 505)),
              ("A10 tab after the version", get(HOST, b"HTTP/1.1\t"), (400, 505)),
              ("A10 tabs for spaces", b"GET\t/\tHTTP/1.1\r\n" + HOST + b"\r\n", 400),
              ("A10 a space in the target", get(HOST, target=b"/a b"), (400, 505)),
              ("A10 space before the method", b" " + get(HOST), 400),
              ("A10 no method", b"/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
              ("A10 a method in small letters", b"get / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
              ("A10 an unknown method", b"FETCH / HTTP/1.1\r\n" + HOST + b"\r\n", (400, 501)),
              ("A10 a target without a slash", get(HOST, target=b"index"), 400),
              ("A10 a star for GET", get(HOST, target=b"*"), 400),
              ("A10 a fragment", get(HOST, target=b"/a#b"), 400),
              ("A10 TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32), 400)])
    refuse([("A11 no Host", get(b""), 400),
            ("A11 two Host, the same", get(HOST + HOST), 400),
            ("A11 two Host, not the same", get(HOST + b"hOST: other\r\n"), 400),
            ("A11 two Host in HTTP/1.0", get(HOST + HOST, b"HTTP/1.0"), 400),
            ("A11 two Host, one for an absolute target", get(HOST + HOST, target=b"http://guest/"), 400),
            ("A11 no Host for an absolute target", get(b"", target=b"http://guest/"), 400)]
           + [("A11 Host %r" % value.decode("latin-1"), get(b"Host: " + value + b"\r\n"), 400)
              for value in (b"", b"a b", b"a\tb", b"a/b", b"a?b", b"a#b", b"a\\b", b"a@b", b"http://a", b"a\"b", b"<a>",
                            b"{a}", b"a|b", b"a^b", b"a`b", b"\xe9", b"a, b", b"a:x", b"a:80:80", b"a:-1", b"a:+80",
                            b"[::1", b"::1]", b"[::1]x", b"[]", b"[g::1]", b"a[b]", b"a%zz", b"a%2", b"a%")]
           + [("A11 absolute target with host %r" % value.decode(), get(HOST, target=b"http://" + value + b"/"), 400)
              for value in (b"", b"a@b", b"a:x", b"[::1")])
    accept([("A11 Host %s" % value.decode(), get(b"Host: " + value + b"\r\n"))
            for value in (b"guest", b"guest:80", b"guest:", b"1.2.3.4", b"[::1]", b"[::ffff:1.2.3.4]:8080", b"a.b-c_d~",
                          b"a%41", b"\t guest ", b"GUEST")]
           + [("A11 none in HTTP/1.0", get(b"", b"HTTP/1.0")),
              ("A11 two empty lines before a request", b"\r\n\r\n" + get(HOST)),
              ("A11 OPTIONS *", b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n")])
    answer = json.loads(ask("http://other:8080/path?query").body)
    equal("A11 an absolute target's host comes before Host",
          ("/path", "query", ["host", "other:8080"]), (answer["path"], answer["query"], answer["headers"][0]))


def padded(size):
    """A request whose head is so long."""
    start, field = get(HOST)[:-2], b"X: %s\r\n"
    return start + field % (b"p" * (size - len(start) - len(field) + 2 - 2)) + b"\r\n"


def group_sizes():
    many = lambda count, name=b"X": get(HOST + b"%s: y\r\n" % name * (count - 1))
    refuse([
        ("A14 a target of 16 KiB + 1", get(HOST, target=b"/" + b"t" * 16384), 414),
        ("A14 a target of 1 MiB", get(HOST, target=b"/" + b"t" * MIB), 414),
        ("A14 a query of 16 KiB", get(HOST, target=b"/?" + b"q" * 16384), 414),
        ("A14 257 fields", many(257), 431),
        ("A14 257 fields of one connection", many(257, b"TE"), 431),
        ("A14 5,000 fields", many(5000), 431),
        ("A14 a head of 64 KiB + 1", padded(65537), 431),
        ("A14 a value of 1 MiB", get(HOST + b"X: " + b"v" * MIB + b"\r\n"), 431),
        ("A14 a name of 1 MiB", get(HOST + b"n" * MIB + b": v\r\n"), 431),
        ("A14 a method of 1 MiB", b"M" * MIB + b" / HTTP/1.1\r\n" + HOST + b"\r\n", (400, 431)),
        ("A14 empty lines without end", b"\r\n" * MIB, (400, 431)),
    ])
    for name, raw in (("a target of 16 KiB", get(HOST, target=b"/" + b"t" * 16383)), ("256 fields", many(256)),
                      ("a head of 64 KiB", padded(65536))):
        with Client() as client:
            client.send(raw)
            equal("A14 %s is taken" % name, 200, client.response().status)


def group_chunks():
    """What says how long a body's pieces are, and what stands around them."""
    ends = b"\r\n0\r\n\r\n"
    refuse([("A12 a chunk's size %r" % size.decode("latin-1"), chunked(size + b"\r\nhello" + ends), 400, True)
            for size in (b"10000000000000005", b"fffffffffffffffff", b"ffffffffffffffff5", b"0_5", b"5_", b"+5", b"-5",
                         b"0x5", b"5h", b"", b" 5", b"5 ", b"5\t", b"\t5", b"5,5", b"5.0", b"five", b"\xb25", b"5\0",
                         b"5;\0", b"5;a=\x01", b"5;a=\"b")]
           + [("A12 an extension that ends in LF", chunked(b"2;\nhi" + ends), 400, True),
              ("A12 an extension of 1 MiB", chunked(b"5;x=" + b"e" * MIB + b"\r\nhello" + ends), 400, True),
              ("A12 an extension's name of 1 MiB", chunked(b"5;" + b"e" * MIB + b"\r\nhello" + ends), 400, True),
              ("A12 an extension in quotes of 1 MiB", chunked(b"5;x=\"" + b"e" * MIB + b"\"\r\nhello" + ends), 400, True),
              ("A12 1,000 extensions", chunked(b"1;extension=1\r\na\r\n" * 1000 + b"0\r\n\r\n"), 400, True),
              ("A12 zeros without end", chunked(b"0" * MIB + b"5\r\nhello" + ends), 400, True),
              ("A12 zeros without end for the last", chunked(b"5\r\nhello\r\n" + b"0" * MIB + b"\r\n\r\n"), 400, True),
              ("A12 more bytes than the size", chunked(b"4\r\nhello" + ends), 400, True),
              ("A12 fewer bytes than the size", chunked(b"6\r\nhello" + ends), 400, True),
              ("A13 a trailer of 1 MiB", chunked(CHUNKS[:-2] + b"X: " + b"t" * MIB + b"\r\n\r\n"), 400, True),
              ("A13 a trailer's name of 1 MiB", chunked(CHUNKS[:-2] + b"t" * MIB + b": x\r\n\r\n"), 400, True),
              ("A13 5,000 trailers", chunked(CHUNKS[:-2] + b"X: y\r\n" * 5000 + b"\r\n"), 400, True),
              ("A13 a folded trailer", chunked(CHUNKS[:-2] + b"X: y\r\n z\r\n\r\n"), 400, True),
              ("A13 NUL in a trailer", chunked(CHUNKS[:-2] + b"X: y\0z\r\n\r\n"), 400, True)])
    accept([("A12 a size in 16 digits", chunked(b"0000000000000005\r\nhello" + ends)),
            ("A12 a size in letters, large and small", chunked(b"Aa\r\n" + b"b" * 170 + ends)),
            ("A12 extensions", chunked(b"5;a;b=c;d=\"e f\"\r\nhello\r\n0;last\r\n\r\n"))])
    for field in (b"Content-Length: 3", b"Host: evil", b"Transfer-Encoding: chunked", b"X-Forwarded-For: 1.2.3.4", b"Cookie: a=b"):
        for way in ("whole", "bytes"):
            with Client() as client:
                raw = chunked(CHUNKS[:-2] + field + b"\r\n\r\n")
                (client.send if way == "whole" else client.send_bytes)(raw)
                answer = client.response()
                found = json.loads(answer.body)["headers"] if answer.status == 200 else None
                why = "the program sees %r" % found if found and found != [["host", "guest"]] else \
                      None if found or answer.status == 400 else "status %d" % answer.status
                if why is None and found and client.ask("/next").status != 200:
                    why = "the next request fails"
            if why:
                break
        report("A13 a trailer %s is no header" % field.decode(), why)


def group_limits():
    """Under http_body_bytes=1048576."""
    over = MIB + 1
    refuse([
        ("A15 a length of 1 MiB + 1", post(b"Content-Length: %d\r\n" % over, b""), 413),
        ("A15 a length of 1 PB", post(b"Content-Length: 1000000000000000\r\n", b""), 413),
        ("A15 the longest length", post(b"Content-Length: 9223372036854775807\r\n", b""), 413),
        ("A15 a length that waits for 100", post(b"Expect: 100-continue\r\nContent-Length: %d\r\n" % over, b""), 413),
        ("A15 chunks of 1 MiB + 1", chunked(b"%x\r\n" % over + b"b" * over + b"\r\n0\r\n\r\n"), 413, True),
        ("A15 one chunk of 4 GiB", chunked(b"100000000\r\n" + b"b" * over), 413, True),
    ])
    for name, raw in (("a length of 1 MiB", post(b"Content-Length: %d\r\n" % MIB, b"b" * MIB)),
                      ("chunks of 1 MiB", chunked(b"%x\r\n" % MIB + b"b" * MIB + b"\r\n0\r\n\r\n"))):
        with Client() as client:
            client.send(raw)
            equal("A15 %s is taken" % name, MIB, json.loads(client.response().body)["body_bytes"])
    before = rss_kib()
    with Client(2) as client:
        client.send(post(b"Content-Length: 1000000000000\r\n", b""))
        equal("A15 the answer comes before the body", 413, client.head().status)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 64 * MIB:
                client.sock.sendall(bytes(MIB))
                sent += MIB
        grown = rss_kib() - before
        expect("A15 the body is not kept", SANITIZED or grown < 512, "%d MiB sent, %d KiB more" % (sent / MIB, grown))


# ---- A table for every kind of front --------------------------------------------------------

P = b"POST / HTTP/1.1\r\n" + HOST
CODING = b"Transfer-Encoding: chunked\r\n"
TABLE = [   # name, bytes, the statuses of the answers to them; after one of 400 and up the connection ends
    ("GET", get(HOST), 200),
    ("HTTP/1.0", get(b"", b"HTTP/1.0"), 200),
    ("two GET", get(HOST) + get(HOST), 200, 200),
    ("GET, then rubbish", get(HOST) + b"?\r\n\r\n", 200, 400),
    ("HEAD, then GET", b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n" + get(HOST), 200, 200),
    ("a length", P + b"Content-Length: 5\r\n\r\nhello" + get(HOST), 200, 200),
    ("chunks", P + CODING + b"\r\n" + CHUNKS + get(HOST), 200, 200),
    ("chunks with an extension and a trailer", P + CODING + b"\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n" + get(HOST), 200, 200),
    ("Expect: 100-continue", P + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello", 100, 200),
    ("OPTIONS *", b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    ("an absolute target", get(HOST, target=b"http://guest/x?y"), 200),
    ("an empty line before", b"\r\n" + get(HOST), 200),
    ("Connection: close, then GET", get(HOST + b"Connection: close\r\n") + get(HOST), 200),
    ("an IPv6 Host", get(b"Host: [::1]:80\r\n"), 200),
    ("1 length and coding", P + CODING + b"Content-Length: 5\r\n\r\n" + CHUNKS, 400),
    ("2 two codings", P + CODING + CODING + b"\r\n" + CHUNKS, 400),
    ("3 xchunked", P + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS, 501),
    ("3 chunked, identity", P + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKS, 400),
    ("3 gzip, chunked", P + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS, 501),
    ("3 VT after the coding", P + b"Transfer-Encoding: chunked\x0b\r\n\r\n" + CHUNKS, 400),
    ("3 coding in HTTP/1.0", b"POST / HTTP/1.0\r\n" + CODING + b"\r\n" + CHUNKS, 400),
    ("4 length +5", P + b"Content-Length: +5\r\n\r\nhello", 400),
    ("4 length -1", P + b"Content-Length: -1\r\n\r\n", 400),
    ("4 length 0x5", P + b"Content-Length: 0x5\r\n\r\nhello", 400),
    ("4 length 5,5", P + b"Content-Length: 5,5\r\n\r\nhello", 400),
    ("4 length 5 5", P + b"Content-Length: 5 5\r\n\r\nhello", 400),
    ("4 length of 20 digits", P + b"Content-Length: 99999999999999999999\r\n\r\n", 400),
    ("4 length empty", P + b"Content-Length:\r\n\r\n", 400),
    ("4 two lengths", P + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
    ("5 LF after the request line", b"GET / HTTP/1.1\n" + HOST + b"\r\n", 400),
    ("5 LF after a field", b"GET / HTTP/1.1\r\nHost: guest\n\r\n", 400),
    ("5 CR in a value", get(HOST + b"X: a\rb\r\n"), 400),
    ("5 CR after a chunk's size", P + CODING + b"\r\n5\rhello\r\n0\r\n\r\n", 400),
    ("5 LF after a trailer", P + CODING + b"\r\n5\r\nhello\r\n0\r\nX: y\n\r\n", 400),
    ("6 folded", get(HOST + b"X: a\r\n b\r\n"), 400),
    ("7 space before a colon", get(b"Host : guest\r\n"), 400),
    ("8 space before the first field", get(b" Host: guest\r\n"), 400),
    ("9 NUL in a value", get(HOST + b"X: a\0b\r\n"), 400),
    ("9 NUL in a name", get(HOST + b"X\0: b\r\n"), 400),
    ("9 DEL in a value", get(HOST + b"X: a\x7fb\r\n"), 400),
    ("9 a control byte in the target", get(HOST, target=b"/\x01"), 400),
    ("10 no version", b"GET /\r\n" + HOST + b"\r\n", 505),
    ("10 HTTP/0.9", get(HOST, b"HTTP/0.9"), 505),
    ("10 HTTP/9.9", get(HOST, b"HTTP/9.9"), 400),
    ("10 HTTP/2.0", get(HOST, b"HTTP/2.0"), 505),
    ("10 http/1.1", get(HOST, b"http/1.1"), 400),
    ("10 space after the version", get(HOST, b"HTTP/1.1 "), 400),
    ("11 no Host", get(b""), 400),
    ("11 two Host", get(HOST + HOST), 400),
    ("11 a bad Host", get(b"Host: a b\r\n"), 400),
    ("11 an empty Host", get(b"Host:\r\n"), 400),
    ("12 a chunk's size of 17 digits", P + CODING + b"\r\n10000000000000005\r\nhello\r\n0\r\n\r\n", 400),
    ("12 a chunk's size 0_2", P + CODING + b"\r\n0_2\r\nhi\r\n0\r\n\r\n", 400),
    ("12 a chunk's size +2", P + CODING + b"\r\n+2\r\nhi\r\n0\r\n\r\n", 400),
    ("12 an extension that ends in LF", P + CODING + b"\r\n2;\nhi\r\n0\r\n\r\n", 400),
    ("12 5 KiB of extension", P + CODING + b"\r\n2;" + b"e" * 5120 + b"\r\nhi\r\n0\r\n\r\n", 400),
    ("13 5 KiB of trailers", P + CODING + b"\r\n0\r\nX: " + b"t" * 5120 + b"\r\n\r\n", 400),
    ("14 a head of 80 KiB", get(HOST + b"X: " + b"y" * 81920 + b"\r\n"), 431),
    ("14 257 fields", get(HOST + b"X: y\r\n" * 256), 431),
    ("14 a target of 17 KiB", get(HOST, target=b"/" + b"t" * 17408), 414),
    ("21 another Expect", P + b"Expect: 200-ok\r\nContent-Length: 5\r\n\r\nhello", 417),
    ("23 CONNECT", b"CONNECT guest:80 HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    ("23 TRACE", b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    ("23 PRI", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 501),
    ("24 a star for GET", get(HOST, target=b"*"), 400),
    ("24 an absolute target without a host", get(HOST, target=b"http:///"), 400),
    ("24 another scheme", get(HOST, target=b"ftp://guest/"), 400),
    ("24 a fragment", get(HOST, target=b"/a#b"), 400),
    ("26 a WebSocket request with a body", P + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\nhi", 400),
    ("a method in small letters", b"get / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("an unknown method", b"FETCH / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32), 400),
]


def group_table():
    front = SOCKET.partition(":")[0] if ":" in SOCKET else "unix"
    for name, raw, *statuses in TABLE:
        why = None
        for way in ("whole", "bytes") if len(raw) < 400 else ("whole",):
            with Client() as client:
                if way == "whole":
                    client.send(raw)
                else:
                    client.send_bytes(raw, statuses[0] >= 400)
                try:
                    seen = []
                    for number in range(len(statuses)):
                        answer = client.response("HEAD" if raw.startswith(b"HEAD") and not number else "GET")
                        seen.append(answer.status)
                    if seen != statuses and not (statuses[0] == 100 and seen[0] == 200):
                        why = "statuses %r" % seen
                    elif answer.status >= 400 and answer.get("connection") != "close":
                        why = "it does not say that it closes"
                    elif (answer.status >= 400 or b"Connection: close" in raw) and not client.is_ended():
                        why = "more comes after the answer"
                except (Ended, OSError, ValueError) as exc:
                    why = repr(exc)
            if why:
                break
        report("table, %s: %s" % (front, name), why and "(sent in %s) %s, expected %r" % (way, why, statuses))
    expect("table, %s: %d requests" % (front, len(TABLE)), len(TABLE) >= 60)
    equal("table, %s: a good request after all that" % front, 200, ask("/").status)


# ---- What a program sees ------------------------------------------------------------------

def group_paths():
    for name, path in (("%ff", "/a%ffb"), ("an overlong slash", "/a%c0%afb"), ("an overlong NUL", "/%e0%80%80"),
                       ("a surrogate", "/%ed%a0%80"), ("past U+10FFFF", "/%f4%90%80%80"), ("%00", "/a%00b"),
                       ("a sequence cut short", "/%e2%82"), ("%0d%0a", "/a%0d%0ab"), ("dots", "/a/../%2e%2e/b")):
        answer = json.loads(ask(path).body)
        equal("L86 %s: answered by the program" % name, path, answer["raw_path"])
        text = re.sub(rb"%(..)", lambda m: bytes.fromhex(m[1].decode()), path.encode())
        try:
            expected = text.decode()
        except UnicodeDecodeError:
            expected = None
        expect("L86 %s: path is text" % name, answer["path"] == expected or (expected is None and "\ufffd" in answer["path"]),
               "%r" % answer["path"])
    answer = json.loads(ask("/caf%c3%a9?a=%ff&b=%00").body)
    equal("L86 UTF-8 is decoded, the query is not", ("/caf\u00e9", "a=%ff&b=%00"), (answer["path"], answer["query"]))
    for path in ("/a%", "/a%2", "/a%zz"):
        equal("L86 %s: kept as it is" % path, (path, path),
              tuple(json.loads(ask(path).body)[key] for key in ("raw_path", "path")))


def group_smuggling():
    """T4: nothing that was not parsed as a request reaches the program."""
    inner = get(HOST, target=b"/inner")
    for name, raw, paths in (
            ("a request in a body", post(b"Content-Length: %d\r\n" % len(inner), inner), ["/"]),
            ("a request in a chunk", chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner)), ["/"]),
            ("a request in a chunk's extension", chunked(b"5;x=\"GET_/_HTTP/1.1\"\r\nhello\r\n0\r\n\r\n"), ["/"]),
            ("a request after the body", post(b"Content-Length: 0\r\n", inner), ["/", "/inner"]),
            ("a request after a GET", get(HOST, target=b"/outer") + inner, ["/outer", "/inner"]),
            ("a request after chunks", chunked(CHUNKS) + inner, ["/", "/inner"])):
        before = counts()
        with Client() as client:
            client.send(raw)
            seen = [json.loads(client.response().body)["path"] for _ in paths]
            client.sock.shutdown(socket.SHUT_WR)
            equal("T4 %s" % name, (paths, b""), (seen, client.rest()))
        equal("T4 %s: counted" % name, len(paths), counts()[0] - before[0])
    trailer = chunked(b"5\r\nhello\r\n0\r\nContent-Length: 3\r\nHost: evil\r\nX-Trailer: t\r\n\r\n") + inner
    with Client() as client:
        client.send(trailer)
        answer = client.response()
        if answer.status == 200:
            names = [name for name, _ in json.loads(answer.body)["headers"]]
            equal("A13 trailers are no headers", (1, 0, "/inner"), (names.count("host"),
                  names.count("content-length") + names.count("x-trailer"), json.loads(client.response().body)["path"]))
        else:
            equal("A13 trailers are refused", 400, answer.status)
    with Client() as client:
        client.send(get(HOST + b"X-One: a\r\nx-two:\tb \r\nX-One: c\r\nCookie: d=e\r\n", target=b"/x?y"))
        answer = json.loads(client.response().body)
        equal("T4 fields come in order, names in small letters",
              [["host", "guest"], ["x-one", "a"], ["x-two", "b"], ["x-one", "c"], ["cookie", "d=e"]], answer["headers"])
        equal("T4 the scope is complete", ["GET", "/x", "/x", "y", "", "1.1", "http"],
              [answer[key] for key in ("method", "path", "raw_path", "query", "root_path", "http_version", "scheme")])
    hops = b"".join(b"%s: x\r\n" % name for name in (b"Keep-Alive", b"Proxy-Connection", b"Proxy-Authorization",
                                                      b"TE", b"Trailer", b"Upgrade"))
    with Client() as client:
        client.send(get(HOST + b"Connection: close\r\n" + hops + b"X-Kept: yes\r\n"))
        equal("hop-by-hop fields of a request stay behind", [["host", "guest"], ["x-kept", "yes"]],
              json.loads(client.response().body)["headers"])


# ---- What a server must do ------------------------------------------------------------------

def random_body(size):
    return os.urandom(MIB) * (size // MIB)


def group_bodies():
    body = random_body(3 * MIB)
    expected = (200, len(body), hashlib.sha256(body).hexdigest())

    def seen(client):
        answer = client.response()
        found = json.loads(answer.body)
        return answer.status, found["body_bytes"], found["body_sha256"]

    with Client() as client:
        client.send(post(b"Content-Length: %d\r\n" % len(body), body))
        equal("request body of 3 MiB, with a length", expected, seen(client))
        pieces, at, size = [], 0, 1
        while at < len(body):
            piece = body[at:at + size]
            pieces.append(b"%X;ext=1\r\n%s\r\n" % (len(piece), piece))
            at, size = at + size, size * 3 % 100003
        client.send(chunked(b"".join(pieces) + b"0\r\nX-Trailer: t\r\n\r\n"))
        equal("request body of 3 MiB, in %d chunks" % len(pieces), expected, seen(client))
        client.send(post(b"Content-Length: %d\r\n" % len(body), b""))
        for at in range(0, len(body), 100000):
            client.send(body[at:at + 100000])
            time.sleep(0.002)
        equal("request body of 3 MiB, in parts of 100,000", expected, seen(client))
        client.send(b"PUT / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        client.send_bytes(b"3\r\nabc\r\n00A\r\n0123456789\r\n000\r\n\r\n")
        equal("request body in chunks, byte by byte", (200, 13), seen(client)[:2])
        client.send(chunked(b"0\r\n\r\n"))
        equal("request body of no bytes, in chunks", (200, 0), seen(client)[:2])
    for count in (0, 1, 65535, 65536, 65537, 3 * MIB):
        answer = ask("/bytes/%d" % count)
        equal("response of %d bytes" % count, (200, b"x" * count), (answer.status, answer.body))
    answer = ask("/stream/50/62915")
    equal("response of 3 MiB in 50 parts", b"".join(bytes([97 + n % 26]) * 62915 for n in range(50)), answer.body)
    with Client() as client, Client() as other:
        client.send(get(HOST, target=b"/hold"))
        client.head()
        equal("a response streams: the first part comes", b"first ", client.chunk())
        equal("a response streams: before the last is sent", {"released": 1}, json.loads(other.ask("/release").body))
        equal("a response streams: then the last", (b"last", b""), (client.chunk(), client.chunk()))


def group_methods():
    with Client() as client:
        answer = client.ask("/length/7/7", "HEAD")
        equal("A22 HEAD has the length and no body", ("7", 200), (answer.get("content-length"), answer.status))
        equal("HEAD: the next request works", b"x" * 7, client.ask("/length/7/7").body)
        answer = client.ask("/bytes/100000", "HEAD")
        equal("HEAD of a body without length", 200, answer.status)
        equal("HEAD: the next request works after that", b"xxx", client.ask("/bytes/3").body)
        for number in (204, 304):
            answer = client.ask("/status/%d" % number)
            equal("A22 %d has no body" % number, (number, None, None),
                  (answer.status, answer.get("transfer-encoding"), answer.get("content-length")))
            equal("%d: the next request works" % number, b"xxx", client.ask("/bytes/3").body)
        answer = client.ask("/status/205")
        equal("205 keeps the connection in step", (205, 200), (answer.status, client.ask("/").status))
        for number in (200, 404, 500, 599, 999):
            equal("status %d comes through" % number, (number, b"a body"),
                  (lambda a: (a.status, a.body))(client.ask("/status/%d" % number)))
        for method in ("DELETE", "PATCH", "PUT", "OPTIONS", "PROPFIND"):
            equal("method %s comes through" % method, method, json.loads(client.ask("/", method).body)["method"])
        answer = client.ask("/hopbyhop")
        equal("hop-by-hop fields of a response stay behind", ([], "chunked", b"hops"),
              ([value for name, value in answer.headers if value == "x-one"],
               answer.get("transfer-encoding"), answer.body))
        expect("a response has a date", re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", answer.get("date", "")),
               answer.headers)


def group_keepalive():
    for version, fields, path, stays in (
            (b"1.1", b"", b"/", True), (b"1.1", b"Connection: close\r\n", b"/", False),
            (b"1.1", b"Connection: keep-alive\r\n", b"/", True), (b"1.0", b"", b"/", False),
            (b"1.0", b"Connection: keep-alive\r\n", b"/", True), (b"1.0", b"Connection: close\r\n", b"/", False),
            (b"1.1", b"Connection: foo, CLOSE\r\n", b"/", False),
            (b"1.0", b"Connection: keep-alive\r\n", b"/bytes/10", False)):
        name = "HTTP/%s %s %s" % (version.decode(), fields.decode().strip() or "plain", path.decode())
        with Client() as client:
            client.send(get(HOST + fields, b"HTTP/" + version, path))
            answer = client.response()
            equal(name + ": answered", (200, False),
                  (answer.status, version == b"1.0" and answer.get("transfer-encoding") is not None))
            if stays:
                client.send(get(HOST + b"Connection: close\r\n"))
                equal(name + ": a second request is answered", 200, client.response().status)
            else:
                expect(name + ": says that it closes", answer.get("connection") == "close", answer.headers)
            expect(name + ": closed in the end", client.is_ended(), "more comes")
    with Client() as client:
        start = time.monotonic()
        wrong = [n for n in range(1000) if json.loads(client.ask("/sequence/%d" % n).body)["path"] != "/sequence/%d" % n]
        expect("1,000 requests on one connection (%.1f s)" % (time.monotonic() - start), not wrong, wrong)
    for name, paths in (("of one kind", ["/p/%d" % n for n in range(200)]),
                        ("the slow first", ["/sleep/0.2", "/p/1", "/sleep/0.05", "/p/2"])):
        with Client() as client:
            client.send(b"".join(get(HOST, target=path.encode()) for path in paths))
            seen = [json.loads(client.response().body) for _ in paths]
            equal("pipelined, %s: answered in order" % name, paths,
                  [found["path"] if "path" in found else "/sleep/%g" % found["slept"] for found in seen])
    with Client() as client:
        client.send(b"".join(post(b"Content-Length: %d\r\n" % n, b"b" * n) + chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (n, b"c" * n))
                             for n in range(1, 50)))
        equal("pipelined with bodies: each its own", [n for n in range(1, 50) for _ in (0, 1)],
              [json.loads(client.response().body)["body_bytes"] for _ in range(98)])
    before = rss_kib()
    with Client() as client:                # nothing is read before all was sent, if it is taken
        raw = b"".join(get(HOST + b"X: %s\r\n" % (b"p" * 200), target=b"/p/%d" % n) for n in range(1000))
        writer = threading.Thread(target=client.send, args=(raw,))
        writer.start()
        grown = highest_rss(1) - before
        seen = [json.loads(client.response().body)["path"] for _ in range(1000)]
        writer.join()
        equal("A20 1,000 pipelined in one write: answered in order", ["/p/%d" % n for n in range(1000)], seen)
        expect("A20 the queue is bounded: %d KiB more" % grown, SANITIZED or grown <= 512, "more than 512 KiB")
    with Client() as client:
        client.send(get(HOST) + b"BAD\r\n\r\n")
        equal("pipelined, the second bad", [200, 400], [client.response().status, client.response().status])
        expect("pipelined, the second bad: closed", client.is_ended(), "more comes")
    with Client() as client:
        client.send(get(HOST, target=b"/sleep/0.2"))
        client.sock.shutdown(socket.SHUT_WR)
        equal("A18 a client that half-closes is answered", 200, client.response().status)
        expect("a client that half-closes: closed", client.is_ended(), "more comes")


def group_expect():
    with Client() as client:
        client.send(post(b"Expect: 100-continue\r\nContent-Length: 5\r\n", b""))
        equal("A21 Expect: 100 comes before the body", 100, client.response().status)
        client.send(b"hello")
        equal("Expect: then the answer", (200, 5), (lambda a: (a.status, json.loads(a.body)["body_bytes"]))(client.response()))
        client.send(post(b"expect: 100-Continue\r\nTransfer-Encoding: chunked\r\n", b""))
        equal("Expect: 100 comes before chunks", 100, client.response().status)
        client.send(CHUNKS)
        equal("Expect: then the answer to chunks", 200, client.response().status)
        client.send(get(HOST + b"Expect: 100-continue\r\n"))
        equal("Expect: no 100 without a body", 200, client.response().status)
        client.send(b"POST / HTTP/1.0\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello")
        equal("Expect: no 100 in HTTP/1.0", 200, client.response().status)
    refuse([("A21 Expect: of another kind", post(b"Expect: 200-ok\r\nContent-Length: 5\r\n"), 417),
            ("Expect: two of them, one bad", post(b"Expect: 100-continue\r\nExpect: x\r\nContent-Length: 5\r\n"), 417)])


def group_leaving():
    """Clients that go away."""
    baseline, before = descriptors(), counts()
    for number in range(20):
        with Client() as client:
            client.send(get(HOST, target=b"/never"))
    equal("20 clients leave while they wait: the program hears it", before[2] + 20, seen_soon(2, before[2] + 20))
    before = counts()
    for number in range(20):
        with Client() as client:
            client.send(get(HOST, target=b"/stream/100000/65536"))
            client.head()
            client.chunk()
    equal("20 clients leave inside a response: the program hears it", before[2] + 20, seen_soon(2, before[2] + 20))
    before = counts()
    for number in range(20):
        with Client() as client:
            client.send(post(b"Content-Length: 10\r\n"))
    equal("20 clients leave inside a body: the program hears it", before[2] + 20, seen_soon(2, before[2] + 20))
    before = counts()
    for number in range(20):
        with Client() as client:
            client.send(get(HOST)[:number + 1])
    equal("20 clients leave inside a head: nothing reaches the program", before[0], counts()[0])
    before = counts()
    with Client() as client:
        client.send(post(b"Content-Length: 10\r\n"))
        client.sock.shutdown(socket.SHUT_WR)
        found = client.rest()
        expect("a client ends within its body: no answer as if it were whole", b" 200 " not in found, found)
    equal("a client ends within its body: the program hears it", before[2] + 1, seen_soon(2, before[2] + 1))
    equal("clients that left: no descriptor is left", baseline, settled(descriptors, baseline))


def group_resets():
    """A19: clients that break off (TCP: close(2) with SO_LINGER of 0 s)."""
    baseline = descriptors()
    for what, raw, answers in (("while they wait", get(HOST, target=b"/never"), False),
                               ("inside a response", get(HOST, target=b"/stream/100000/65536"), True),
                               ("inside a body", post(b"Content-Length: 10\r\n"), False)):
        before = counts()
        for _ in range(20):
            with Client() as client:
                client.send(raw)
                if answers:
                    client.head()
                    client.chunk()
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if not answers:             # a reset may overtake the request
                    settled(lambda: counts()[0] > before[0] + _, True)
        equal("A19 20 clients break off %s: the program hears it" % what, before[2] + 20, seen_soon(2, before[2] + 20))
    equal("A19 clients that broke off: no descriptor is left", baseline, settled(descriptors, baseline))


def group_trust():
    """Who the client is: of the namespaces' three TCP fronts the first trusts nobody, the second
    all, the third 127.0.0.1 and 10.0.0.0/8; SOCKET, a Unix socket, everybody."""
    def told(port, fields):
        with Client() as client:
            if port:
                client.sock.close()
                client.sock = connect("tcp:127.0.0.1:%d" % port)
            client.send(get(HOST + fields))
            answer = json.loads(client.response().body)
            own = client.sock.getsockname()[1] if port else None
            if answer["client"] and answer["client"][1] == own:
                answer["client"][1] = "own"
            return answer["client"], answer["scheme"], [name for name, _ in answer["headers"][1:]]

    chain = b"X-Forwarded-For: 7.7.7.7, 9.9.9.9, 10.1.1.1\r\nX-Forwarded-Proto: https\r\n"
    forged = chain + (b"x_forwarded-for: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\nX-FORWARDED-HOST: evil\r\n"
                      b"X-Forwarded-Prefix: /x\r\nX_Forwarded_Proto: https\r\nX-Forwarded: y\r\nX-Kept: 1\r\n")
    kept = ["x-forwarded-for", "x-forwarded-proto"]
    equal("trust none: the client is the peer", (["127.0.0.1", "own"], "http", []), told(8088, b""))
    equal("trust none: what is forged is dropped", (["127.0.0.1", "own"], "http", ["x-forwarded", "x-kept"]), told(8088, forged))
    equal("trust all: the first one named is the client", (["7.7.7.7", 0], "https", kept), told(8089, chain))
    equal("trust all: without a word it is the peer", (["127.0.0.1", "own"], "http", []), told(8089, b""))
    equal("trust all: rubbish is no client", (["127.0.0.1", "own"], "http", kept),
          told(8089, b"X-Forwarded-For: <x>\r\nX-Forwarded-Proto: gopher\r\n"))
    equal("trust of networks: the last one outside of them is the client", (["9.9.9.9", 0], "https", kept), told(8090, chain))
    equal("a Unix socket is trusted", (["7.7.7.7", 0], "https", kept), told(0, chain))
    equal("a Unix socket has no address", (None, "http", []), told(0, b""))


def highest_rss(seconds):
    most, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        most = max(most, rss_kib())
        time.sleep(0.02)
    return most


def group_memory():
    """Long bodies that one side does not take."""
    size_mib = int(os.environ.get("BODY_MIB", "200"))
    what = "%d MiB" % size_mib
    before = rss_kib()
    with Client() as client:
        client.send(get(HOST, target=b"/stream/%d/65536" % (16 * size_mib)))
        grown = highest_rss(2) - before
        expect((what + " to a client that does not read: %d KiB more") % grown, SANITIZED or grown <= 1024, "more than 1 MiB")
        client.head()
        size, chunk = 0, client.chunk()
        while chunk:
            size, chunk = size + len(chunk), client.chunk()
        equal(what + " to a client that reads late: all of it", size_mib * MIB, size)
        grown = rss_kib() - before
        expect((what + " read: %d KiB more") % grown, SANITIZED or grown <= 1024, "more than 1 MiB")
    before = rss_kib()
    with Client() as client:
        client.sock.settimeout(0.5)
        sent, started = 0, time.monotonic()
        client.send(post(b"Content-Length: %d\r\n" % (size_mib * MIB), b"").replace(b"POST /", b"POST /slowread/2"))
        with contextlib.suppress(socket.timeout):
            while sent < size_mib * MIB:
                sent += client.sock.send(bytes(65536))
        grown = rss_kib() - before
        expect((what + " to a program that does not read: %d KiB taken") % (sent / 1024), sent < 2 * MIB, "too much")
        expect((what + " to a program that does not read: %d KiB more") % grown, SANITIZED or grown <= 1024, "more than 1 MiB")
        client.sock.settimeout(30)
        most, zeros = 0, bytes(MIB)
        while sent < size_mib * MIB:
            sent += client.sock.send(zeros[:size_mib * MIB - sent])
            most = max(most, rss_kib())
        equal(what + " to a program that reads late: all of it", size_mib * MIB, json.loads(client.response().body)["body_bytes"])
        expect((what + " taken: %d KiB more") % (most - before), SANITIZED or most - before <= 1024, "more than 1 MiB")


def group_unread():
    """Programs that answer without reading the body."""
    body = bytes(3 * MIB)
    before = counts()
    with Client() as client:
        client.send(post(b"Content-Length: 5\r\n").replace(b"POST /", b"POST /bytes/5"))
        equal("a small body unread: answered", b"xxxxx", client.response().body)
        equal("a small body unread: the next request works", 200, client.ask("/").status)
    with Client() as client:
        writer = threading.Thread(target=client.send, args=(
            post(b"Content-Length: %d\r\n" % len(body), body).replace(b"POST /", b"POST /bytes/5"),))
        writer.start()
        answer = client.response()
        equal("3 MiB unread: answered", (200, b"xxxxx"), (answer.status, answer.body))
        expect("3 MiB unread: closed, as the rest was not parsed", client.is_ended(), "more comes")
        writer.join()
    equal("unread: no byte of it became a request", 3, counts()[0] - before[0])


def group_together():
    start = time.monotonic()
    clients = [Client() for _ in range(64)]
    for client in clients:
        client.send(get(HOST, target=b"/sleep/0.5"))
    statuses = [client.response().status for client in clients]
    took = time.monotonic() - start
    equal("64 requests at once: all answered", [200] * 64, statuses)
    expect("64 requests at once: in %.2f s" % took, took < (4 if SANITIZED else 2), "one after the other")
    for client in clients:
        client.sock.close()
    with Client() as slow, Client() as quick:
        start = time.monotonic()
        slow.send(get(HOST, target=b"/sleep/2"))
        times = []
        for _ in range(50):
            begin = time.monotonic()
            quick.ask("/")
            times.append(time.monotonic() - begin)
            time.sleep(0.01)
        done = time.monotonic() - start
        times.sort()
        expect("a request of 2 s delays no other (median %.1f ms)" % (times[25] * 1000),
               done < 2 and times[25] < 0.1 and not slow.has_answer(), times[-5:])
        equal("a request of 2 s is answered", 200, slow.response().status)


def unfold():
    """Refuses something, so that the next message is no repetition of the one before it."""
    with Client() as client:
        client.send(b"unfold\r\n\r\n")
        client.response()


def console_since(at, pattern, seconds=5):
    end = time.monotonic() + seconds
    while True:
        with open(CONSOLE, "rb") as file:
            file.seek(at)
            if re.search(pattern, file.read().decode("utf-8", "replace")):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.02)


def bad_program(name, target, status, reason):
    """The program's mistake is the answer, and a line on the console; the connection is no
    worse for it when the body has been taken."""
    unfold()
    at = os.path.getsize(CONSOLE)
    answer = ask(target)
    equal("%s: status" % name, status, answer.status)
    expect("%s: the reason is named" % name, re.search(reason, answer.body.decode()), answer.body)
    expect("%s: logged" % name, console_since(at, reason), "not on the console")
    equal("%s: the next request works" % name, 200, ask("/").status)


def cut_short(name, target, reason):
    """The head is out when the mistake shows: the response must not look complete."""
    unfold()
    at = os.path.getsize(CONSOLE)
    with Client() as client:
        try:
            answer = client.ask(target)
            report(name + ": cut", "looks complete: %d %.100r" % (answer.status, answer.body))
        except Ended:
            report(name + ": cut")
    expect("%s: logged" % name, console_since(at, reason), "not on the console")
    equal("%s: the next request works" % name, 200, ask("/").status)


def head_frame(*pairs, status=200):
    payload = struct.pack("<HH", status, len(pairs)) + b"".join(n + b"\0" + v + b"\0" for n, v in pairs)
    return "/ownframe?type=10&flags=0&hex=" + payload.hex()


def group_programs():
    """Programs that answer badly."""
    bad_program("raises before the head", "/raise", 500, "ValueError: raised on purpose")
    bad_program("body before the head", "/early", 500, "http.response.body was sent before http.response.start")
    bad_program("no answer", "/nothing", 500, "without a complete response")
    bad_program("CR LF in a header", "/badheader", 500, "holds CR, LF or NUL")
    for name, value in (("CR", b"a\rb"), ("LF", b"a\nb"), ("CR LF", b"one\r\nX-Smuggled: two"), ("a control byte", b"a\x01b")):
        bad_program("%s in a header by its own frame" % name, head_frame((b"x", value)), 502, "CR, LF or another control byte")
    for name in (b"x y", b"", b"x:", b"x\r\ny", b"\xe9"):
        bad_program("header name %r by its own frame" % name.decode("latin-1"), head_frame((name, b"v")), 502, "no token")
    bad_program("status 99 by its own frame", head_frame(status=99), 502, "status outside")
    bad_program("status 101 by its own frame", head_frame(status=101), 502, "status outside")
    bad_program("length that is no number by its own frame", head_frame((b"content-length", b"+5")), 502, "no number")
    bad_program("two lengths by its own frame", head_frame((b"content-length", b"5"), (b"content-length", b"6")), 502, "two that differ")
    bad_program("257 headers by its own frame", head_frame(*[(b"x", b"y")] * 257), 502, "too many")
    cut_short("raises after the head", "/late", "raised in the middle")
    cut_short("fewer bytes than declared", "/length/100/50", "50 bytes less than its Content-Length")
    cut_short("no byte of those declared", "/length/100/0", "100 bytes less than its Content-Length")
    with Client() as client:
        at = os.path.getsize(CONSOLE)
        client.send(get(HOST, target=b"/length/50/100") + get(HOST))
        found = client.rest()
        expect("more bytes than declared: none of them is another response", found.count(b"HTTP/1.1") <= 1
               and len(found.partition(b"\r\n\r\n")[2]) <= 50 or found.startswith(b"HTTP/1.1 502"), found[-200:])
        expect("more bytes than declared: logged", console_since(at, "more than its Content-Length"), "not on the console")
    # The response head is hostile even when the frames are in order: NUL cannot hide in it.
    at = os.path.getsize(CONSOLE)
    answer = ask(head_frame((b"x", b"a\0b")))
    equal("NUL in a header by its own frame", 502, answer.status)
    expect("NUL in a header by its own frame: the reason is named", b"names and values" in answer.body, answer.body)
    expect("NUL in a header by its own frame: logged", console_since(at, "names and values"), "not on the console")
    equal("NUL in a header by its own frame: the next request works", 200, ask("/").status)
    counts.asked = 0                    # it is another process now


# ---- Time -------------------------------------------------------------------------------

def timed(name, least, most, act):
    start = time.monotonic()
    found = act()
    took = time.monotonic() - start
    expect("%s: after %.2f s" % (name, took), least - 0.02 <= took <= most + (1 if SANITIZED else 0.3), "not within %g to %g s" % (least, most))
    return found


def group_times():
    """Under silent_ms=600 head_ms=800 body_ms=700 idle_ms=900 response_head_ms=1500 send_ms=1000."""
    log = Log()

    def is_408(name, answer, reason):
        equal("%s: 408" % name, (408, "close"), (answer.status, answer.get("connection")))
        expect("%s: the reason is named" % name, reason in answer.body.decode(), answer.body)
        expect("%s: logged" % name, log.fresh() == [("408", answer.body.decode().strip())], log.last)
        unfold()
        log.fresh()

    with Client() as client:
        is_408("silence", timed("silence", 0.6, 0.9, client.response), "no request came")
    for name, start in (("a head that stops", b"GET / HTTP/1.1\r\nHost: gu"), ("a head of one byte", b"G")):
        with Client() as client:
            client.send(start)
            is_408("A16 " + name, timed("A16 " + name, 0.8, 1.1, client.response), "the head took too long")
    with Client() as client:
        def drip():
            for byte in get(HOST + b"X: " + b"y" * 100 + b"\r\n"):
                client.send(bytes([byte]))
                time.sleep(0.05)
                if client.has_answer():
                    return client.response()
        is_408("A16 a head byte by byte", timed("A16 a head byte by byte", 0.8, 1.1, drip), "the head took too long")
    for name, raw in (("a length", post(b"Content-Length: 10\r\n")), ("chunks", chunked(b"a\r\nhello"))):
        before = counts()
        with Client() as client:
            client.send(raw)
            is_408("A17 a body with %s that stalls" % name, timed("A17 " + name, 0.7, 1.0, client.response), "stalled")
        equal("A17 a body with %s that stalls: the program hears it" % name, before[2] + 1, seen_soon(2, before[2] + 1))
    with Client() as client:
        client.send(post(b"Content-Length: 10\r\n", b""))
        for _ in range(10):
            client.send(b"b")
            time.sleep(0.2)
        equal("A17 a body that is slow and does not stall", 200, client.response().status)
    with Client() as client:
        client.ask("/")
        expect("idle between requests: closed without a word", timed("idle", 0.9, 1.2, client.is_ended), "it says something")
    with Client() as client:
        answer = timed("never answers", 1.5, 1.9, lambda: client.ask("/never"))
        equal("never answers: 504", 504, answer.status)
        expect("never answers: the reason is named", b"no response head within 1500 ms" in answer.body, answer.body)
    with Client() as client:
        answer = client.ask("/sleep/1.2")
        equal("a program that answers in time is waited for", 200, answer.status)
        client.send(post(b"Content-Length: 200000\r\n", bytes(200000)).replace(b"POST /", b"POST /slowread/1.2"))
        equal("a program that is slow to read is waited for", 200, client.response().status)
    before, at = counts(), os.path.getsize(CONSOLE)
    with Client() as client:
        client.send(get(HOST, target=b"/stream/1000/65536"))
        expect("a client that does not read: closed", console_since(at, "read nothing for 1000 ms"), "not on the console")
        with contextlib.suppress(Ended):
            client.response()
            report("a client that does not read: all came", "it did")
    equal("a client that does not read: the program hears it", before[2] + 1, seen_soon(2, before[2] + 1))
    open_ones = [Client() for _ in range(64)]
    last = Client()
    equal("past conns=64: turned away", 503, last.response().status)
    for client in open_ones + [last]:
        client.sock.close()
    equal("past conns=64: served again", 200, settled(lambda: ask("/").status, 200))


def group_idle():
    """10,000 connections that have had an answer and say nothing more."""
    before, empty = descriptors(), rss_kib()
    asks = get(HOST + b"Cookie: %s\r\n" % (b"c" * 3000), target=b"/bytes/100")
    idle = []
    for _ in range(10000):
        idle.append(Client())
        idle[-1].send(asks)
    expect("10,000 idle connections: all accepted", settled(lambda: descriptors() >= before + 10000, True), descriptors())
    equal("10,000 idle connections: all answered before", {200}, {client.response().status for client in idle})
    each = (rss_kib() - empty) / 10000
    expect("10,000 idle connections: %.2f KiB each" % each, SANITIZED or each <= 4, "more than 4")
    times = []
    for _ in range(200):
        begin = time.monotonic()
        if ask("/").status != 200:
            report("10,000 idle connections: good requests go on", "one is refused")
            return
        times.append(time.monotonic() - begin)
    times.sort()
    expect("10,000 idle connections: good requests go on (median %.1f ms)" % (times[100] * 1000),
           times[100] < (0.2 if SANITIZED else 0.05), times[-5:])
    kib = rss_kib()
    for client in idle:
        client.sock.close()
    equal("10,000 idle connections (%d KiB): none is left" % kib, before, settled(descriptors, before, 20))


def main():
    for name in sys.argv[4:]:
        try:
            getattr(sys.modules["__main__"], "group_" + name)()
        except Exception as exc:
            where = exc.__traceback__
            while where.tb_next:
                where = where.tb_next
            report("%s: runs to its end" % name, "%r in line %d, %s" % (exc, where.tb_lineno, where.tb_frame.f_code.co_name))


if __name__ == "__main__":
    main()

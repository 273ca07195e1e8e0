"""TLS clients that do what openssl and curl do not; run by tls.sh.

    tls_peer.py ADDRESS CERTS LOG GROUP...

ADDRESS is HOST:PORT of a TLS listener, CERTS a folder with ca.pem, behind the listener runs apps/echo;
LOG is the file that the agent logs to. Each check is one line, `ok NAME` or `FAIL NAME: why`.
"""
import hashlib
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time

HOST, PORT = sys.argv[1].split(":")
CERTS, LOG = sys.argv[2:4]
MIB = 1 << 20
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"


def report(name, why=None):
    print("ok " + name if why is None else "FAIL %s: %s" % (name, str(why).replace("\n", " ")[:500]), flush=True)


def expect(name, condition, why="it is not so"):
    report(name, None if condition else why)


def equal(name, expected, actual):
    expect(name, expected == actual, "expected %.200r, got %.200r" % (expected, actual))


def context(version="1.3"):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(CERTS + "/ca.pem")
    made.minimum_version = made.maximum_version = VERSIONS[version]
    return made


def plain():
    sock = socket.create_connection((HOST, int(PORT)))
    sock.settimeout(60)
    return sock


def connect(version="1.3"):
    return context(version).wrap_socket(plain(), server_hostname="localhost", suppress_ragged_eofs=False)


def response(sock):
    """Status and body of one response; the body has a Content-Length, or is chunked, or goes to the end."""
    file = sock.makefile("rb")
    status = int(file.readline().split()[1])
    fields = dict(line.decode().lower().rstrip().split(": ", 1) for line in iter(file.readline, b"\r\n"))
    if "content-length" in fields:
        return status, file.read(int(fields["content-length"]))
    body = b""
    while fields.get("transfer-encoding") == "chunked":
        size = int(file.readline(), 16)
        body += file.read(size)
        file.readline()
        if size == 0:
            return status, body
    return status, file.read()


def well(name):
    with connect() as sock:
        sock.sendall(GET % b"/bytes/6")
        equal(name, (200, b"xxxxxx"), response(sock))


def log_gains(text, act):
    """Does something, after which the log must show that."""
    before = open(LOG).read().count(text)
    act()
    end = time.monotonic() + 20
    while open(LOG).read().count(text) <= before:
        if time.monotonic() > end:
            return "the log does not say " + text
        time.sleep(0.02)


# ---- Groups ---------------------------------------------------------------------------

def transfers():
    for version in VERSIONS:
        body = os.urandom(3 * MIB)
        with connect(version) as sock:
            for number in (1, 2):
                sock.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                status, text = response(sock)
                equal("%s: 3 MiB to the program, request %d of a connection" % (version, number),
                      hashlib.sha256(body).hexdigest(), json.loads(text)["body_sha256"])
            equal("%s: the scheme of the scope" % version, "https", json.loads(text)["scheme"])
            sock.sendall(GET % b"/stream/48/65536")
            expected = b"".join(bytes([97 + n % 26]) * 65536 for n in range(48))
            equal("%s: 3 MiB from the program, request 3" % version, (200, expected), response(sock))
        # Both at once: it answers while it reads slowly, to a client that reads slowly.
        with connect(version) as sock:
            sock.sendall(GET % b"/bytes/3145728")
            time.sleep(0.3)
            equal("%s: 3 MiB to a client that begins to read late" % version, 3 * MIB, len(response(sock)[1]))
        with connect(version) as sock:
            sock.sendall(GET % b"/bytes/1" + GET % b"/bytes/2" + GET % b"/bytes/3")
            file = sock.makefile("rb")
            text = b""
            while text.count(b"xxx") < 1:
                text += file.read1(65536)
            equal("%s: three requests in one record" % version, 3, text.count(b"HTTP/1.1 200"))
        with connect(version) as sock:
            for byte in GET % b"/bytes/4":
                sock.sendall(bytes([byte]))
            equal("%s: a request of records of one byte" % version, (200, b"xxxx"), response(sock))


def ends():
    for version in VERSIONS:
        with connect(version) as sock:
            sock.sendall(b"GET /bytes/9 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            try:
                text = b"".join(iter(lambda: sock.recv(65536), b""))
                expect("%s: close_notify ends it" % version, text.rstrip().endswith(b"0") and b"x" * 9 in text, text)
            except ssl.SSLEOFError as e:
                report("%s: close_notify ends it" % version, e)
        sock, tls, into, out = handshaken(version)
        tls.write(GET % b"/sleep/0.3")
        sock.sendall(out.read())
        try:
            tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        sock.sendall(out.read())
        sock.shutdown(socket.SHUT_WR)
        text, ended = b"", False
        while not ended:
            data = sock.recv(65536)
            into.write(data) if data else into.write_eof()
            while not ended:
                try:
                    text += tls.read(65536)
                except ssl.SSLWantReadError:
                    break
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError, ssl.SSLError):
                    ended = True
            ended = ended or not data
        expect("%s: half-closed: the answer comes all the same" % version, b'"slept": 0.3' in text, text)
        sock.close()
        # A cut within a body is no end of it.
        counts = ask("/counts")
        sock = connect(version)
        sock.sendall(b"POST /cut HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf")
        os.close(sock.detach())
        end = time.monotonic() + 20
        while (now := ask("/counts"))["disconnects"] == counts["disconnects"] and time.monotonic() < end:
            time.sleep(0.02)
        equal("%s: a body that is cut is not whole for the program" % version,
              (counts["disconnects"] + 1, counts["whole"]), (now["disconnects"], now["whole"]))


def ask(path):
    with connect() as sock:
        sock.sendall(GET % path.encode())
        return json.loads(response(sock)[1])


def handshaken(version):
    """A connection whose TLS is made in memory: (socket, SSL object, bytes in, bytes out)."""
    sock, into, out = plain(), ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context(version).wrap_bio(into, out, server_hostname="localhost")
    while True:
        try:
            tls.do_handshake()
            sock.sendall(out.read())
            return sock, tls, into, out
        except ssl.SSLWantReadError:
            sock.sendall(out.read())
            into.write(sock.recv(65536))


def flights(version):
    """What a client sends in a handshake, flight by flight, and the socket after each."""
    sock, into, out = plain(), ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context(version).wrap_bio(into, out, server_hostname="localhost")
    while True:
        try:
            tls.do_handshake()
            yield sock, out.read()
            return
        except ssl.SSLWantReadError:
            yield sock, out.read()
        into.write(sock.recv(65536))


def breaks():
    """Leaves in every step of a handshake, with and without a part of the next flight sent, by an end and
    by a reset."""
    tried = 0
    for version in VERSIONS:
        steps = len([sock.sendall(data) for sock, data in flights(version) if data])
        for stop in range(steps):
            for part in (0, 1, 5, 6, 50, -1):
                for reset in (False, True):
                    at = 0
                    for sock, data in flights(version):
                        if at == stop:
                            sock.sendall(data[:part])
                            break
                        sock.sendall(data)
                        at += bool(data)
                    if reset:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.close()
                    tried += 1
    expect("left in %d places of a handshake" % tried, tried >= 48)
    well("left: others are served")


def many():
    """More handshakes under way than Mbed TLS has slots for keys (32)."""
    for version in VERSIONS:
        held = []
        for _ in range(50):
            steps = flights(version)
            sock, data = next(steps)
            sock.sendall(data)
            held.append(steps)
        well("%s: 50 handshakes wait: another is not kept waiting" % version)
        done = 0
        for steps in held:
            for sock, data in steps:
                sock.sendall(data)
            done += 1
            sock.close()
        equal("%s: and all of them come to an end" % version, 50, done)
    together, threads = [], []

    def one():
        with connect() as sock:
            sock.sendall(GET % b"/bytes/6")
            together.append(response(sock))

    for _ in range(40):
        threads.append(threading.Thread(target=one))
        threads[-1].start()
    for thread in threads:
        thread.join()
    equal("40 clients at once", [(200, b"xxxxxx")] * 40, together)


def hello(version, suites, groups=(0x001d, 0x0017)):
    """A ClientHello of TLS 1.2 or below (RFC 5246 section 7.4.1.2)."""
    def vector(data, size=2):
        return len(data).to_bytes(size, "big") + data

    def extension(kind, data):
        return struct.pack(">H", kind) + vector(data)

    extensions = (extension(10, vector(b"".join(struct.pack(">H", g) for g in groups))) + extension(11, b"\x01\x00")
                  + extension(13, vector(bytes.fromhex("0403 0401 0804 0501 0601 0201"))))
    body = (struct.pack(">H", version) + os.urandom(32) + b"\x00"
            + vector(b"".join(struct.pack(">H", s) for s in suites)) + b"\x01\x00" + vector(extensions))
    return b"\x16\x03\x01" + vector(b"\x01" + vector(body, 3))


def answer_to(data):
    """`alert N`, `hello`, or what else the server sends first."""
    with plain() as sock:
        sock.sendall(data)
        try:
            got = sock.recv(7, socket.MSG_WAITALL)
        except ConnectionResetError:
            return "reset"
        if got[:1] == b"\x15" and got[5:6] == b"\x02":
            return "alert %d" % got[6]
        return "hello" if got[:1] == b"\x16" and got[5:6] == b"\x02" else got


def suites():
    equal("ECDHE with AES-GCM of TLS 1.2", "hello", answer_to(hello(0x0303, [0xc02f])))
    equal("ECDHE with ChaCha20 of TLS 1.2", "hello", answer_to(hello(0x0303, [0xcca8])))
    for name, suite in (("RC4", 0x0005), ("ECDHE with RC4", 0xc011), ("3DES", 0x000a), ("ECDHE with 3DES", 0xc012),
                        ("export RC4-40", 0x0003), ("export DES-40", 0x0008), ("no cipher at all", 0x0001),
                        ("RSA key exchange", 0x009c), ("CBC", 0xc013), ("CBC with SHA-384", 0xc028), ("anonymous", 0xc018),
                        ("DHE", 0x009e)):
        equal("refused: " + name, "alert 40", answer_to(hello(0x0303, [suite])))
    equal("refused: TLS 1.1", "alert 70", answer_to(hello(0x0302, [0xc013, 0xc02f])))
    equal("refused: TLS 1.0", "alert 70", answer_to(hello(0x0301, [0xc013, 0xc02f])))
    equal("refused: SSL 3.0", "alert 70", answer_to(hello(0x0300, [0xc013, 0xc02f])))
    equal("refused: no group in common", "alert 40", answer_to(hello(0x0303, [0xc02f], [0x0100])))
    for version in VERSIONS:
        made = context(version)
        made.set_alpn_protocols(["h2", "http/1.1"])
        with made.wrap_socket(plain(), server_hostname="localhost") as sock:
            equal("%s: of h2 and http/1.1 it takes the latter" % version, "http/1.1", sock.selected_alpn_protocol())
            expect("%s: no ticket, no session to resume" % version, not sock.session or not sock.session.has_ticket)
        made = context(version)
        made.set_alpn_protocols(["h2"])
        try:
            made.wrap_socket(plain(), server_hostname="localhost").close()
            report("%s: h2 alone is refused" % version, "it is not")
        except ssl.SSLError as e:
            expect("%s: h2 alone is refused" % version, "no application protocol" in str(e), e)


def closed(data):
    """Whether the server closes after these bytes, and what it says before."""
    with plain() as sock:
        sock.sendall(data)
        text = b""
        try:
            for part in iter(lambda: sock.recv(4096), b""):
                text += part
        except ConnectionResetError:
            pass
        return text


def garbage():
    answers = []
    report("plain HTTP on a TLS port is logged",
           log_gains("a handshake failed: it speaks no TLS", lambda: answers.append(closed(GET % b"/"))))
    expect("and closed, without an answer in the clear", b"HTTP" not in answers[0], answers[0])
    first = hello(0x0303, [0xc02f])
    for name, data in (("random bytes", os.urandom(4096)), ("zeros", bytes(4096)),
                       ("a record that is too long", b"\x16\x03\x01\xff\xff" + bytes(70000)),
                       ("a ClientHello with a wrong length", first[:6] + b"\x00\x00\x01" + first[9:]),
                       ("application data first", b"\x17\x03\x03\x00\x05hello"),
                       ("an alert first", b"\x15\x03\x03\x00\x02\x02\x28")):
        expect("garbage: %s: closed" % name, b"HTTP" not in closed(data))
    with connect() as sock:
        low = socket.socket(fileno=os.dup(sock.fileno()))
        low.sendall(b"\x17\x03\x03\x00\x20" + os.urandom(32))
        try:
            got = sock.recv(100)
        except (ssl.SSLError, OSError) as e:
            got = e
        expect("garbage: a record that was tampered with: the connection ends", not isinstance(got, bytes) or got == b"", got)
        low.close()
    well("garbage: others are served")


def websocket():
    """Behind it runs apps/websocket (RFC 6455: a client masks what it sends)."""
    with connect() as sock:
        sock.sendall(b"GET /echo HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                     b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        file = sock.makefile("rb")
        head = b"".join(iter(file.readline, b"\r\n"))
        expect("WebSocket: accepted", b" 101 " in head and b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head, head)
        text, data = b"text", os.urandom(MIB)
        sock.sendall(b"\x81\x84\0\0\0\0" + text + b"\x82\xff" + struct.pack(">Q", MIB) + b"\0\0\0\0" + data)
        equal("WebSocket: text", b"\x81\x04text", file.read(6))
        got, last = b"", False
        while not last:                 # in fragments, as it likes
            first, size = file.read(2)
            size = int.from_bytes(file.read({126: 2, 127: 8}[size]), "big") if size > 125 else size
            last, got = first & 0x80, got + file.read(size)
        equal("WebSocket: 1 MiB", data, got)
        sock.sendall(b"\x88\x82\0\0\0\0\x03\xe8")
        equal("WebSocket: its end", b"\x88\x02\x03\xe8", file.read(4))


def slow():
    """With silent_ms=700."""
    def dribble():
        with plain() as sock:
            began = time.monotonic()
            try:
                for byte in hello(0x0303, [0xc02f]):
                    sock.sendall(bytes([byte]))
                    sock.settimeout(0.05)
                    try:
                        if sock.recv(1) == b"":
                            break
                    except socket.timeout:
                        pass
            except OSError:
                pass
            took.append(time.monotonic() - began)

    took = []
    report("a slow handshake is cut, and logged", log_gains("a handshake took more than 700 ms", dribble))
    expect("a slow handshake: not before its time", took[0] > 0.5, took)
    expect("a client that says nothing is cut", closed(b"") == b"")
    well("slow: others are served")


for group in sys.argv[4:]:
    {"transfers": transfers, "ends": ends, "breaks": breaks, "many": many, "suites": suites,
     "garbage": garbage, "slow": slow, "websocket": websocket}[group]()

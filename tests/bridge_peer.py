"""Both ends of the guest API around the agent: the program's, a connection to /tmp/socat-socket,
and the host's, a Unix socket that stands for vsock port 53.

    bridge_peer.py PROGRAM HOST CASE…       makes checks, one line each
    bridge_peer.py serve HOST BYTES         answers every HTTP request with BYTES bytes, until killed

Items 70 to 72 of the list of bad inputs and threat T9. What the agent was started with is in
tests/bridge.sh: api_wait_ms=1500, api_idle_ms=1500, api_conns=220.
"""
import os
import socket
import sys
import threading
import time

PATTERN = bytes(range(251)) * 4178          # a prime: no shift of it looks like another
MIB = 1 << 20
SMALL = bool(os.environ.get("SMALL"))       # the sanitizer build is slow
TIMEOUT = 60


class Host:
    """The host's end: calls serve(connection, number) for each, in a thread of its own."""

    def __init__(self, path, serve):
        if os.path.lexists(path):
            os.unlink(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1024)
        self.serve, self.count, self.errors = serve, 0, []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                s, _ = self.listener.accept()
            except OSError:
                return
            self.count += 1
            s.settimeout(TIMEOUT)
            threading.Thread(target=self.run, args=(s, self.count), daemon=True).start()

    def run(self, s, number):
        try:
            self.serve(s, number)
        except Exception as error:
            self.errors.append(repr(error))
        s.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def connect():
    s = socket.socket(socket.AF_UNIX)
    s.connect(PROGRAM)
    s.settimeout(TIMEOUT)
    return s


def write(s, n, start=0):
    """n bytes of the pattern."""
    view, at = memoryview(PATTERN), start
    while n > 0:
        offset = at % len(PATTERN)
        done = s.send(view[offset:offset + min(n, 1 << 18)])
        at, n = at + done, n - done


def read(s, most=None):
    """The number of bytes until the end, which must be those of the pattern."""
    buffer, view = bytearray(1 << 18), memoryview(PATTERN)
    at = 0
    while most is None or at < most:
        n = s.recv_into(buffer, len(buffer) if most is None else min(len(buffer), most - at))
        if n == 0:
            break
        offset, got = at % len(PATTERN), memoryview(buffer)[:n]
        first = min(n, len(PATTERN) - offset)
        if got[:first] != view[offset:offset + first] or got[first:] != view[:n - first]:
            raise ValueError("other bytes from %d on" % at)
        at += n
    return at


def read_all(s):
    parts = []
    while part := s.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def echo(s, _):
    while part := s.recv(1 << 16):
        s.sendall(part)


def in_threads(count, work):
    """The results of work(i), made at once."""
    results = [None] * count

    def one(i):
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = repr(error)

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(TIMEOUT)
    return results


def check(name, good, why=""):
    print("ok " + name if good else "FAIL %s: %s" % (name, str(why)[:300]), flush=True)


def ended(s):
    """How a connection ended, and after how long."""
    start = time.monotonic()
    try:
        what = "end" if not s.recv(1) else "bytes"
    except ConnectionResetError:
        what = "reset"
    except socket.timeout:
        what = "nothing"
    return what, time.monotonic() - start


def asks(text=b"x" * 1000):
    """A program's request: what comes back, once it has said that no more will follow."""
    with connect() as s:
        s.sendall(text)
        s.shutdown(socket.SHUT_WR)
        return read_all(s)


# ---- 70: a host's end that is not there, or does nothing -----------------------------------

def given_up(name):
    with connect() as s:
        s.sendall(b"is anybody there?")
        what, seconds = ended(s)
    check(name + ": taken at once, given up after the wait", what in ("end", "reset") and 1.2 < seconds < 8,
          (what, seconds))


def comes_up(name, prepare=lambda: None):
    """Asked before the host listens: it waits and succeeds."""
    results = []
    askers = [threading.Thread(target=lambda: results.append(asks(b"early"))) for _ in range(20)]
    for t in askers:
        t.start()
    time.sleep(0.4)
    prepare()
    with Host(HOST, echo):
        for t in askers:
            t.join(TIMEOUT)
    check(name + ": 20 asked before the host listens, all are answered", results == [b"early"] * 20, results)


def absent():
    if os.path.lexists(HOST):
        os.unlink(HOST)
    given_up("70: absent")
    comes_up("70: absent")


def leaves():
    """Programs that have gone are not waited for, but what they said is kept while it can arrive."""
    if os.path.lexists(HOST):
        os.unlink(HOST)
    for i in range(50):
        connect().close()
        with connect() as s:
            s.sendall(b"last words %02d" % i)
    heard = []
    with Host(HOST, lambda s, _: heard.append(read_all(s))):
        end = time.monotonic() + 5
        while len(set(heard) - {b""}) < 50 and time.monotonic() < end:
            time.sleep(0.01)
    heard = sorted(text for text in heard if text)      # some come late enough to say nothing to somebody
    check("70: absent: what was said by who has gone since arrives", heard == [b"last words %02d" % i for i in range(50)], heard)


def refusing():
    if os.path.lexists(HOST):
        os.unlink(HOST)
    s = socket.socket(socket.AF_UNIX)
    s.bind(HOST)                            # and never listens: ECONNREFUSED
    given_up("70: refusing")
    comes_up("70: refusing")
    s.close()
    with Host(HOST, lambda s, _: None):
        with connect() as s:
            what, seconds = ended(s)
    check("70: a host that closes at once: so is the program's end", what == "end" and seconds < 1, (what, seconds))


def silent():
    with Host(HOST, lambda s, _: time.sleep(TIMEOUT)):
        with connect() as s:
            what, seconds = ended(s)
        check("70: accepts, then silent: ended after the idle limit", what == "end" and 1.2 < seconds < 8, (what, seconds))
    with Host(HOST, lambda s, _: time.sleep(TIMEOUT)):
        with connect() as s:
            s.settimeout(0.5)
            sent = 0
            try:
                while sent < 64 * MIB:
                    sent += s.send(PATTERN)
            except socket.timeout:
                pass
        check("70: accepts, never reads: the program's writes stop", 0 < sent < 2 * MIB, sent)


def host_dies():
    """In the middle of an answer."""
    def half(s, _):
        s.recv(100)
        write(s, 5 * MIB)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with Host(HOST, half):
        with connect() as s:
            s.sendall(b"x")
            check("70: a host that ends in the middle: what it sent arrives, then the end", read(s) == 5 * MIB)


# ---- 71: many, half-closed, large ---------------------------------------------------------

def parallel():
    def one(i):
        size = 60000 + 997 * i
        with connect() as s:
            writer = threading.Thread(target=lambda: (write(s, size, i), s.shutdown(socket.SHUT_WR)))
            writer.start()
            got = b""
            while part := s.recv(1 << 16):
                got += part
            writer.join()
        return got == (PATTERN * 2)[i:i + size]

    with Host(HOST, echo) as host:
        results = in_threads(200, one)
        check("71: 200 parallel: each gets its own bytes back", results == [True] * 200,
              [r for r in results if r is not True][:3])
        check("71: 200 parallel: as many at the host", host.count == 200, host.count)


def half_close():
    def after_end(s, _):
        got = read(s)
        write(s, got)

    def answers_first(s, _):
        write(s, MIB)
        s.shutdown(socket.SHUT_WR)
        heard.append(read(s))

    heard = []
    with Host(HOST, after_end):
        with connect() as s:
            write(s, 3 * MIB)
            s.shutdown(socket.SHUT_WR)
            check("71: half-close by the program: the answer after it is whole", read(s) == 3 * MIB)
    with Host(HOST, answers_first):
        with connect() as s:
            got = read(s)
            time.sleep(0.1)
            write(s, 3 * MIB)
            s.shutdown(socket.SHUT_WR)
            end = time.monotonic() + 10
            while not heard and time.monotonic() < end:
                time.sleep(0.01)
        check("71: half-close by the host: what the program says after it is whole",
              (got, heard) == (MIB, [3 * MIB]), (got, heard))


def closes():
    """All that was written before close(2) counts, whoever closes."""
    heard = []
    with Host(HOST, lambda s, _: heard.append(read(s))):
        for _ in range(20):
            with connect() as s:
                write(s, MIB)
        end = time.monotonic() + 10
        while len(heard) < 20 and time.monotonic() < end:
            time.sleep(0.01)
    check("71: the program writes 1 MiB and closes: all arrives", heard == [MIB] * 20, heard)

    def early(s, _):
        s.recv(10)
        s.sendall(b"HTTP/1.1 413 no\r\n\r\n")

    with Host(HOST, early):
        with connect() as s:
            try:
                write(s, 8 * MIB)
            except OSError:
                pass
            try:
                got = s.recv(100)
            except OSError as error:
                got = error
    check("71: an answer in the middle of an upload arrives", got == b"HTTP/1.1 413 no\r\n\r\n", got)


def giant():
    size = (64 if SMALL else 1024) * MIB

    def both(s, _):
        writer = threading.Thread(target=lambda: (write(s, size), s.shutdown(socket.SHUT_WR)))
        writer.start()
        heard.append(read(s))
        writer.join()

    heard = []
    with Host(HOST, both) as host:
        with connect() as s:
            start = time.monotonic()
            writer = threading.Thread(target=lambda: (write(s, size), s.shutdown(socket.SHUT_WR)))
            writer.start()
            got = read(s)
            writer.join()
            end = time.monotonic() + 10
            while not heard and not host.errors and time.monotonic() < end:
                time.sleep(0.01)
            took = time.monotonic() - start
    check("71: %d MiB each way at once, 1:1 (%.0f MiB/s)" % (size // MIB, 2 * size / MIB / took),
          (got, heard) == (size, [size]), (got, heard, host.errors))


# ---- T9 and 72 -----------------------------------------------------------------------------

def flood():
    """More than api_conns: they wait, and each has its turn."""
    def one(i):
        return asks(b"%d" % i) == b"%d" % i

    with Host(HOST, echo) as host:
        held = [connect() for _ in range(220)]
        for s in held:
            s.sendall(b"held")
            s.recv(4)
        late = [connect() for _ in range(300)]
        for s in late:
            s.sendall(b"late")
        time.sleep(0.2)
        check("T9: the host sees no more than the limit", host.count == 220, host.count)
        for s in held:
            s.close()
        check("T9: who waited is served then", [s.recv(4) for s in late[:220]] == [b"late"] * 220)
        for s in late[:220]:
            s.close()
        check("T9: and the others after them", [s.recv(4) for s in late[220:]] == [b"late"] * 80)
        for s in late:
            s.close()
        check("T9: all well afterwards", in_threads(50, one) == [True] * 50)


def hangs_up():
    """1,000 connections that are made and dropped, some in the middle of a sentence."""
    with Host(HOST, echo):
        for i in range(1000):
            s = connect()
            if i % 2:
                s.sendall(PATTERN[:i])
            s.close()
        check("T9: after 1,000 that hang up", asks(b"still here") == b"still here")


def echoes():
    with Host(HOST, echo):
        check("72: served", asks(b"still here") == b"still here")


def serve_http(path, size):
    def answer(s, _):
        head = b""
        while b"\r\n\r\n" not in head:
            part = s.recv(4096)
            if not part:
                return
            head += part
        s.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % size)
        s.sendall(bytes(range(256)) * (size // 256))

    Host(path, answer)
    threading.Event().wait()


if sys.argv[1] == "serve":
    serve_http(sys.argv[2], int(sys.argv[3]))
PROGRAM, HOST = sys.argv[1:3]
for case in sys.argv[3:]:
    globals()[case]()

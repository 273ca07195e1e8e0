"""Plays the agent to shims/worker.py over a socketpair, as strictly as agent.h reads.

Usage: shim_driver.py PYTHON WORKER APPS [bench | NAME...]
Prints `ok NAME` or `FAIL NAME: why` for each check; exits 1 if one failed.
"""
import hashlib
import json
import marshal
import mmap
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback

PYTHON, WORKER, APPS = sys.argv[1:4]
CONFIGURE, REQUEST, BODY, DISCONNECT, SHUTDOWN, WINDOW = range(1, 7)
HELLO, READY, START_FAILED, HEAD, RESPONSE, FAILURE, TEXT, BINARY, CLOSE, SLOT = range(7, 17)
END, CREDIT, PIECE, FRAME_MAX = 1, 196608, 196608, 262144
SLOTS, SLOTS_AT, SLOT_LEAST = 32, 4096, 16384
OWN_FILE = os.path.basename(WORKER)
PATIENCE_S = 10
SHARES = 3                              # processes that run the checks
checks = []


# Of Python's own variables only the way to frameworks that are installed elsewhere.
environment = {name: value for name, value in os.environ.items()
               if name == "PYTHONPATH" or not name.startswith("PYTHON")}
environment["PYTHONDONTWRITEBYTECODE"] = "1"


class Stream:
    def __init__(self, event):
        self.event = event
        self.status = self.headers = self.failure = self.details = None
        self.body = bytearray()
        self.frames = []                # sizes of the body frames
        self.slots = []                 # where those were that lay in one
        self.messages = []              # of a WebSocket, the last (CLOSE, code, reason)
        self.piece_kind = None          # of a message under way
        self.closed = False
        self.may_send = CREDIT          # what the worker has left to send
        self.window = CREDIT            # what we have left to send
        self.body_done = False


PARTS = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "client", "server",
         "headers")


def parts(scope):
    """What the agent sends of a request's scope or of an event's."""
    return tuple(scope[name] for name in (PARTS if "method" in scope else ("type", "body")))


class Agent:
    """One worker process and our end of its socket. Every frame that the worker may not
    send is an error, raised where it is read. Slots are clear again if it clears them; None: the
    worker gets no memory for long bodies."""

    def __init__(self, folder, entry="main:app", drip=False, refill=True, clears=True, flags=(), env=None,
                 exec_env=None, start=True, **conf):
        self.drip, self.refill, self.clears = drip, refill, clears
        self.streams, self.last, self.data = {}, 0, b""
        self.hello = self.ready = self.ended = False
        self.held = None
        self.start_error = None
        self.sock, other = socket.socketpair()
        memory = os.memfd_create("bodies")
        os.ftruncate(memory, SLOTS_AT + SLOTS * PIECE)
        self.memory = mmap.mmap(memory, 0)
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [PYTHON, *flags, WORKER], stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.err,
            env=dict(environment, **(exec_env or {})), pass_fds=(3, 4),
            preexec_fn=lambda: self.give(other.fileno(), memory))
        other.close()
        os.close(memory)
        self.conf = dict(entry=entry, code=None, path=[], env=env or {}, lifespan_s=5.0,
                         dir=folder if folder.startswith("/") else os.path.join(APPS, folder))
        self.conf.update(conf)
        self.until(lambda: self.hello)
        if start:
            self.configure()

    def give(self, channel, memory):
        """In the child: as fds 3 and 4."""
        os.dup2(channel, 3)
        if self.clears is None:
            os.close(4)
        else:
            os.dup2(memory, 4)

    def configure(self):
        self.frame(0, CONFIGURE, marshal.dumps(self.conf, 2))
        self.until(lambda: self.ready or self.start_error)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.sock.close()
        if self.process.poll() is None:
            if kind is None:
                try:
                    self.process.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    pass
            self.process.kill()
        self.process.wait()
        self.memory.close()
        self.out.close(), self.err.close()

    # -- frames

    def frame(self, stream, kind, payload=b"", flags=0):
        data = struct.pack("<IIBBH", len(payload), stream, kind, flags, 0) + payload
        if self.held is not None:
            self.held += data
        elif self.drip:
            for at in range(len(data)):
                self.sock.sendall(data[at:at + 1])
        else:
            self.sock.sendall(data)

    def hold(self):
        """Keep what is sent from now on, until release() sends it in one write."""
        self.held = b""

    def release(self):
        data, self.held = self.held, None
        self.sock.sendall(data)

    def until(self, done, seconds=PATIENCE_S):
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if self.ended:
                raise AssertionError("the worker is gone: " + self.errors())
            if left <= 0 or not select.select([self.sock], [], [], left)[0]:
                raise AssertionError("nothing came in %g s; stderr: %s" % (seconds, self.errors()))
            self.read()

    def read(self):
        try:
            data = self.sock.recv(1 << 20)
        except ConnectionResetError:
            data = b""
        self.ended = not data
        self.data += data
        while len(self.data) >= 12:
            size, stream, kind, flags, zero = struct.unpack_from("<IIBBH", self.data)
            assert size <= FRAME_MAX, "a frame of %d bytes" % size
            assert zero == 0 and flags in (0, END), "flags %d, zero %d" % (flags, zero)
            if len(self.data) < 12 + size:
                break
            payload, self.data = self.data[12:12 + size], self.data[12 + size:]
            self.on_frame(stream, kind, flags, payload)

    def on_frame(self, number, kind, flags, payload):
        if number == 0:
            assert flags == 0
            if kind == HELLO:
                assert not self.hello and not payload
                self.hello = True
            elif kind == READY:
                assert self.hello and not self.ready and not payload
                self.ready = True
            elif kind == START_FAILED:
                assert not self.ready
                self.start_error = tuple(part.decode() for part in payload.split(b"\0"))
                assert len(self.start_error) == 2
            else:
                raise AssertionError("frame %d on stream 0" % kind)
            return
        assert self.ready, "frame %d before READY" % kind
        assert number in self.streams, "frame %d for unknown stream %d" % (kind, number)
        stream = self.streams[number]
        assert not stream.closed, "frame %d for closed stream %d" % (kind, number)
        if kind == SLOT:
            kind, payload = RESPONSE, self.take(stream, *struct.unpack("<II", payload))
        if kind == HEAD:
            assert flags == 0 and stream.status is None and not stream.event, "a second head"
            stream.status, count = struct.unpack_from("<HH", payload)
            parts = payload[4:].split(b"\0")
            assert len(parts) == 2 * count + 1 and parts[-1] == b"", "head does not add up"
            stream.headers = list(zip(parts[:-1:2], parts[1:-1:2]))
        elif kind == RESPONSE:
            abandoned = flags and not payload       # the answer to DISCONNECT needs no head
            assert stream.event or stream.status is not None or abandoned, "body before head"
            stream.may_send -= len(payload)
            assert stream.may_send >= 0, "more bytes than credit"
            assert len(payload) <= PIECE
            stream.body += payload
            stream.frames.append(len(payload))
            stream.closed = flags == END
            if self.refill and payload and not stream.closed:
                self.allow(number, len(payload))
        elif kind in (TEXT, BINARY):
            assert stream.status == 101 and stream.piece_kind in (None, kind), "a message out of place"
            stream.may_send -= len(payload) + 12
            assert stream.may_send >= 0 and len(payload) <= PIECE, "more of a message than credit"
            stream.body += payload
            stream.piece_kind = None if flags else kind
            if flags:
                stream.messages.append((kind, bytes(stream.body)))
                stream.body.clear()
            if self.refill:
                self.allow(number, len(payload) + 12)
        elif kind == CLOSE:
            assert stream.status == 101 and flags == 0
            stream.messages.append((CLOSE, int.from_bytes(payload[:2], "little"), payload[2:].decode()))
            stream.closed = True
        elif kind == FAILURE:
            message, details = payload.split(b"\0")
            stream.failure, stream.details, stream.closed = message.decode(), details.decode(), True
        elif kind == WINDOW:
            stream.window += struct.unpack("<I", payload)[0]
            assert stream.window <= CREDIT, "more credit than was used"
        else:
            raise AssertionError("frame %d from the worker" % kind)

    def take(self, stream, slot, size):
        """What lies in a slot."""
        assert slot < SLOTS and SLOT_LEAST <= size <= PIECE, "%d bytes in slot %d" % (size, slot)
        assert self.memory[slot] == 1, "slot %d is clear" % slot
        stream.slots.append(slot)
        at = SLOTS_AT + slot * PIECE
        data = self.memory[at:at + size]
        if self.clears:
            self.memory[slot] = 0
        return data

    def allow(self, number, count):
        self.streams[number].may_send += count
        self.frame(number, WINDOW, struct.pack("<I", count))

    # -- exchanges

    def open(self, target, method="GET", headers=(), body=False, event=None, **more):
        self.last += 1
        self.streams[self.last] = Stream(event is not None)
        path, _, query = target.partition("?")
        scope = {"type": "http", "http_version": "1.1", "method": method, "scheme": "http",
                 "path": path, "raw_path": path.encode(), "query_string": query.encode(),
                 "headers": [(b"host", b"test"), *headers],
                 "client": ("10.0.0.9", 4711), "server": ("127.0.0.1", 80)}
        scope.update(more)
        if event is not None:
            scope = {"type": "aleph.message", "body": event}
        self.frame(self.last, REQUEST, marshal.dumps(parts(scope), 2), 0 if body else END)
        if not body:
            self.streams[self.last].body_done = True
        return self.last

    def finish(self, number, seconds=PATIENCE_S):
        stream = self.streams[number]
        self.until(lambda: stream.closed, seconds)
        return stream

    def get(self, target, **more):
        return self.finish(self.open(target, **more))

    def event(self, text):
        return self.finish(self.open("/", event=text))

    def websocket(self, target, **more):
        """One that the program has accepted, or not."""
        number = self.open(target, type="websocket", **more)
        stream = self.streams[number]
        self.until(lambda: stream.closed or stream.status)
        return number, stream

    def message(self, number, kind, data, piece=16000):
        """As the worker gives credit for it."""
        stream, at = self.streams[number], 0
        while True:
            self.until(lambda: stream.window >= min(piece, len(data) - at) + 12 or stream.closed)
            part = data[at:at + piece]
            at += len(part)
            stream.window -= len(part) + 12
            self.frame(number, kind, part, END if at == len(data) else 0)
            if at == len(data):
                return

    def upload(self, number, data, piece=PIECE):
        """Send a body as the worker gives credit for it."""
        stream, at = self.streams[number], 0
        while at < len(data) and not stream.closed:
            self.until(lambda: stream.window > 0 or stream.closed)
            part = data[at:at + min(piece, stream.window)]
            at += len(part)
            stream.window -= len(part)
            self.frame(number, BODY, part)
        if not stream.closed:
            stream.body_done = True
            self.frame(number, BODY, b"", END)

    def json(self, target, **more):
        stream = self.get(target, **more)
        equal(stream.failure, None)
        return json.loads(bytes(stream.body))

    def text(self, target, **more):
        stream = self.get(target, **more)
        equal(stream.failure, None)
        return bytes(stream.body).decode()

    def quiet(self, seconds=0.15):
        """Nothing may come for a while."""
        if select.select([self.sock], [], [], seconds)[0]:
            before = len(self.data)
            self.read()
            raise AssertionError("unexpected bytes (%d held)" % before)

    # -- the process

    def file_text(self, file):
        with open("/proc/self/fd/%d" % file.fileno(), "rb") as again:
            return again.read().decode("utf-8", "replace")

    def errors(self):
        return self.file_text(self.err)

    def output(self):
        return self.file_text(self.out)

    def output_has(self, text, seconds=PATIENCE_S):
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < deadline, "no %r in %r" % (text, self.output())
            time.sleep(0.01)

    def cpu_s(self):
        with open("/proc/%d/stat" % self.process.pid) as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def exit_code(self, seconds=PATIENCE_S):
        """What the process ends with; frames are read until then."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it still runs; stderr: " + self.errors()
            if not self.ended and select.select([self.sock], [], [], 0.02)[0]:
                self.read()
            elif self.ended:
                time.sleep(0.01)
        return self.process.returncode


def check(function):
    checks.append(function)
    return function


def equal(got, wanted):
    assert got == wanted, "%r instead of %r" % (got, wanted)


def has(text, part):
    assert part in text, "no %r in %r" % (part, text)


def lacks(text, part):
    assert part not in text, "%r in %r" % (part, text)


def start_error(folder, entry="main:app", **more):
    with Agent(folder, entry, **more) as agent:
        assert agent.start_error, "it started"
        equal(agent.exit_code(), 1)
        return agent.start_error + (agent.errors(),)


def plain(source, **more):
    return Agent("plain", "app", code=source, **more)


def unpack(data):
    """msgpack, as far as the worker writes it, by the specification."""
    value, rest = unpack_one(data)
    equal(rest, b"")
    return value


def unpack_one(d):
    code, d = d[0], d[1:]

    def sized(form):
        size = struct.calcsize(form)
        return struct.unpack(form, d[:size])[0], d[size:]

    if code < 0x80 or code >= 0xe0:
        return code - 256 * (code >= 0xe0), d
    if code in (0xc0, 0xc2, 0xc3):
        return {0xc0: None, 0xc2: False, 0xc3: True}[code], d
    if code in (0xcb, 0xcf, 0xd3):
        return sized({0xcb: ">d", 0xcf: ">Q", 0xd3: ">q"}[code])
    forms = {0xc4: ">B", 0xc5: ">H", 0xc6: ">I", 0xd9: ">B", 0xda: ">H", 0xdb: ">I",
             0xdc: ">H", 0xdd: ">I", 0xde: ">H", 0xdf: ">I"}
    if code < 0x90:
        kind, count = "map", code & 15
    elif code < 0xa0:
        kind, count = "list", code & 15
    elif code < 0xc0:
        kind, count = "str", code & 31
    else:
        kind = {0xc: "bin", 0xd: "list"}[code >> 4]
        kind = "str" if 0xd9 <= code <= 0xdb else "map" if code >= 0xde else kind
        count, d = sized(forms[code])
    if kind in ("bin", "str"):
        assert len(d) >= count
        return (d[:count] if kind == "bin" else d[:count].decode()), d[count:]
    items = []
    for _ in range(count * (2 if kind == "map" else 1)):
        item, d = unpack_one(d)
        items.append(item)
    return (dict(zip(items[::2], items[1::2])) if kind == "map" else items), d


# ---- http ------------------------------------------------------------------------------

@check
def hello():
    with Agent("hello") as agent:
        stream = agent.get("/")
        equal((stream.status, bytes(stream.body)), (200, b"hello\n"))
        equal(stream.headers, [(b"content-type", b"text/plain")])


@check
def head_and_body_come_in_one_write():
    with Agent("hello") as agent:
        agent.open("/")
        select.select([agent.sock], [], [], PATIENCE_S)
        agent.read()
        assert agent.streams[1].closed, "the first read held only part of the answer"


@check
def frames_one_byte_at_a_time():
    with Agent("echo", drip=True) as agent:
        number = agent.open("/drip?a=b", method="POST", body=True)
        agent.upload(number, b"some body")
        seen = json.loads(bytes(agent.finish(number).body))
        equal((seen["path"], seen["query"], seen["body_bytes"]), ("/drip", "a=b", 9))


@check
def scope_is_complete():
    with Agent("echo") as agent:
        seen = agent.json("/a b?q=1&r", method="PATCH", headers=[(b"x-one", b"\xff"), (b"x-one", b"2")],
                          raw_path=b"/a%20b", scheme="https")
        wanted = {"method": "PATCH", "path": "/a b", "raw_path": "/a%20b", "query": "q=1&r",
                  "root_path": "", "http_version": "1.1", "scheme": "https",
                  "client": ["10.0.0.9", 4711], "server": ["127.0.0.1", 80],
                  "asgi": {"version": "3.0", "spec_version": "2.4"},
                  "headers": [["host", "test"], ["x-one", "\xff"], ["x-one", "2"]]}
        equal({key: seen[key] for key in wanted}, wanted)
        equal(agent.json("/", client=None)["client"], None)


@check
def websocket_messages_both_ways():
    with Agent("websocket") as agent:
        number, stream = agent.websocket("/echo", headers=[(b"sec-websocket-protocol", b"a, b")])
        equal((stream.status, dict(stream.headers)[b"sec-websocket-protocol"]), (101, b"b"))
        sent = [(TEXT, b""), (BINARY, b""), (TEXT, "h\u00e9".encode()), (BINARY, os.urandom(1 << 20)), (TEXT, b"x" * 300000)]
        for kind, data in sent:
            agent.message(number, kind, data)
            agent.until(lambda: len(stream.messages) > sent.index((kind, data)))
        equal(stream.messages, sent)
        agent.message(number, TEXT, "\u20ac".encode() * 3, piece=1)      # split within characters
        agent.until(lambda: len(stream.messages) == 6)
        equal(stream.messages[5], (TEXT, "\u20ac".encode() * 3))
        agent.frame(number, DISCONNECT, struct.pack("<H", 3001) + b"so long")
        agent.finish(number)
        equal(agent.json("/log"), [[3001, "so long"]])


@check
def websocket_answers():
    with Agent("websocket") as agent:
        for target, status, body in (("/close", 403, b""), ("/deny", 418, b"short and stout")):
            stream = agent.get(target, type="websocket")
            equal((stream.status, bytes(stream.body)), (status, body))
        for target, wanted in (("/raise", "RuntimeError: before accept"), ("/return", "without a complete response")):
            has(agent.get(target, type="websocket").failure, wanted)
        equal(agent.finish(agent.websocket("/bye?4000")[0]).messages, [(CLOSE, 4000, "so it is")])
        equal(agent.finish(agent.websocket("/return-open")[0]).messages, [(CLOSE, 1000, "")])
        has(agent.finish(agent.websocket("/throw")[0]).failure, "after accept")
        for code in ("999", "1005", "1006", "1015", "2000", "5000"):
            has(agent.finish(agent.websocket("/bye?" + code)[0]).failure, "%s is no code" % code)
        number, stream = agent.websocket("/idle")
        agent.frame(0, SHUTDOWN)
        equal(agent.finish(number).messages, [(CLOSE, 1012, "")])
        equal(agent.exit_code(), 0)


@check
def websocket_credit():
    with Agent("websocket", refill=False) as agent:
        number, stream = agent.websocket("/idle")       # it takes no message: only the first is given credit for
        agent.message(number, BINARY, b"a" * 500000)
        agent.until(lambda: stream.window > CREDIT // 2)
        for _ in range(3):
            stream.window -= 1012
            agent.frame(number, BINARY, b"b" * 1000, END)
        agent.quiet()
        assert stream.window < CREDIT, stream.window
        number, stream = agent.websocket("/both")       # three messages at once wait for credit in turn
        agent.until(lambda: stream.may_send <= 12)
        agent.quiet()
        agent.refill = True
        agent.allow(number, CREDIT - stream.may_send)
        agent.until(lambda: len(stream.messages) == 3)
        equal([text[:1] * 300000 for _, text in stream.messages], [text for _, text in stream.messages])
        agent.frame(number, DISCONNECT)
        agent.finish(number)
        equal(agent.json("/log")[-1], [1006, ""])


@check
def request_body_of_3_mib():
    data = os.urandom(3 << 20)
    with Agent("echo") as agent:
        number = agent.open("/", method="POST", body=True)
        agent.upload(number, data)
        seen = json.loads(bytes(agent.finish(number).body))
        equal((seen["body_bytes"], seen["body_sha256"]), (len(data), hashlib.sha256(data).hexdigest()))
        number = agent.open("/", method="POST", body=True)
        agent.upload(number, data[:300000], piece=777)
        seen = json.loads(bytes(agent.finish(number).body))
        equal(seen["body_sha256"], hashlib.sha256(data[:300000]).hexdigest())


@check
def body_end_may_ride_with_data():
    with Agent("echo") as agent:
        number = agent.open("/", method="POST", body=True)
        agent.streams[number].body_done = True
        agent.frame(number, BODY, b"all", END)
        equal(json.loads(bytes(agent.finish(number).body))["body_bytes"], 3)


@check
def unread_body_gets_no_credit():
    with Agent("echo") as agent:
        number = agent.open("/slowread/0.4", method="POST", body=True)
        stream = agent.streams[number]
        stream.window = 0
        agent.frame(number, BODY, b"x" * CREDIT)
        agent.quiet(0.2)
        agent.until(lambda: stream.window > 0)
        equal(stream.window, CREDIT)
        agent.upload(number, b"y" * 10)
        equal(json.loads(bytes(agent.finish(number).body))["body_bytes"], CREDIT + 10)


@check
def response_waits_for_credit():
    with Agent("echo", refill=False) as agent:
        number = agent.open("/bytes/%d" % (3 << 20))
        stream = agent.streams[number]
        agent.until(lambda: len(stream.body) == CREDIT)
        agent.quiet()
        agent.allow(number, 1000)
        agent.until(lambda: len(stream.body) == CREDIT + 1000)
        agent.quiet()
        equal(agent.finish(agent.open("/bytes/10")).status, 200)    # others go on
        while not stream.closed:
            agent.allow(number, 300001)
            agent.until(lambda: stream.closed or stream.may_send == 0)
        equal((len(stream.body), stream.failure), (3 << 20, None))


@check
def last_piece_waits_for_credit():
    with Agent("echo", refill=False) as agent:
        for target in ("/bytes/%d" % (CREDIT + 4464), "/stream/2/%d" % (CREDIT + 4464)):
            number = agent.open(target)
            stream = agent.streams[number]
            agent.until(lambda: len(stream.body) == CREDIT)
            agent.quiet()
            agent.allow(number, 4000)
            agent.until(lambda: len(stream.body) == CREDIT + 4000)
            agent.quiet()
            agent.allow(number, CREDIT + 100000)
            agent.finish(number)


@check
def much_credit_makes_no_larger_frames():
    with Agent("echo", refill=False) as agent:
        agent.hold()
        number = agent.open("/bytes/200000")
        agent.allow(number, 1000000)
        agent.release()
        equal(len(agent.finish(number).body), 200000)
    with Agent("kinds", "main:wsgi", refill=False) as agent:
        agent.hold()
        number = agent.open("/parts/200000")
        agent.allow(number, 1000000)
        agent.release()
        equal(len(agent.finish(number).body), 200001)


@check
def an_agent_that_reads_late():
    with Agent("echo", refill=False) as agent:
        numbers = []
        for _ in range(3):
            numbers += [agent.open("/bytes/%d" % CREDIT) for _ in range(20)]
            time.sleep(0.2)
        for number in numbers:
            equal(len(agent.finish(number).body), CREDIT)


@check
def response_of_exactly_the_credit():
    with Agent("echo", refill=False) as agent:
        equal(agent.get("/bytes/%d" % CREDIT).frames, [CREDIT])
        equal(sum(agent.get("/stream/4/%d" % (CREDIT // 4)).frames), CREDIT)
        equal(agent.get("/bytes/0").frames, [0])


@check
def long_bodies_lie_in_slots():
    with Agent("echo") as agent:
        for size, slots in ((SLOT_LEAST - 1, []), (SLOT_LEAST, [0]), (PIECE, [0]), (PIECE + 1, [0]), (2 * PIECE, [0, 0])):
            stream = agent.get("/bytes/%d" % size)
            equal((size, len(stream.body), stream.slots), (size, size, slots))
        equal(agent.memory[:SLOTS_AT], bytes(SLOTS_AT))


@check
def without_slots_that_are_clear_bodies_are_frames():
    with Agent("echo", clears=False) as agent:
        for number in range(SLOTS + 2):
            stream = agent.get("/bytes/50000")
            equal((len(stream.body), stream.slots), (50000, [number] if number < SLOTS else []))
        agent.memory[7] = 0
        equal(agent.get("/bytes/50000").slots, [7])
        equal(agent.memory[:SLOTS_AT], b"\1" * SLOTS + bytes(SLOTS_AT - SLOTS))


@check
def without_memory_for_long_bodies():
    with Agent("echo", clears=None) as agent:
        stream = agent.get("/bytes/50000")
        equal((len(stream.body), stream.slots), (50000, []))
        equal(len(agent.get("/stream/50/63000").body), 50 * 63000)


@check
def streamed_response_of_50_parts():
    with Agent("echo") as agent:
        stream = agent.get("/stream/50/63000")
        wanted = b"".join(bytes([97 + n % 26]) * 63000 for n in range(50))
        assert stream.body == wanted and stream.failure is None
        assert len(stream.frames) >= 51


@check
def thousand_requests_in_one_write():
    with Agent("echo") as agent:
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http",
                 "path": "/bytes/10", "raw_path": b"/bytes/10", "query_string": b"",
                 "headers": [], "client": None, "server": ("x", 80)}
        payload = marshal.dumps(parts(scope), 2)
        data = b""
        for number in range(1, 1001):
            agent.streams[number] = Stream(False)
            agent.streams[number].body_done = True
            data += struct.pack("<IIBBH", len(payload), number, REQUEST, END, 0) + payload
        agent.sock.sendall(data)
        agent.until(lambda: all(stream.closed for stream in agent.streams.values()))
        assert all(len(stream.body) == 10 for stream in agent.streams.values())


@check
def first_step_is_of_a_task():
    with Agent("echo") as agent:
        for _ in range(2):
            equal(agent.json("/task"), {"before": None, "after": "set", "listed": True, "same": True})


@check
def frames_inside_a_step():
    with Agent("echo") as agent:
        numbers = [agent.open("/nested"), *(agent.open("/bytes/%d" % i) for i in range(3))]
        equal([agent.finish(number).status for number in numbers], [200] * 4)


@check
def call_soon_while_a_task_is_made():
    with Agent("echo") as agent:
        seen = [agent.json("/window") for _ in range(4)][-1]
        assert seen["notes"] >= 1 or not seen["there"], seen


@check
def heads_are_told_apart():
    with Agent("echo") as agent:
        for number in [*range(100), *range(100)]:
            for kind in ("tuples", "lists", "generator"):
                equal(agent.get("/head/%s/%d" % (kind, number)).headers, [(b"x-number", b"%d" % number)])


@check
def requests_are_concurrent():
    with Agent("echo") as agent:
        slow = agent.open("/sleep/1")
        many = [agent.open("/sleep/0.2") for _ in range(64)]
        begun = time.monotonic()
        equal(agent.get("/bytes/5").status, 200)
        for number in many:
            agent.finish(number)
        took = time.monotonic() - begun
        assert took < 0.9 and not agent.streams[slow].closed, "took %.2f s" % took
        equal(agent.finish(slow).status, 200)


@check
def background_work_does_not_delay():
    with Agent("echo") as agent:
        begun = time.monotonic()
        agent.json("/background/0.5")
        assert time.monotonic() - begun < 0.3
        agent.output_has("background done")


@check
def blocking_after_the_response_does_not_delay_it():
    with plain("""
import time
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 200})
    if scope["path"] == "/parts":
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        time.sleep(0.5)
    await send({"type": "http.response.body", "body": b"last"})
    time.sleep(0.5)
""") as agent:
        for target, done in (("/", lambda stream: stream.closed),
                             ("/parts", lambda stream: stream.body == b"part")):
            number = agent.open(target)
            agent.until(lambda: agent.streams[number].frames, 0.4)
            assert done(agent.streams[number])
            agent.finish(number)
            time.sleep(0.5)             # it still sleeps after the end


@check
def failures_name_the_error():
    with Agent("echo") as agent:
        for target, wanted in (
                ("/raise", "ValueError: raised on purpose"),
                ("/late", "ValueError: raised in the middle"),
                ("/early", "RuntimeError: http.response.body was sent before http.response.start"),
                ("/nothing", "the program returned without a complete response"),
                ("/badheader", "ValueError: header b'one\\r\\nx-smuggled: two' holds CR, LF or NUL")):
            stream = agent.get(target)
            equal(stream.failure, wanted)
            if target != "/nothing":
                has(stream.details, "main.py")
                has(agent.errors(), wanted)
                lacks(stream.details, OWN_FILE if "raise" in target else "importlib")
        stream = agent.get("/late")
        equal((stream.status, bytes(stream.body)), (200, b"half"))
        equal(agent.get("/bytes/3").status, 200)


MISUSE = """
import asyncio
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    start = {"type": "http.response.start", "status": 200, "headers": []}
    body = {"type": "http.response.body", "body": b"x"}
    name = scope["path"][1:]
    if name == "twice": await send(start); await send(start)
    if name == "status": await send(dict(start, status="200"))
    if name == "status bool": await send(dict(start, status=True))
    if name == "status 101": await send(dict(start, status=101))
    if name == "status 1000": await send(dict(start, status=1000))
    if name == "no status": await send({"type": "http.response.start"})
    if name == "str name": await send(dict(start, headers=[("a", b"b")]))
    if name == "str value": await send(dict(start, headers=[(b"a", "b")]))
    if name == "nul": await send(dict(start, headers=[(b"a", b"b\\0c")]))
    if name == "lf name": await send(dict(start, headers=[(b"a\\n", b"b")]))
    if name == "cr": await send(dict(start, headers=[(b"a", b"b\\r")]))
    if name == "pairs": await send(dict(start, headers=[(b"a", b"b", b"c")]))
    if name == "huge": await send(dict(start, headers=[(b"a", b"b" * 300000)]))
    if name == "many": await send(dict(start, headers=[(b"", b"")] * 70000))
    if name == "unknown": await send({"type": "http.response.trailer"})
    if name == "no type": await send({})
    if name == "str body": await send(start); await send(dict(body, body="text"))
    if name == "exit": raise SystemExit(4)
    if name == "cancelled": raise asyncio.CancelledError
    if name == "interrupt": raise KeyboardInterrupt
    if name == "odd text": raise Odd
    if name == "long": raise ValueError("v" * 1000000)
    if name == "lines": raise ValueError("one\\ntwo")
    if name == "nul text": raise ValueError("a\\0b\\ud800")
    await send(start)
    await send(body)
    if name == "after": await send(body)

class Odd(Exception):
    def __str__(self):
        raise RuntimeError("no text")
"""


@check
def misuse_raises_in_the_program():
    with plain(MISUSE) as agent:
        for name, wanted in (
                ("twice", "RuntimeError: http.response.start was sent twice"),
                ("status", "ValueError: status is '200', not a number from 200 to 999"),
                ("status bool", "ValueError: status is True, not a number from 200 to 999"),
                ("status 101", "ValueError: status is 101, not a number from 200 to 999"),
                ("status 1000", "ValueError: status is 1000, not a number from 200 to 999"),
                ("no status", "KeyError: 'status'"),
                ("str name", "TypeError: header 'a' is str, not bytes"),
                ("str value", "TypeError: header 'b' is str, not bytes"),
                ("nul", "ValueError: header b'b\\x00c' holds CR, LF or NUL"),
                ("lf name", "ValueError: header b'a\\n' holds CR, LF or NUL"),
                ("cr", "ValueError: header b'b\\r' holds CR, LF or NUL"),
                ("pairs", "ValueError: too many values to unpack (expected 2)"),
                ("huge", "ValueError: response head of 300003 bytes is too large"),
                ("many", "ValueError: response head of 140000 bytes is too large"),
                ("unknown", "RuntimeError: unknown message type 'http.response.trailer'"),
                ("no type", "KeyError: 'type'"),
                ("str body", "TypeError: body is str, not bytes"),
                ("exit", "SystemExit: 4"),
                ("cancelled", "CancelledError"),
                ("interrupt", "KeyboardInterrupt"),
                ("odd text", "Odd: (its text cannot be had)"),
                ("nul text", "ValueError: a\\0b?")):
            failure = agent.get("/" + name).failure
            lacks(failure, "\n")
            assert failure and failure.startswith(wanted), "%s: %r" % (name, failure)
        stream = agent.get("/lines")
        equal(stream.failure, "ValueError: one")
        has(stream.details, "ValueError: one\ntwo")
        assert len(agent.get("/long").failure) < 5000
        equal(agent.get("/fine").failure, None)
        equal(agent.get("/after").failure, None)
        agent.get("/fine")
        has(agent.errors(), "http.response.body was sent after the response was complete")


@check
def body_may_be_any_buffer():
    with plain("""
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 200})
    data = bytearray(b"abc")
    await send({"type": "http.response.body", "body": data, "more_body": True})
    data[:] = b"xyz"
    await send({"type": "http.response.body", "body": memoryview(data)[::-1], "more_body": True})
    await send({"type": "http.response.body"})
""") as agent:
        equal(agent.text("/"), "abczyx")


@check
def receive_suspends_then_tells_of_the_end():
    with plain("""
import asyncio
seen = []
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    start = {"type": "http.response.start", "status": 200}
    if scope["path"] == "/seen":
        await send(start)
        return await send({"type": "http.response.body", "body": repr(seen).encode()})
    seen.append((await receive())["type"])
    try:
        await asyncio.wait_for(receive(), 0.1)
    except asyncio.TimeoutError:
        seen.append("suspends")
    two = [asyncio.ensure_future(receive()) for _ in range(2)]
    await asyncio.sleep(0.02)
    two[0].cancel()
    await send(start)
    await send({"type": "http.response.body"})
    seen.append((await two[1])["type"])
    seen.append((await receive())["type"])
""") as agent:
        equal(agent.get("/").failure, None)
        equal(agent.text("/seen"), repr(["http.request", "suspends", "http.disconnect",
                                         "http.disconnect"]))


@check
def disconnect_closes_at_once():
    with Agent("echo", refill=False) as agent:
        never = agent.open("/never")
        flowing = agent.open("/bytes/1000000")
        agent.until(lambda: len(agent.streams[flowing].body) == CREDIT)
        sleeping = agent.open("/sleep/0.3")
        uploading = agent.open("/slowread/0.1", method="POST", body=True)
        agent.frame(uploading, BODY, b"part")
        for number in (never, flowing, sleeping, uploading):
            agent.frame(number, DISCONNECT)
            stream = agent.finish(number, 1)
            equal((stream.failure, stream.frames[-1]), (None, 0))
        assert agent.json("/disconnects")["disconnects"] >= 1      # /never has heard of it
        time.sleep(0.4)
        equal(agent.get("/bytes/5").status, 200)
        has(agent.errors(), "the client went away inside the body")
        lacks(agent.errors(), "has disconnected")


@check
def frames_for_closed_streams_are_ignored():
    with Agent("hello") as agent:
        number = agent.open("/", method="POST", body=True)
        agent.finish(number)
        agent.frame(number, BODY, b"late")
        agent.frame(number, WINDOW, struct.pack("<I", 10))
        agent.frame(number, DISCONNECT)
        agent.frame(number, DISCONNECT)
        agent.frame(9999, WINDOW, struct.pack("<I", 10))
        agent.quiet()
        equal(agent.get("/").status, 200)
        equal(agent.errors(), "")


@check
def a_stream_may_be_endless():
    """A client that leaves ends it: send() raises an OSError, and nothing is logged."""
    with plain("""
ended = []
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 200})
    if scope["path"] == "/ended":
        return await send({"type": "http.response.body", "body": b"%d" % len(ended)})
    try:
        while True:
            await send({"type": "http.response.body", "body": b"x" * 5000, "more_body": True})
    except OSError:
        ended.append(1)
        raise
""") as agent:
        number = agent.open("/")
        agent.until(lambda: len(agent.streams[number].body) > 500000)
        agent.frame(number, DISCONNECT)
        agent.finish(number)
        equal(agent.text("/ended"), "1")
        equal(agent.errors(), "")


# ---- starting --------------------------------------------------------------------------

@check
def entrypoints():
    for entry, wanted in (("main", "has no colon"), ("main:", "no attribute"), (":app", "no module"),
                          ("a:b:c", "two colons"), ("", "has no colon"), ("a b:app", "Python module"),
                          ("../x:app", "Python module"), ("main.:app", "Python module"),
                          ("main:a b", "attribute"), ("main:app.", "attribute")):
        message, details, errors = start_error("hello", entry)
        has(message, wanted)
        has(message, repr(entry))
        equal(details, "")
    equal(start_error("hello", "mian:app")[:2],
          ("there is no module mian in %s/hello or elsewhere on sys.path" % APPS, ""))
    has(start_error("broken", "package.nothing:app")[0], "there is no module package.nothing in")
    has(start_error("hello", "main.app:x")[0], "there is no module main.app in")
    equal(start_error("hello", "main:ap")[0], "module main has no attribute ap")
    equal(start_error("broken", "package.inner.good:nested.ap")[0],
          "module package.inner.good.nested has no attribute ap")
    equal(start_error("kinds", "main:not_callable")[0], "main:not_callable is str, which cannot be called")
    for name in ("takes_nothing", "takes_four", "async_one"):
        has(start_error("kinds", "main:" + name)[0], "takes neither (scope, receive, send)")
    has(start_error("/no/such/folder")[0], "the code folder /no/such/folder cannot be entered: No such")
    with Agent("broken", "package.inner.good:nested.app") as agent:
        equal(agent.text("/"), "package.inner.good")


@check
def failing_imports():
    message, details, errors = start_error("broken", "raises:app")
    equal(message, "raises cannot be imported: ValueError: at import")
    has(details, 'in deep\n    raise ValueError("at import")')
    for noise in (OWN_FILE, "importlib"):
        lacks(details, noise)
    has(errors, "ValueError: at import")
    message, details, _ = start_error("broken", "exits:app")
    equal(message, "the program called exit(3) while it was imported")
    has(start_error("broken", "interrupts:app")[0], "KeyboardInterrupt")
    message, details, _ = start_error("broken", "misses:app")
    has(message, "ModuleNotFoundError: No module named 'no_such_module_at_all'")
    has(details, "misses.py")
    message, details, _ = start_error("broken", "syntax:app")
    has(message, "syntax cannot be imported: SyntaxError")
    has(details, "syntax.py")
    has(start_error("broken", "package.bad:app")[0], "ImportError: cannot import name 'missing_name'")


@check
def fork_while_importing():
    for entry in ("forks:app", "forks_raises:app"):
        with Agent("broken", entry) as agent:
            equal(agent.text("/"), "parent")
            time.sleep(0.1)
            equal(agent.text("/"), "parent")
            raised = ["ValueError: in the child"] if entry == "forks_raises:app" else []
            equal(agent.errors().strip().split("\n")[-1:] if raised else agent.errors(), raised or "")


@check
def import_runs_under_the_loop():
    with Agent("broken", "uses_loop:app") as agent:
        equal(agent.text("/"), "from the import")


@check
def exits_of_the_program():
    with Agent("broken", "escapes:app") as agent:
        equal(agent.get("/exit").failure, "SystemExit: 5")
        equal(agent.get("/exit").failure, "SystemExit: 5")
        agent.open("/task")
        equal(agent.exit_code(), 7)
    with Agent("echo") as agent:
        agent.open("/exit/9")
        equal(agent.exit_code(), 9)


@check
def a_crash_in_c_leaves_a_stack():
    with plain("""
import ctypes
async def app(scope, receive, send):
    if scope["type"] == "http":
        ctypes.string_at(0)
    raise NotImplementedError
""") as agent:
        agent.open("/")
        equal(agent.exit_code(), -signal.SIGSEGV)
        has(agent.errors(), 'File "<main>", line 5 in app')


@check
def plain_code():
    with open(os.path.join(APPS, "plain/main.py"), "rb") as file:
        code = file.read()
    for entry, source in (("app", code), ("main:app", code), ("app", code.decode())):
        with Agent("plain", entry, code=source) as agent:
            equal(agent.json("/x"), {"greeting": "from plain code", "name": "/x", "module": "main"})
            details = agent.get("/raise").details
            has(details, 'raise ValueError("line of plain code")')
    has(start_error("plain", "other:app", code="app = 1")[0], "plain code")
    has(start_error("plain", "missing", code="app = 1")[0], "has no attribute missing")
    message, details, _ = start_error("plain", "app", code="x = 1\ndef f(:\n")
    has(message, "SyntaxError")
    has(details, "def f(:")
    has(start_error("plain", "app", code=b"\xff\xfe")[0], "SyntaxError")
    latin = b"# coding: latin-1\nname = '\xe9'\n" + MISUSE.encode() + b"\nassert name == '\\xe9'"
    with Agent("plain", "app", code=latin) as agent:
        equal(agent.get("/fine").status, 200)


SHOW = """
import sys, os, json, time
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": json.dumps({
        "path": sys.path, "cwd": os.getcwd(), "env": dict(os.environ), "zone": time.strftime("%Z"),
        "optimize": sys.flags.optimize, "main": sorted(vars(sys.modules["main"])),
        "docs": __doc__, "name": __name__}).encode()})
"""


@check
def environment_and_paths():
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(folder + "/code")
        shown = []
        for exec_env, env in (({}, {"PYTHONPATH": folder + "/a:" + folder + "/b"}),
                              ({"PYTHONPATH": folder + "/a:" + folder + "/b"}, {}),
                              ({"PYTHONPATH": "/old"}, {"PYTHONPATH": folder + "/a:" + folder + "/b"})):
            env = dict(env, MORE="yes", TZ="XYZ-3")
            with Agent(folder + "/code", "app", code=SHOW, path=[folder + "/packages"], env=env,
                       exec_env=exec_env) as agent:
                shown.append(agent.json("/"))
        for seen in shown:
            equal(seen["path"][:4], [folder + "/code", folder + "/packages", folder + "/a", folder + "/b"])
            equal(seen["path"], shown[0]["path"])
            lacks(seen["path"], os.path.dirname(WORKER))
            equal((seen["cwd"], seen["env"]["MORE"], seen["zone"]), (folder + "/code", "yes", "XYZ"))
            equal(seen["name"], "main")
            equal([name for name in seen["main"] if not name.startswith("__")],
                  ["app", "json", "os", "sys", "time"])


@check
def modules_that_appear_late():
    """A warm worker finds what is unpacked after it started."""
    with tempfile.TemporaryDirectory() as folder:
        agent = Agent(folder + "/code", exec_env={"PYTHONPATH": folder + "/libs"}, start=False)
        with agent:
            os.mkdir(folder + "/code")
            os.mkdir(folder + "/libs")
            with open(folder + "/libs/late_library.py", "w") as file:
                file.write("name = 'late'\n")
            with open(folder + "/code/main.py", "w") as file:
                file.write("import late_library\n" + SHOW)
            agent.configure()
            equal(agent.start_error, None)


@check
def warmed_modules_do_not_hide_the_program_s():
    with tempfile.TemporaryDirectory() as folder:
        for name in ("secrets", "uuid", "mmap"):
            with open("%s/%s.py" % (folder, name), "w") as file:
                file.write("mine = True\n")
        with open(folder + "/main.py", "w") as file:
            file.write("import secrets, uuid, mmap, json\nmine = secrets.mine and uuid.mine and mmap.mine\n" + SHOW)
        with Agent(folder, start=False) as agent:
            maps = "/proc/%d/maps" % agent.process.pid
            deadline = time.monotonic() + PATIENCE_S
            while "_uuid" not in open(maps).read():     # loaded by uuid: warming is that far
                assert time.monotonic() < deadline
                time.sleep(0.01)
            agent.configure()
            equal(agent.start_error, None)
            equal(agent.get("/").failure, None)


@check
def optimisation_levels():
    for flags, level in ((("-O",), 1), (("-OO",), 2)):
        with plain(SHOW, flags=flags) as agent:
            equal(agent.json("/")["optimize"], level)
            equal(agent.get("/").failure, None)


@check
def fd_3_is_not_inherited():
    with plain("""
import os, subprocess, sys
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    fds = subprocess.run([sys.executable, "-c", "import os; print(os.listdir('/proc/self/fd'))"],
                         stdout=subprocess.PIPE, close_fds=False).stdout
    child = os.fork()
    if not child:
        try:
            os.fstat(3)
            os._exit(1)
        except OSError:
            os._exit(0)
    await send({"type": "http.response.start", "status": os.waitpid(child, 0)[1] or 200})
    await send({"type": "http.response.body", "body": fds})
""") as agent:
        stream = agent.get("/")
        equal(stream.status, 200)
        lacks(bytes(stream.body).decode(), "'3', '4'")


@check
def a_forked_child_that_comes_back():
    with plain("""
import os
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("shutdown", os.getpid())
        return await send({"type": "lifespan.shutdown.complete"})
    child = os.fork()
    if not child and scope["path"] == "/return":
        return
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"parent" if child else b"child"})
    if child:
        os.waitpid(child, 0)
""") as agent:
        for target in ("/", "/return", "/"):
            equal(agent.text(target), "parent")
        agent.frame(0, SHUTDOWN)
        equal(agent.exit_code(), 0)
        equal(agent.output(), "shutdown %d\n" % agent.process.pid)


@check
def a_forked_child_takes_no_slot():
    with plain("""
import os
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    child = os.fork()
    await send({"type": "http.response.start", "status": 200})
    if child:
        os.waitpid(child, 0)
    await send({"type": "http.response.body", "body": (b"p" if child else b"c") * 50000})
""", clears=False) as agent:
        for number in range(3):
            stream = agent.get("/")
            equal((stream.body == b"p" * 50000, stream.slots), (True, [number]))


@check
def a_forked_child_of_a_wsgi_thread():
    with Agent("kinds", "main:wsgi") as agent:
        child = int(agent.text("/fork"))
        deadline = time.monotonic() + 2
        while os.path.exists("/proc/%d" % child):       # the program reaps what it forked
            assert time.monotonic() < deadline, "the child lives on"
            equal(agent.get("/reap").status, 200)
            time.sleep(0.01)


@check
def lines_arrive_in_time():
    with Agent("echo") as agent:
        agent.json("/print/a-line")
        agent.output_has("a-line\n", 1)


# ---- lifespan and shutdown -------------------------------------------------------------------

@check
def lifespan_once_with_state():
    with Agent("echo") as agent:
        for _ in range(3):
            equal(agent.json("/state"), {"lifespans": 1, "state": {"from_lifespan": "yes"}})
        agent.frame(0, SHUTDOWN)
        equal(agent.exit_code(), 0)
        equal(agent.output(), "lifespan startup\nlifespan shutdown\n")
        equal(agent.errors(), "")


@check
def state_is_copied_per_request():
    with plain("""
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        scope["state"]["shared"] = []
        await send({"type": "lifespan.startup.complete"})
        await receive()
        return await send({"type": "lifespan.shutdown.complete"})
    body = b"%d %d" % (len(scope["state"]), len(scope["state"]["shared"]))
    scope["state"]["own"] = 1
    scope["state"]["shared"].append(1)
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": body})
""") as agent:
        equal([agent.text("/"), agent.text("/")], ["1 0", "1 1"])


@check
def lifespans_that_fail():
    message, details, _ = start_error("lifespan", "main:hang", lifespan_s=0.3)
    equal(message, "lifespan startup not answered within 0.3 s")
    has(details, "await asyncio.sleep(3600)")
    has(start_error("lifespan", "main:stubborn", lifespan_s=0.3)[0], "not answered within 0.3 s")
    equal(start_error("lifespan", "main:fail")[:2], ("lifespan startup failed: no database", "no database"))
    message, details, _ = start_error("lifespan", "main:startup_raises")
    equal(message, "lifespan startup failed: RuntimeError: no database")
    has(details, "main.py")
    message, details, _ = start_error("lifespan", "main:startup_exits")
    equal(message, "the program called exit(6) in its lifespan")


@check
def what_will_not_end_is_left():
    """Threads and tasks that ignore the shutdown hold the exit for a second only."""
    with plain("""
import asyncio, threading, time, atexit
atexit.register(print, "atexit ran")
def stuck():
    time.sleep(3600)
async def stubborn():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    if scope["path"] == "/task":
        app.task = asyncio.ensure_future(stubborn())
    if scope["path"] == "/thread":
        threading.Thread(target=stuck).start()
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body"})
""") as agent:
        equal(agent.get("/task").status, 200)
        agent.frame(0, SHUTDOWN)
        equal(agent.exit_code(3), 0)
    with Agent("kinds", "main:wsgi") as agent:
        agent.open("/sleep/3600")
        equal(agent.get("/none").status, 404)
        agent.frame(0, SHUTDOWN)
        equal(agent.exit_code(4), 0)


@check
def programs_without_lifespan_start():
    for entry, wanted in (("unsupported", "state -1"), ("returns", "state -1"), ("unaware", "unaware"),
                          ("unaware_of_body", "0")):
        with Agent("lifespan", "main:" + entry) as agent:
            equal(agent.text("/"), wanted)
            agent.frame(0, SHUTDOWN)
            equal(agent.exit_code(), 0)


@check
def shutdown_by_frame_signal_and_end():
    for way in ("frame", "SIGTERM", "SIGINT", "end"):
        with Agent("lifespan", "main:good") as agent:
            equal(agent.text("/"), "state 1")
            if way == "frame":
                agent.frame(0, SHUTDOWN)
            elif way == "end":
                agent.sock.shutdown(socket.SHUT_RDWR)
            else:
                agent.process.send_signal(getattr(signal, way))
            equal((way, agent.exit_code()), (way, 0))
            equal(agent.output(), "shutdown heard\n")
            equal(agent.errors(), "")
    with Agent("lifespan", "main:shutdown_fails") as agent:
        agent.frame(0, SHUTDOWN)
        equal(agent.exit_code(), 0)
        equal(agent.errors(), "lifespan shutdown failed: could not save\n")


@check
def what_runs_at_exit_is_not_disturbed():
    """A supervisor and the agent may both say SIGTERM, a terminal SIGINT as well."""
    with plain("""
import atexit, os, signal
@atexit.register
def last():
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    print("atexit ran")
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body"})
""") as agent:
        equal(agent.get("/").status, 200)
        agent.process.send_signal(signal.SIGTERM)
        equal((agent.exit_code(), agent.output(), agent.errors()), (0, "atexit ran\n", ""))


@check
def shutdown_before_the_program_runs():
    with Agent("hello", start=False) as agent:
        agent.frame(0, SHUTDOWN)
        equal(agent.exit_code(), 0)
    with Agent("hello", start=False) as agent:
        agent.sock.shutdown(socket.SHUT_RDWR)
        equal((agent.exit_code(), agent.errors()), (0, ""))
    with Agent("lifespan", "main:hang", start=False) as agent:
        agent.frame(0, CONFIGURE, marshal.dumps(agent.conf, 2))
        agent.frame(0, SHUTDOWN)
        equal((agent.exit_code(), agent.errors()), (0, ""))


@check
def shutdown_lets_requests_finish():
    with Agent("echo") as agent:
        short, long = agent.open("/sleep/0.3"), agent.open("/sleep/60")
        agent.get("/bytes/1")
        agent.frame(0, SHUTDOWN)
        late = agent.open("/bytes/1")
        equal(agent.finish(late).failure, "the program is shutting down")
        equal(agent.finish(short).status, 200)
        equal(agent.finish(long).failure, "the program is shutting down")
        equal(agent.exit_code(3), 0)
        has(agent.output(), "lifespan shutdown")
    with Agent("echo") as agent:                # work after the response counts as well
        agent.json("/background/0.3")
        agent.json("/background/60")
        agent.frame(0, SHUTDOWN)
        equal(agent.exit_code(4), 0)
        equal(agent.output(), "lifespan startup\nbackground done\nlifespan shutdown\n")
        equal(agent.errors(), "")
    with Agent("echo") as agent:
        number = agent.open("/sleep/0.2")
        agent.frame(0, SHUTDOWN)
        equal(agent.finish(number).status, 200)
        equal(agent.exit_code(0.7), 0)          # no longer than the requests need


@check
def shutdown_writes_what_is_left():
    """More than the socket holds, ended, not read, then the shutdown."""
    with Agent("echo", refill=False) as agent:
        numbers = [agent.open("/bytes/%d" % CREDIT) for _ in range(40)]
        agent.frame(0, SHUTDOWN)
        time.sleep(0.3)
        agent.until(lambda: all(agent.streams[number].closed for number in numbers))
        assert all(len(agent.streams[number].body) == CREDIT for number in numbers)
        equal(agent.exit_code(), 0)


@check
def closed_fds_end_the_channel():
    with Agent("echo") as agent:
        agent.open("/closefds")
        try:
            agent.until(lambda: agent.ended)
        except AssertionError:
            pass
        assert agent.ended


# ---- ASGI 2 and WSGI -----------------------------------------------------------------------

@check
def kinds_are_told_apart():
    for entry in ("asgi3", "asgi3_object", "asgi3_method", "asgi3_sync", "asgi3_partial",
                  "asgi3_decorated", "wsgi_function", "wsgi_object", "wsgi_partial"):
        with Agent("kinds", "main:" + entry) as agent:
            equal(agent.text("/"), entry.replace("_decorated", "").replace("_", " "))
    for entry, wanted in (("Asgi2", "asgi2 class"), ("asgi2_function", "asgi2 function"),
                          ("WsgiClass", "wsgi class")):
        with Agent("kinds", "main:" + entry) as agent:
            equal(agent.text("/"), wanted)
            agent.frame(0, SHUTDOWN)
            equal(agent.exit_code(), 0)


@check
def wsgi_environ():
    with Agent("kinds", "main:wsgi") as agent:
        seen = agent.json("/environ/\u00e9?a=%20b", method="PUT", raw_path=b"/environ/%C3%A9%ff",
                          scheme="https", headers=[
                              (b"content-type", b"text/x"), (b"content-length", b"0"), (b"x-a", b"1"),
                              (b"x-a", b"2"), (b"cookie", b"c=1"), (b"cookie", b"d=2"), (b"x_b", b"bad"),
                              (b"x-c", b"\xe9")])
        wanted = {"REQUEST_METHOD": "PUT", "SCRIPT_NAME": "", "PATH_INFO": "/environ/\xc3\xa9\xff",
                  "QUERY_STRING": "a=%20b", "CONTENT_TYPE": "text/x", "CONTENT_LENGTH": "0",
                  "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1",
                  "REMOTE_ADDR": "10.0.0.9", "HTTP_HOST": "test", "HTTP_X_A": "1,2",
                  "HTTP_COOKIE": "c=1; d=2", "HTTP_X_C": "\xe9", "wsgi.version": [1, 0],
                  "wsgi.url_scheme": "https", "wsgi.multithread": True, "wsgi.multiprocess": False,
                  "wsgi.run_once": False, "wsgi.errors": "TextIOWrapper"}
        equal({key: seen.get(key) for key in wanted}, wanted)
        lacks(seen, "HTTP_X_B")
        equal(agent.json("/environ", client=None)["REMOTE_ADDR"], "")


@check
def wsgi_responses():
    with Agent("kinds", "main:wsgi") as agent:
        equal(agent.text("/parts/100000"), "a" + "b" * 100000)
        equal(agent.text("/closed"), "1")
        equal(agent.text("/write"), "written returned")
        stream = agent.get("/empty")
        equal((stream.status, stream.headers, bytes(stream.body)), (204, [], b""))
        stream = agent.get("/excinfo")
        equal((stream.status, bytes(stream.body)), (500, b"replaced"))
        stream = agent.get("/none")
        equal((stream.status, stream.headers), (404, [(b"Content-Type", b"text/plain")]))


@check
def wsgi_streams_as_it_goes():
    with Agent("kinds", "main:wsgi") as agent:
        number = agent.open("/drip/3")
        agent.until(lambda: len(agent.streams[number].body) == 4, 0.6)
        equal(bytes(agent.finish(number).body), b"dripdripdrip")


@check
def wsgi_request_bodies():
    data = os.urandom(3 << 20)
    with Agent("kinds", "main:wsgi") as agent:
        number = agent.open("/body", method="POST", body=True)
        agent.upload(number, data)
        equal(bytes(agent.finish(number).body).decode(), "%d %s" % (len(data), hashlib.sha256(data).hexdigest()))
        number = agent.open("/lines", method="POST", body=True)
        agent.upload(number, b"one\ntwo\nthree", piece=2)
        equal(bytes(agent.finish(number).body), b"one\n|two\n|three")
        number = agent.open("/slowbody/0.3", method="POST", body=True)
        stream = agent.streams[number]
        stream.window = 0
        agent.frame(number, BODY, b"x" * CREDIT)
        agent.quiet(0.1)
        agent.upload(number, b"y" * 200000)
        equal(bytes(agent.finish(number).body), b"%d" % (CREDIT + 200000))
        equal(agent.text("/body"), "0 " + hashlib.sha256(b"").hexdigest())


@check
def wsgi_credit_and_disconnect():
    with Agent("kinds", "main:wsgi", refill=False) as agent:
        number = agent.open("/forever")
        stream = agent.streams[number]
        agent.until(lambda: len(stream.body) == CREDIT)
        agent.quiet()
        agent.allow(number, 5000)
        agent.until(lambda: len(stream.body) == CREDIT + 5000)
        agent.frame(number, DISCONNECT)
        agent.finish(number, 1)
        body = agent.open("/body", method="POST", body=True)
        agent.frame(body, BODY, b"part")
        agent.frame(body, DISCONNECT)
        agent.finish(body, 1)
        deadline = time.monotonic() + 2
        while agent.text("/closed") != "1":     # the iteration has stopped
            assert time.monotonic() < deadline
        equal(agent.errors(), "")


@check
def wsgi_disconnects_at_any_moment():
    with Agent("kinds", "main:wsgi") as agent:
        for _ in range(10):
            numbers = [agent.open("/forever") for _ in range(20)]
            for number in numbers:
                agent.until(lambda: len(agent.streams[number].body) > CREDIT)
                agent.frame(number, DISCONNECT)
            for number in numbers:
                agent.finish(number)
        equal(agent.errors(), "")


@check
def wsgi_failures():
    with Agent("kinds", "main:wsgi") as agent:
        for name, wanted in (
                ("raise", "ValueError: raised on purpose"),
                ("twice", "RuntimeError: start_response was called twice"),
                ("nohead", "RuntimeError: the program did not call start_response before the body"),
                ("silent", "RuntimeError: the program did not call start_response before the body"),
                ("str", "TypeError: sequence item 0: expected a bytes-like object, str found"),
                ("badheader", "ValueError: header b'one\\r\\nX-Smuggled: two' holds CR, LF or NUL"),
                ("excinfo_late", "ValueError: after the head was sent")):
            equal(agent.get("/" + name).failure, wanted)
        equal(agent.get("/write").failure, None)


@check
def wsgi_requests_are_concurrent():
    with Agent("kinds", "main:wsgi") as agent:
        begun = time.monotonic()
        for number in [agent.open("/sleep/0.3") for _ in range(16)]:
            agent.finish(number)
        assert time.monotonic() - begun < 1.2
        agent.frame(0, SHUTDOWN)
        equal(agent.exit_code(), 0)


# ---- events --------------------------------------------------------------------------------

@check
def events_are_answered():
    with Agent("events") as agent:
        for text, wanted in (
                ("receive", {"type": "aleph.message", "body": "receive", "more_body": False}),
                ("scalar", "just text"), ("first", "first"), ("task", "from a task"),
                ("nested task", "from a task's task"), ("big", {"body": b"b" * 1000000})):
            stream = agent.event(text)
            equal((stream.failure, unpack(bytes(stream.body))), (None, wanted))
        equal(bytes(agent.event("nothing").body), b"")
        equal(agent.event("raise").failure, "ValueError: event raised")
        equal(agent.event("task raises").failure, "ValueError: in the task")
        has(agent.event("deep").failure, "nested deeper")
        number = agent.open("/", event="wait")
        agent.quiet()
        agent.frame(number, DISCONNECT)
        agent.finish(number, 1)


@check
def event_values_as_msgpack():
    with Agent("events") as agent:
        value = unpack(bytes(agent.event("types").body))
        equal(value, {"none": None, "yes": True, "no": False, "small": 7, "minus": -7, "k": 300,
                      "big": 2**63 + 5, "low": -2**63, "float": 1.5, "text": "gr\u00fc\u00df",
                      "long": "t" * 70000, "bytes": b"\0\xff", "list": [1, [2, [3]]],
                      "set": "{1}", "huge": str(2**70), "many": list(range(20)), 5: "int key",
                      "('a', 1)": "tuple key", "enum": "red"})


@check
def event_by_a_returned_coroutine():
    with Agent("events", "main:wrapper") as agent:
        equal(unpack(bytes(agent.event("here").body)), {"seen": "here"})
        equal(agent.get("/").failure, "ValueError: No HTTP app registered")


@check
def event_for_wsgi_is_a_post():
    with Agent("kinds", "main:wsgi") as agent:
        equal(unpack(bytes(agent.event('{"a": "\u00e9"}').body)), 'aleph.message {"a": "\u00e9"}'.encode())


@check
def examples_work():
    with Agent(os.path.join(APPS, "../../examples/hello-python")) as agent:
        has(agent.text("/some/path"), "Hello from Python. You asked for /some/path")


@check
def frameworks():
    """Those that are installed here."""
    for folder, entry, wanted in (
            ("fastapi", "main:app", "lifespans"), ("flask", "main:app", "flask"),
            ("quart", "main:app", "quart"), ("django", "main:asgi", "django"),
            ("django", "main:wsgi", "django")):
        if subprocess.run([PYTHON, "-c", "import " + folder], stderr=subprocess.DEVNULL).returncode:
            print("skip %s %s: not installed" % (folder, entry))
            continue
        with Agent(folder, entry) as agent:
            equal(agent.start_error, None)
            has(agent.json("/"), wanted)
            equal(agent.json("/item/7?q=red"), {"item": 7, "q": "red"})
            number = agent.open("/body", method="POST", body=True,
                                headers=[(b"content-length", b"1000000")])
            agent.upload(number, b"z" * 1000000)
            equal(json.loads(bytes(agent.finish(number).body))["body_bytes"], 1000000)
            if folder != "quart":
                equal(agent.text("/stream"), "".join("%05d" % number for number in range(1000)))
            if folder == "fastapi":
                equal(agent.text("/file"), "0123456789" * 20000)
                begun = time.monotonic()
                equal(agent.json("/background/1"), {"accepted": 1.0})
                assert time.monotonic() - begun < 0.5
                time.sleep(1.1)
                equal(agent.json("/"), {"lifespans": 1, "background": 1})
            agent.frame(0, SHUTDOWN)
            equal((folder, agent.exit_code()), (folder, 0))


# ---- figures -------------------------------------------------------------------------------

def bench():
    times = []
    for _ in range(9):
        begun = time.monotonic()
        agent = Agent("hello", start=False)
        times.append((time.monotonic() - begun) * 1000)
        with agent:
            pass
    print("HELLO after %.0f ms (median of 9)" % sorted(times)[4])
    for folder, entry in (("hello", "main:app"), ("kinds", "main:wsgi_function")):
        for at_once in (1, 64, 512):
            with Agent(folder, entry) as agent:
                before = agent.cpu_s()
                count, took = pipeline(agent, at_once)
                print("%s, %d at once: %.0f requests/s, %.1f us of the worker's CPU each" % (
                    entry, at_once, count / took, (agent.cpu_s() - before) / count * 1e6))


def pipeline(agent, at_once, seconds=2.0):
    """Keeps so many requests under way; counts ends without looking at the rest."""
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http",
             "path": "/", "raw_path": b"/", "query_string": b"",
             "headers": [(b"host", b"test"), (b"user-agent", b"bench"), (b"accept", b"*/*")],
             "client": ("10.0.0.9", 4711), "server": ("127.0.0.1", 80)}
    payload = marshal.dumps(parts(scope), 2)
    number = done = 0
    rest, begun = b"", time.monotonic()
    to_send = at_once
    header = struct.Struct("<IIBBH")
    while time.monotonic() - begun < seconds:
        frames = []
        for _ in range(to_send):
            number += 1
            frames.append(header.pack(len(payload), number, REQUEST, END, 0) + payload)
        agent.sock.sendall(b"".join(frames))
        to_send = 0
        data = rest + agent.sock.recv(1 << 18)
        at = 0
        while len(data) - at >= 12:
            size, _, kind, flags, _ = header.unpack_from(data, at)
            if len(data) - at < 12 + size:
                break
            at += 12 + size
            if kind == RESPONSE and flags:
                to_send += 1
        rest = data[at:]
        done += to_send
    return done, time.monotonic() - begun


def run(functions):
    failed = False
    for function in functions:
        name = function.__name__
        try:
            function()
            line = "ok " + name
        except Exception as exc:
            failed = True
            lines = [frame.lineno for frame in traceback.extract_tb(exc.__traceback__)
                     if frame.name == name]
            line = "FAIL %s: line %d: %s: %s" % (name, lines[-1], type(exc).__name__, exc)
        print(line.replace("\n", "\\n"), flush=True)
    return failed


def main():
    for fd in 3, 4:                     # so that nothing of ours is there
        os.dup2(os.open("/dev/null", os.O_RDONLY), fd)
    names = sys.argv[4:]
    if names == ["bench"]:
        return bench()
    chosen = [function for function in checks if not names or function.__name__ in names]
    if not chosen or len(names) > len(chosen):
        sys.exit("no such check")
    children = []
    for share in range(SHARES):         # much of a check is waiting
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(run(chosen[share::SHARES]))
    sys.exit(any([os.waitpid(child, 0)[1] for child in children]))


main()

"""The Python worker: runs one ASGI or WSGI program for the agent.

Started by the agent as `python3 [-O|-OO] worker.py`, CPython 3.9 or later, standard library
only. Environment: fd 3 is one end of a Unix stream socket that carries frames (agent.h has
their layout and who may send what); fd 4 is memory for long bodies, or closed; fds 1 and 2 are
the program's log; PYTHONPATH is honoured.

    import asyncio ... HELLO       as much as can be done before the program is known
    CONFIGURE                      environment, paths, import, lifespan startup
    READY or START_FAILED
    REQUEST, REQUEST_BODY ...      one Exchange each, many at once
    SHUTDOWN, SIGTERM or EOF       exchanges finish, lifespan shutdown

The agent kills a worker that breaks the frame rules, so these hold: a stream is closed by us
exactly once (Exchange.close), nothing is written to a closed stream (Exchange.is_open), and
only the event loop's thread writes (Channel.put).

Exit codes: 0 after a shutdown, 1 after START_FAILED; anything else is the program's own.
"""
import os
import sys

if __name__ == "__main__":
    for fd in 3, 4:                     # before anything can fork and exec
        try:
            os.set_inheritable(fd, False)
        except OSError:
            pass
    if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]                 # programs must not import from our folder

import asyncio
import contextvars
import faulthandler
import functools
import gc
import importlib
import inspect
import io
import linecache
import marshal
import select
import selectors
import signal
import socket
import struct
import threading
import time
import traceback
import types

HEADER = struct.Struct("<IIBBH")        # payload length, stream, type, flags, zero
HEAD = struct.Struct("<HH")             # of a response: status, number of headers
SLOT = struct.Struct("<II")             # of a body: which, its bytes
CONFIGURE, REQUEST, REQUEST_BODY, DISCONNECT, SHUTDOWN, WINDOW = range(1, 7)
(HELLO, READY, START_FAILED, RESPONSE_HEAD, RESPONSE_BODY, FAILURE, TEXT, BINARY, CLOSE,
 RESPONSE_SLOT) = range(7, 17)
END = 0x01                              # flag: last frame of its direction

CREDIT = 192 << 10                      # body bytes under way per stream and direction
PIECE = 192 << 10                       # most body bytes in one frame
READ = 128 << 10                        # one read
SLOTS, SLOTS_AT, SLOT_BYTES = 32, 4096, PIECE   # of the memory that the agent sees, too
SLOT_LEAST = 16 << 10                   # body bytes that are worth one
TURNS = 4                               # of a busy loop, at most, from one look for events to the next
LONG, PIECES = 64 << 10, 256            # what is longer goes out without a copy, so many at once
SWITCHING = 101                         # the status that accepts a WebSocket
REASON_MAX = 123                        # bytes of why a WebSocket is closed (RFC 6455, 5.5)
HEAD_MAX = 256 << 10                    # the agent takes no larger frame
HEADS_KEPT, HEAD_KEPT_MAX = 64, 1 << 10     # heads that may be used again, and their bytes
MESSAGE_MAX, DETAILS_MAX = 4 << 10, 24 << 10    # characters of an error; the agent keeps less
MSGPACK_DEPTH = 60                      # of an event's reply; the agent reads 64
THREADS = 32                            # WSGI requests at once
GATHER_S, GATHER = 0.0001, 256 << 10    # how long a response waits for others to leave with it, and
                                        # with how many body bytes at most
LINGER_S = 0.0005                       # a call that lasts so long after its response may block, too
DRAIN_S = 1.0                           # what a shutdown gives requests in flight
EXIT_S = 1.0                            # and then the program's tasks, threads, atexit functions
EVENT_TASKS_S = 30.0                    # what tasks have for the reply, once the call returned

# What FastAPI, Flask, Quart and Django all import from the standard library.
WARM = ("json", "typing", "datetime", "decimal", "urllib.parse", "dataclasses", "pathlib",
        "hashlib", "uuid", "copy", "html", "tempfile", "mimetypes", "ipaddress",
        "concurrent.futures.thread", "email.message", "email.utils", "http.client",
        "http.cookies", "secrets")


# ---- Errors as text -------------------------------------------------------------------

class StartError(Exception):
    """Why the program cannot start: a message for its author, perhaps with a traceback."""

    def __init__(self, message, details=""):
        super().__init__(message)
        self.details = details


class Disconnected(OSError):
    """Raised by send() when nobody waits for the answer any more (ASGI 2.4)."""


def describe(exc):
    """In one line; the traceback has the rest."""
    try:
        text = str(exc).strip().partition("\n")[0]
    except Exception:                   # a program's own class may do anything
        text = "(its text cannot be had)"
    return type(exc).__name__ + (": " + text if text else "")


def comes_from_disconnect(exc):
    for _ in range(20):                 # a program can make a chain that has no end
        if exc is None or isinstance(exc, Disconnected):
            break
        exc = exc.__cause__ or exc.__context__
    return isinstance(exc, Disconnected)


def format_error(exc):
    """The traceback, without the frames of this file that stand above the program's."""
    tb = exc.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(exc), exc, tb))


def waiting_at(coro):
    """Where a suspended coroutine waits, innermost last."""
    frames = []
    while getattr(coro, "cr_frame", None) is not None:
        if coro.cr_frame.f_code.co_filename != __file__:
            frames.append((coro.cr_frame, coro.cr_frame.f_lineno))
        coro = coro.cr_await
    lines = traceback.StackSummary.extract(iter(frames)).format()
    return "It waits here (most recent call last):\n" + "".join(lines)


def error_payload(message, details=""):
    """`message NUL traceback`; of a long message the start counts, of a traceback the end."""
    return b"\0".join(text.replace("\0", "\\0").encode("utf-8", "replace")
                      for text in (message[:MESSAGE_MAX], details[-DETAILS_MAX:]))


def log(text):
    try:
        sys.stderr.write(text if text.endswith("\n") else text + "\n")
        sys.stderr.flush()
    except Exception:                   # closed or replaced by the program
        pass


def leave(code):
    """Exit at once: threads that the program left behind must not hold the process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass
    os._exit(code)


# ---- Selector: fewer system calls ------------------------------------------------------

class Selector(selectors.EpollSelector):
    """asyncio looks for events between any two steps of its tasks. While some are to be run at
    once it need not do so each time: a request takes two or three such turns. And what comes
    most often, frames from the agent and nothing else, is seen to right here; if the loop has
    nothing else to do then, without a turn of it."""

    turns = 0

    def __init__(self, channel):
        super().__init__()
        self.channel = channel
        self.epoll = select.epoll.fromfd(os.dup(self.fileno()))
        channel.selector = self

    def select(self, timeout=None):
        if self.channel.at:             # a request's step runs the loop: what others wait for must go
            self.channel.flush()
        self.turns += 1
        if timeout is not None and timeout <= 0 and self.turns < TURNS:
            return []
        self.turns = 0
        channel = self.channel
        while self.epoll.poll(timeout) == channel.readable:
            try:
                channel.on_readable()
            except Exception as exc:    # as the loop would do
                log(format_error(exc))
            if timeout is not None or channel.loop._ready or channel.loop._scheduled:
                return []
        return super().select(0)


def new_loop(channel):
    loop = asyncio.SelectorEventLoop(Selector(channel))
    asyncio.set_event_loop(loop)
    return loop


# ---- Channel: frames over the socket ---------------------------------------------------

class Channel:
    """Reads frames and hands them to `on_frame`; writes the frames of one turn of the loop
    in one go. What cannot be written yet stays in `out`; credit bounds it."""

    def __init__(self, sock):
        self.sock = sock
        self.view = memoryview(bytearray(READ))     # of what was read, up to `have`, frames up to
        self.at = self.have = 0                     # `at` are handled or, but in on_readable, gone
        self.out = []                   # frames, headers and payloads
        self.size = self.laid = 0       # since the last flush: bytes of payloads, of bodies in slots
        self.slots = None               # an mmap, once map_slots() has found one
        self.flushing = self.forked = self.full = False
        self.nested = False             # what comes now is read in a step of some task
        self.flushed_at = 0.0
        self.loop = self.selector = self.on_frame = self.on_end = None
        self.readable = None            # what epoll says when only the agent has written
        os.register_at_fork(after_in_child=self.on_fork)

    def on_fork(self):
        """In a child that the program forks: neither channel and slots nor our loop are its own."""
        self.forked, self.readable, self.slots = True, None, None
        self.sock.close()
        if self.loop is not None:
            self.loop.call_soon(leave, 0)

    def map_slots(self):
        """Find the memory for long bodies."""
        try:
            import mmap                 # not before HELLO: it is a file to be loaded
            self.slots = mmap.mmap(4, SLOTS_AT + SLOTS * SLOT_BYTES)
            os.close(4)
        except (ImportError, OSError, ValueError):
            pass                        # there is none

    def say(self, kind, payload=b""):
        """Write a frame of stream 0 now, blocking: before and outside the loop."""
        self.sock.setblocking(True)
        self.sock.sendall(HEADER.pack(len(payload), 0, kind, 0, 0) + payload)

    def wait_for_frame(self):
        """Block for one frame; (None, b"") at the end of the stream."""
        data = bytearray()
        need = HEADER.size
        while len(data) < need:
            piece = self.sock.recv(min(need - len(data), 1 << 20))
            if not piece:
                return None, b""
            data += piece
            if len(data) == HEADER.size:
                need += HEADER.unpack(data)[0]
        return HEADER.unpack_from(data)[2], bytes(data[HEADER.size:])

    def start(self, loop, on_frame, on_end):
        self.loop, self.on_frame, self.on_end = loop, on_frame, on_end
        self.sock.setblocking(False)
        self.readable = [(self.sock.fileno(), select.EPOLLIN)]
        loop.add_reader(self.sock.fileno(), self.on_readable)

    def on_readable(self):
        if self.at:                     # a frame's handler runs the loop: see Selector
            self.keep()
        try:
            count = self.sock.recv_into(self.view[self.have:] if self.have else self.view)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        if not count:
            return self.end()
        self.have += count
        self.nested = asyncio.current_task(self.loop) is not None
        unpack, on_frame = HEADER.unpack_from, self.on_frame
        ours, self.flushing = not self.flushing, True
        try:
            while self.have - self.at >= 12:
                length, stream, kind, flags, _ = unpack(self.view, self.at)
                start = self.at + 12
                end = start + length
                if end > self.have:
                    break
                self.at = end
                on_frame(stream, kind, flags, self.view[start:end])
        finally:
            self.keep()
            if ours:
                self.flush()

    def keep(self):
        """Move the start of a frame to the front, where there is room for the rest of it."""
        at, have = self.at, self.have
        self.at, self.have = 0, have - at
        if at == have and len(self.view) == READ:
            return
        rest, need = self.view[at:have].tobytes(), READ
        if len(rest) >= 12:
            need = max(READ, 12 + HEADER.unpack_from(rest)[0])
        if need != len(self.view):
            self.view = memoryview(bytearray(need))
        self.view[:len(rest)] = rest

    def put(self, stream, kind, payload=b"", flags=0):
        size = len(payload)
        self.out.append(HEADER.pack(size, stream, kind, flags, 0))
        if size:
            self.out.append(payload)
            self.size += size
        if not self.flushing:
            self.flushing = True
            self.loop.call_soon(self.flush)

    def put_body(self, stream, body, flags=0):
        """Of a response; a long one in the first slot that is free, which the caches know best."""
        size = len(body)
        if SLOT_LEAST <= size <= SLOT_BYTES and self.slots is not None:
            slot = self.slots.find(b"\0", 0, SLOTS)
            if slot >= 0:
                at = SLOTS_AT + slot * SLOT_BYTES
                self.slots[slot] = 1
                self.slots[at:at + size] = body
                self.laid += size
                return self.put(stream, RESPONSE_SLOT, SLOT.pack(slot, size), flags)
        self.put(stream, RESPONSE_BODY, body, flags)

    def flush(self, now=None):
        self.flushing = False
        if self.full or not self.out:
            return                      # on_writable goes on with it
        self.flushed_at = now or time.monotonic()
        if self.size < LONG:            # a copy is cheaper than many pieces
            self.out[:] = (b"".join(self.out),)
        self.size = self.laid = 0
        if not self.write():
            self.full = True
            self.loop.add_writer(self.sock.fileno(), self.on_writable)

    def on_writable(self):
        if self.write() and self.sock.fileno() >= 0:
            self.full = False
            self.loop.remove_writer(self.sock.fileno())

    def write(self):
        """False: the socket takes no more for now."""
        out = self.out
        while out:
            try:
                sent = self.sock.send(out[0]) if len(out) == 1 else self.sock.sendmsg(out[:PIECES])
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                out.clear()             # nobody is there to read it
                self.end()
                break
            done = 0
            while done < len(out) and sent >= len(out[done]):
                sent -= len(out[done])
                done += 1
            del out[:done]
            if sent:
                out[0] = memoryview(out[0])[sent:]
        return True

    def finish(self):
        """Before the exit, write what the agent has not read yet."""
        self.flush()
        try:
            self.sock.settimeout(EXIT_S)
            self.sock.sendall(b"".join(self.out))
        except OSError:
            pass                        # it is gone, or stuck
        self.out.clear()

    def end(self):
        if self.sock.fileno() >= 0:
            self.readable = None
            self.loop.remove_reader(self.sock.fileno())
            self.loop.remove_writer(self.sock.fileno())
            self.sock.close()
        self.on_end()


# ---- Exchange: one request and its response ---------------------------------------------

heads = {}                              # payloads of small ones, each by what it was made of


def head_payload(status, headers, least=200):
    """What make_head makes: most heads are like one before."""
    key = status, tuple(headers), least
    try:
        payload = heads.get(key)
    except TypeError:                   # headers that are lists
        return make_head(*key)
    if payload is not None:
        return payload
    payload = make_head(*key)
    if len(payload) <= HEAD_KEPT_MAX:
        if len(heads) == HEADS_KEPT:
            heads.clear()
        heads[key] = payload
    return payload


def make_head(status, headers, least):
    """u16 status, u16 n, n times `name NUL value NUL`; raises what the program did wrong."""
    if not isinstance(status, int) or not least <= status <= 999:
        raise ValueError("status is %r, not a number from 200 to 999" % (status,))
    flat = []
    for name, value in headers:
        flat += name, value
    try:
        block = b"\0".join(flat)
    except TypeError:
        bad = next(item for item in flat if not isinstance(item, (bytes, bytearray)))
        raise TypeError("header %r is %s, not bytes" % (bad, type(bad).__name__)) from None
    if flat:
        block += b"\0"
    if b"\r" in block or b"\n" in block or block.count(b"\0") != len(flat):
        bad = next(item for item in flat if any(byte in item for byte in b"\r\n\0"))
        raise ValueError("header %r holds CR, LF or NUL" % (bad,))
    if len(block) > HEAD_MAX - 4 or len(flat) > 2 * 0xffff:
        raise ValueError("response head of %d bytes is too large" % len(block))
    return HEAD.pack(status, len(flat) // 2) + block


@types.coroutine
def next_turn():
    """Let the loop run what it has been given up to now, Channel.flush above all."""
    yield


class Exchange:
    """An ASGI http request. The frames of its stream come in by on_body, on_window and
    on_disconnect; the program talks to receive() and send()."""

    __slots__ = ("worker", "stream", "scope", "body", "body_ended", "body_told", "taken",
                 "credit", "waiters", "started", "is_open", "closed_at", "gone", "task")

    def __init__(self, worker, stream, scope, body_ended):
        self.worker = worker
        self.stream = stream
        self.scope = scope
        self.body = []                  # pieces that receive() has not handed over yet
        self.body_ended = body_ended
        self.body_told = False          # the program has heard more_body: False
        self.taken = 0                  # bytes handed over that no WINDOW has returned yet
        self.credit = CREDIT
        self.waiters = []               # futures: woken by whatever happens to this stream
        self.started = False
        self.is_open = True
        self.gone = False               # closed because nobody waits for the answer

    def start(self):
        self.worker.running.add(self)
        self.task = self.worker.new_task(self.run())

    async def run(self):
        worker = self.worker
        try:
            await self.call()
            if self.is_open:
                self.fail("the program returned without a complete response")
            elif not worker.lingers and time.monotonic() - self.closed_at > LINGER_S:
                worker.lingers = True
        except BaseException as exc:    # SystemExit too: one request does not end the others
            self.on_error(exc)
        finally:
            worker.running.discard(self)
            if worker.stopping:
                worker.check_idle()

    def call(self):
        return self.worker.app(self.scope, self.receive, self.send)

    # -- from the agent

    def on_body(self, data, ended):
        if data:
            self.body.append(data)
        self.body_ended = ended
        self.wake()

    def on_window(self, more):
        self.credit += more
        self.wake()

    def on_disconnect(self, payload):
        self.gone = True
        self.close(b"")

    def on_stop(self):
        """The worker is to end: a request has its time to finish."""

    # -- to the agent

    def close(self, data):
        """The last bytes and the end of the response."""
        self.worker.put_body(self.stream, data, END)
        self.closed()

    def fail(self, message, details=""):
        self.worker.put(self.stream, FAILURE, error_payload(message, details))
        self.closed()

    def closed(self):
        self.is_open = False
        self.closed_at = time.monotonic()
        del self.worker.exchanges[self.stream]
        if self.worker.stopping:
            self.worker.check_idle()
        self.wake()

    def on_error(self, exc):
        if self.gone and comes_from_disconnect(exc):
            return                      # the program heard of it and stopped, as it should
        if not self.is_open and self.worker.stopping and isinstance(exc, asyncio.CancelledError):
            return                      # work after the response that the shutdown cut short
        details = format_error(exc)
        log(details)
        if self.is_open:
            self.fail(describe(exc), details)

    def give_back(self, count):
        """Let the agent send as much more as the program has taken, half a window at once."""
        self.taken += count
        if self.taken >= CREDIT // 2 and self.is_open and not self.body_ended:
            self.worker.put(self.stream, WINDOW, struct.pack("<I", self.taken))
            self.taken = 0

    # -- the program's side

    def wake(self):
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self):
        waiter = self.worker.loop.create_future()
        self.waiters.append(waiter)
        try:
            await waiter
        finally:
            self.waiters.remove(waiter)

    async def receive(self):
        while self.is_open:
            if self.body or self.body_ended and not self.body_told:
                body = b"".join(self.body)
                self.body.clear()
                self.body_told = self.body_ended
                self.give_back(len(body))
                return {"type": "http.request", "body": body, "more_body": not self.body_ended}
            await self.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        kind = message["type"]
        if not self.is_open:
            self.check_open(kind)
        if kind == "http.response.start":
            if self.started:
                raise RuntimeError("http.response.start was sent twice")
            head = head_payload(message["status"], message.get("headers", ()))
            self.started = True
            self.worker.put(self.stream, RESPONSE_HEAD, head)
        elif kind == "http.response.body":
            if not self.started:
                raise RuntimeError("http.response.body was sent before http.response.start")
            body = message.get("body", b"")
            if type(body) is not bytes:
                if not isinstance(body, (bytes, bytearray, memoryview)):
                    raise TypeError("body is %s, not bytes" % type(body).__name__)
                body = bytes(body)      # the program may go on changing its own
            if len(body) > self.credit or len(body) > PIECE:
                body = await self.send_pieces(body, kind)
            self.credit -= len(body)
            if message.get("more_body", False):
                if body:
                    self.worker.put_body(self.stream, body)
                await next_turn()       # the bytes leave before the program goes on, or blocks
            else:
                self.close(body)
                worker = self.worker
                channel = worker.channel
                if (not worker.exchanges and channel.at == channel.have
                        or channel.size + channel.laid >= GATHER
                        or self.closed_at - channel.flushed_at > GATHER_S):
                    channel.flush(self.closed_at)
                elif worker.lingers:
                    await next_turn()
        else:
            raise RuntimeError("unknown message type %r" % (kind,))

    async def send_pieces(self, body, kind="http.response.body"):
        """Send as credit comes in; return the last piece, which is within the credit."""
        at, size = 0, len(body)
        while size - at > min(self.credit, PIECE):
            if self.credit > 0:
                piece = body[at:at + min(self.credit, PIECE)]
                at += len(piece)
                self.credit -= len(piece)
                self.worker.put_body(self.stream, piece)
            else:
                await self.wait()
                self.check_open(kind)
        return body[at:]

    def check_open(self, kind):
        if self.gone:
            raise Disconnected("the client has disconnected")
        if not self.is_open:
            raise RuntimeError("%s was sent after the response was complete" % (kind,))


# ---- WebSocket: messages both ways ---------------------------------------------------------

class WebSocket(Exchange):
    """A connection of type websocket. Messages come and go in pieces; a piece takes its size and
    that of a frame's header of the credit. Each gives it back as it comes, those of messages that
    receive() has not been asked for when it has taken them all."""

    __slots__ = ("greeted", "accepted", "pieces", "held", "sending", "code", "reason")

    def start(self):
        scope = self.scope
        del scope["method"]
        scope["scheme"] = "wss" if scope["scheme"] == "https" else "ws"
        scope["subprotocols"] = [
            item.strip() for name, value in scope["headers"] if name == b"sec-websocket-protocol"
            for item in value.decode("latin-1").split(",") if item.strip()]
        scope["extensions"] = {"websocket.http.response": {}}
        self.body_ended = self.greeted = self.accepted = self.sending = False
        self.pieces = []                # of a message whose end is not here yet
        self.held = 0
        self.code, self.reason = 1006, ""
        super().start()

    async def call(self):
        await super().call()
        if self.accepted and self.is_open:
            self.finish(1000, "")

    # -- from the agent

    def on_piece(self, kind, data, ended):
        self.held += len(data) + HEADER.size
        self.pieces.append(data)
        if ended:
            data = b"".join(self.pieces)
            self.pieces.clear()
            self.body.append(data.decode() if kind == TEXT else data)
            self.wake()
        elif not self.body:
            self.release()

    def on_disconnect(self, payload):
        if payload:
            self.code, self.reason = int.from_bytes(payload[:2], "little"), payload[2:].decode()
        super().on_disconnect(payload)

    def on_stop(self):
        if self.accepted:
            self.finish(1012, "")

    # -- to the agent

    def release(self):
        held, self.held = self.held, 0
        self.give_back(held)

    def fail(self, message, details=""):
        self.code = 1011
        super().fail(message, details)

    def finish(self, code, reason):
        if type(code) is not int or not (1000 <= code <= 1014 and not 1004 <= code <= 1006
                                         or 3000 <= code <= 4999):
            raise ValueError("%r is no code to close a WebSocket with" % (code,))
        reason = reason.encode("utf-8", "replace")[:REASON_MAX].decode("utf-8", "ignore")
        self.code, self.reason = code, reason
        self.worker.put(self.stream, CLOSE, struct.pack("<H", code) + reason.encode())
        self.closed()

    # -- the program's side

    async def receive(self):
        if not self.greeted:
            self.greeted = True
            return {"type": "websocket.connect"}
        while not self.body:
            if not self.is_open:
                return {"type": "websocket.disconnect", "code": self.code, "reason": self.reason}
            await self.wait()
        data = self.body.pop(0)
        if not self.body:
            self.release()
        return {"type": "websocket.receive", "text" if type(data) is str else "bytes": data}

    async def send(self, message):
        kind = message["type"]
        self.check_open(kind)
        if kind == "websocket.send" and self.accepted:
            text = message.get("text")
            if text is not None:
                await self.send_message(TEXT, text.encode())
            else:
                await self.send_message(BINARY, bytes(message["bytes"]))
        elif kind == "websocket.close" and self.accepted:
            code = message.get("code", 1000)
            self.finish(1000 if code is None else code, message.get("reason") or "")
        elif kind == "websocket.accept" and not self.started:
            headers = list(message.get("headers", ()))
            if message.get("subprotocol") is not None:
                headers.append((b"sec-websocket-protocol", message["subprotocol"].encode("latin-1")))
            self.worker.put(self.stream, RESPONSE_HEAD, head_payload(SWITCHING, headers, SWITCHING))
            self.started = self.accepted = True
            await next_turn()
        elif kind == "websocket.close" and not self.started:
            self.worker.put(self.stream, RESPONSE_HEAD, head_payload(403, ()))
            self.close(b"")
        elif kind.startswith("websocket.http.response.") and not self.accepted:
            await super().send({**message, "type": kind[len("websocket."):]})
        else:
            raise RuntimeError("%s was sent %s" % (kind, "after websocket.accept" if self.accepted
                                                   else "before websocket.accept"))

    async def send_message(self, kind, data):
        """In pieces, as credit comes in; no other message goes between them."""
        while self.sending:
            await self.wait()
            self.check_open("websocket.send")
        self.sending = True
        at, last = 0, False
        try:
            while not last:
                room = min(self.credit - HEADER.size, PIECE)
                if room > 0 or room == 0 and not data:
                    piece = data[at:at + room]
                    at += len(piece)
                    last = at == len(data)
                    self.credit -= len(piece) + HEADER.size
                    self.worker.put(self.stream, kind, piece, END if last else 0)
                else:
                    await self.wait()
                    self.check_open("websocket.send")
        finally:
            self.sending = False
            if at and not last and self.is_open:
                self.finish(1011, "")   # cancelled: nobody could tell its end
            self.wake()
        await next_turn()


# ---- Event: an aleph.message and its reply ----------------------------------------------

EVENT = contextvars.ContextVar("event")     # set in the call of an event and all its tasks


def track_tasks(loop):
    """From now on, note the tasks that an event's call creates, directly or not."""
    make = loop.get_task_factory() or (lambda loop, coro, **kw: asyncio.Task(coro, loop=loop, **kw))

    def factory(loop, coro, **kw):
        task = make(loop, coro, **kw)
        event = EVENT.get(None)
        if event is not None:
            event.tasks.add(task)
            task.add_done_callback(event.tasks.discard)
        return task

    loop.set_task_factory(factory)


class Event(Exchange):
    """The reply is the first message that the program sends, as msgpack. Programs send from
    the call itself, from a coroutine that it returns, or from a task that it leaves behind."""

    __slots__ = ("tasks",)

    def start(self):
        self.tasks = set()
        self.body = [self.scope.get("body", "")]
        if not self.worker.tracks_tasks:
            self.worker.tracks_tasks = True
            track_tasks(self.worker.loop)
        super().start()

    async def call(self):
        EVENT.set(self)
        result = await self.worker.app(self.scope, self.receive, self.send)
        if inspect.isawaitable(result):
            await result
        deadline = time.monotonic() + EVENT_TASKS_S
        while self.tasks and not self.started and self.is_open:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            done, _ = await asyncio.wait(set(self.tasks), timeout=left,
                                         return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not self.started:
                    task.result()       # raises what the task raised
        while self.started and self.is_open:
            await self.wait()           # a task is still sending
        if self.is_open:
            self.close(b"")

    async def receive(self):
        if self.body:
            return {"type": "aleph.message", "body": self.body.pop(), "more_body": False}
        while self.is_open:
            await self.wait()
        return {"type": "aleph.disconnect"}

    async def send(self, message):
        if self.started or not self.is_open:
            return                      # only the first message counts
        reply = pack(message)
        self.started = True
        try:
            reply = await self.send_pieces(reply)
        except Disconnected:
            return
        self.credit -= len(reply)
        self.close(reply)


def pack(value, depth=0):
    """msgpack of what a program sends; what msgpack does not know goes as its text."""
    if depth > MSGPACK_DEPTH:
        raise ValueError("a reply nested deeper than %d levels" % MSGPACK_DEPTH)
    if value is None:
        return b"\xc0"
    if value is True or value is False:
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        if -32 <= value < 128:
            return struct.pack("b" if value < 0 else "B", value)
        return struct.pack(">BQ", 0xcf, value) if value > 0 else struct.pack(">Bq", 0xd3, value)
    if isinstance(value, float):
        return struct.pack(">Bd", 0xcb, value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return pack_size(memoryview(value).nbytes, (0, 0), (0xc4, 0xc5, 0xc6)) + bytes(value)
    if isinstance(value, (list, tuple)):
        return (pack_size(len(value), (0x90, 16), (None, 0xdc, 0xdd))
                + b"".join([pack(item, depth + 1) for item in value]))
    if isinstance(value, dict):
        return (pack_size(len(value), (0x80, 16), (None, 0xde, 0xdf))
                + b"".join([pack_key(key) + pack(value[key], depth + 1) for key in value]))
    text = (value if isinstance(value, str) else str(value)).encode("utf-8", "replace")
    return pack_size(len(text), (0xa0, 32), (0xd9, 0xda, 0xdb)) + text


def pack_key(key):
    simple = key is None or isinstance(key, (str, bytes, bool, int, float))
    return pack(key if simple else str(key))


def pack_size(size, short, codes):
    """The head of a sized value: in the type byte, or after it in 1, 2 or 4 bytes."""
    base, limit = short
    if size < limit:
        return bytes([base + size])
    for code, form, top in zip(codes, (">BB", ">BH", ">BI"), (0xff, 0xffff, 0xffffffff)):
        if code is not None and size <= top:
            return struct.pack(form, code, size)
    raise ValueError("a reply of %d parts is too large" % size)


# ---- WSGI: the same exchange, with the program in a thread ---------------------------------

class WsgiInput(io.RawIOBase):
    """wsgi.input under its BufferedReader: blocks the thread until the client sends more."""

    def __init__(self, exchange):
        self.exchange = exchange
        self.piece = memoryview(b"")

    def readable(self):
        return True

    def readinto(self, room):
        if not self.piece:
            self.piece = memoryview(self.exchange.next_piece())
        count = min(len(room), len(self.piece))
        room[:count] = self.piece[:count]
        self.piece = self.piece[count:]
        return count


class WsgiExchange(Exchange):
    """A request of a WSGI program (PEP 3333). run_wsgi and what it calls run in a thread;
    what that thread waits for (body, credit, the end) changes in the loop and is announced
    through `lock`; what it sends goes out in the loop, which drops it if the stream closed."""

    __slots__ = ("lock", "head", "is_event", "reply")

    def start(self):
        self.lock = threading.Condition()
        self.head = None                # what start_response was given, until it is sent
        self.reply = []                 # of an event: the body so far
        self.is_event = self.scope["type"] == "aleph.message"
        if self.is_event:
            self.become_post()
        self.worker.pool.submit(self.run_wsgi)

    def become_post(self):
        """An event is POST / with the event as the body."""
        body = self.scope.get("body", "").encode("utf-8", "replace")
        self.body.append(body)
        self.scope = {
            "http_version": "1.1", "method": "POST", "scheme": "http", "raw_path": b"/",
            "query_string": b"", "client": None, "server": None,
            "headers": [(b"host", b"localhost"), (b"aleph-event", b"aleph.message"),
                        (b"content-length", b"%d" % len(body))]}

    # -- in the loop

    def wake(self):
        with self.lock:
            self.lock.notify_all()

    def on_window(self, more):
        with self.lock:                 # the thread subtracts
            self.credit += more
            self.lock.notify_all()

    def deliver(self, head, data, ended):
        if not self.is_open:
            return                      # closed while this was on its way
        if head is not None:
            self.worker.put(self.stream, RESPONSE_HEAD, head)
        if ended:
            self.close(data)
        elif data:
            self.worker.put_body(self.stream, data)

    # -- in the thread

    def run_wsgi(self):
        try:
            result = self.worker.app(self.environ(), self.start_response)
            last = b""
            try:
                if isinstance(result, (list, tuple)):
                    last = b"".join(result)     # all there: goes out with the head and the end
                else:
                    for data in result:
                        self.write(data)
                self.finish(last)
            finally:
                if hasattr(result, "close"):
                    result.close()
        except BaseException as exc:    # SystemExit too: it would end the thread unheard
            self.worker.loop.call_soon_threadsafe(self.on_error, exc)
        if self.worker.channel.forked:  # a child that the program forked and did not end
            leave(0)

    def environ(self):
        scope = self.scope
        path = self.worker.unquote(scope["raw_path"]).decode("latin-1")
        name, port = scope["server"] or ("localhost", 80)
        client, client_port = scope["client"] or ("", "")
        env = {
            "REQUEST_METHOD": scope["method"],
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "QUERY_STRING": scope["query_string"].decode("latin-1"),
            "SERVER_NAME": name,
            "SERVER_PORT": str(port),
            "SERVER_PROTOCOL": "HTTP/" + scope["http_version"],
            "REMOTE_ADDR": client,
            "REMOTE_PORT": str(client_port),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": scope["scheme"],
            "wsgi.input": (io.BytesIO() if self.body_ended and not self.body else
                           io.BufferedReader(WsgiInput(self), CREDIT)),
            "wsgi.input_terminated": True,      # reading to the end is safe without a length
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for name, value in scope["headers"]:
            if b"_" in name:
                continue                # would pass for the header spelt with a hyphen
            key = name.decode("latin-1").upper().replace("-", "_")
            if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
                key = "HTTP_" + key
            value = value.decode("latin-1")
            if key in env:
                value = env[key] + ("; " if key == "HTTP_COOKIE" else ",") + value
            env[key] = value
        return env

    def next_piece(self):
        with self.lock:
            while not self.body and not self.body_ended and self.is_open:
                self.lock.wait()
            if self.gone:
                raise Disconnected("the client has disconnected")
            if not self.body:
                return b""
            piece = self.body.pop(0)
        self.worker.loop.call_soon_threadsafe(self.give_back, len(piece))
        return piece

    def start_response(self, status, headers, exc_info=None):
        if exc_info:
            try:
                if self.started:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None         # no cycle through this frame
        elif self.head is not None:
            raise RuntimeError("start_response was called twice")
        if not isinstance(status, str) or not status[:3].isdigit():
            raise ValueError("status is %r, not like '200 OK'" % (status,))
        for item in (item for pair in headers for item in pair):
            if not isinstance(item, str):
                raise TypeError("header %r is %s, not str" % (item, type(item).__name__))
        self.head = head_payload(int(status[:3]), [(name.encode("latin-1"), value.encode("latin-1"))
                                                   for name, value in headers])
        return self.write

    def write(self, data):
        if not isinstance(data, bytes):
            raise TypeError("body is %s, not bytes" % type(data).__name__)
        if self.is_event:
            self.reply.append(data)
        elif data:
            self.send_out(data, False)

    def finish(self, data):
        if self.is_event:
            data = pack(b"".join(self.reply) + data)
        self.send_out(data, True)

    def send_out(self, data, ended):
        """Hand data to the loop as credit allows; the head goes before the first of it."""
        if self.head is None:
            raise RuntimeError("the program did not call start_response before the body")
        at = 0
        while True:
            with self.lock:
                while at < len(data) and self.credit <= 0 and self.is_open:
                    self.lock.wait()
                if not self.is_open:
                    raise Disconnected("the client has disconnected")
                piece = data[at:at + min(self.credit, PIECE)]
                self.credit -= len(piece)
            at += len(piece)
            head = None if self.started or self.is_event else self.head
            self.started = True
            last = at == len(data)
            self.worker.loop.call_soon_threadsafe(self.deliver, head, piece, ended and last)
            if last:
                return


# ---- Loading the program ---------------------------------------------------------------

def warm(channel):
    """Map the slots and, while no configuration is there, import what most frameworks import (a
    quarter of their start); the names of the modules that this loaded."""
    before = set(sys.modules)
    channel.map_slots()
    for name in WARM:
        if select.select([channel.sock], [], [], 0)[0]:
            break
        try:
            __import__(name)
        except ImportError:             # not every distribution ships every module
            pass
    return set(sys.modules) - before


def forget_shadowed(warmed, folders):
    """A program's own secrets.py comes before the standard library's, warmed or not."""
    own = set()
    for folder in folders:
        try:
            own.update(name.partition(".")[0] for name in os.listdir(folder))
        except OSError:
            pass
    for name in warmed:
        if name.partition(".")[0] in own:
            sys.modules.pop(name, None)


def prepare(conf, pythonpath, warmed):
    """Environment, working folder and sys.path, as if the interpreter had started with them.
    `pythonpath` is what PYTHONPATH was when it did, `warmed` what warm() loaded."""
    os.environ.update(conf.get("env") or {})
    if "TZ" in os.environ:
        time.tzset()
    folder = conf["dir"]
    try:
        os.chdir(folder)
    except OSError as exc:
        raise StartError("the code folder %s cannot be entered: %s" % (folder, exc.strerror))
    old, new = ([os.path.abspath(entry) for entry in text.split(os.pathsep)] if text else []
                for text in (pythonpath, os.environ.get("PYTHONPATH", "")))
    front = [folder] + list(conf.get("path") or ()) + new
    sys.path[:] = front + [entry for entry in sys.path if entry not in front + old]
    forget_shadowed(warmed, front)
    importlib.invalidate_caches()       # folders may have appeared since the interpreter started


def split_entry(entry, plain):
    """`module.path:attribute` in two; plain code is the module main, which may be left out."""
    module, colon, attribute = entry.partition(":")
    if plain and not colon:
        module, colon, attribute = "main", ":", entry
    why = ("has no colon" if not colon else
           "has no module before the colon" if not module else
           "has no attribute after the colon" if not attribute else
           "has two colons" if ":" in attribute else
           "does not name a Python module" if not all(map(str.isidentifier, module.split("."))) else
           "does not name an attribute" if not all(map(str.isidentifier, attribute.split("."))) else
           "is not in plain code, which is the module main" if plain and module != "main" else "")
    if why:
        raise StartError("entrypoint %r %s; it looks like main:app" % (entry, why))
    return module, attribute


def import_entry(module):
    try:
        __import__(module)              # not import_module: it leaves its frames in tracebacks
    except ModuleNotFoundError as exc:
        ours = exc.name is not None and (module + ".").startswith(exc.name + ".")
        if not ours or exc.__traceback__.tb_next is not None:
            raise                       # an import inside the program failed
        raise StartError("there is no module %s in %s or elsewhere on sys.path"
                         % (exc.name, os.getcwd())) from None
    return sys.modules[module]


def exec_plain(code):
    module = types.ModuleType("main")
    module.__file__ = "<main>"
    source = code if isinstance(code, str) else code.decode("utf-8-sig", "replace")
    linecache.cache["<main>"] = (len(source), None, source.splitlines(True), "<main>")
    sys.modules["main"] = module
    exec(compile(code, "<main>", "exec", dont_inherit=True), module.__dict__)
    return module


def exit_text(exc, when):
    return "the program called exit(%s) %s" % ("" if exc.code is None else repr(exc.code), when)


def load(conf):
    """The object that the entrypoint names; whatever goes wrong is a StartError."""
    entry, code = conf["entry"], conf.get("code")
    module, attribute = split_entry(entry, code is not None)
    pid = os.getpid()
    try:
        found = exec_plain(code) if code is not None else import_entry(module)
        what = "module " + module
        for name in attribute.split("."):
            if not hasattr(found, name):
                raise StartError("%s has no attribute %s" % (what, name))
            found, what = getattr(found, name), "%s.%s" % (what, name)
    except StartError:
        raise
    except SystemExit as exc:
        raise StartError(exit_text(exc, "while it was imported"), format_error(exc))
    except BaseException as exc:
        if os.getpid() != pid:
            log(format_error(exc))
        raise StartError("%s cannot be imported: %s" % (module, describe(exc)), format_error(exc))
    finally:
        if os.getpid() != pid:          # a child that the program forked and did not end
            leave(0)
    if not callable(found):
        raise StartError("%s is %s, which cannot be called" % (entry, type(found).__name__))
    return found


def parameters_of(function):
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def interface_of(app, entry):
    """"asgi3", "asgi2" or "wsgi", by the arguments that the program takes."""
    call = app if inspect.isclass(app) or inspect.isroutine(app) else app.__call__
    is_async = inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(call)
    parameters = parameters_of(app) or parameters_of(call)
    if parameters is None:
        return "asgi3"                  # made in C: nothing to see
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in parameters if p.kind in kinds]
    need = sum(p.default is p.empty for p in named)
    most = len(named)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        most = sys.maxsize
    if is_async and need <= 3 <= most:
        return "asgi3"
    if not is_async and need <= 2 <= most and (need == 2 or most == 2):
        return "wsgi"
    if not is_async and need <= 3 <= most:
        return "asgi3"
    if not is_async and need <= 1 <= most:
        return "asgi2"
    raise StartError("%s takes neither (scope, receive, send) nor (environ, start_response)" % entry)


# ---- Lifespan --------------------------------------------------------------------------

class Lifespan:
    """Startup and shutdown of an ASGI program, in one call that lasts as long as it does."""

    def __init__(self, app, state):
        self.app = app
        self.state = state
        self.events = asyncio.Queue()
        self.changed = asyncio.Event()
        self.answer = None              # the last lifespan message that the program sent
        self.taken = False              # it has taken the startup event
        self.strayed = False            # it has sent what is no lifespan message
        self.task = None

    async def run(self):
        scope = {"type": "lifespan", "state": self.state,
                 "asgi": {"version": "3.0", "spec_version": "2.0"}}
        try:
            await self.app(scope, self.receive, self.send)
        except SystemExit as exc:       # would end the process before we could say why
            raise StartError(exit_text(exc, "in its lifespan"), format_error(exc)) from None

    async def receive(self):
        event = await self.events.get()
        self.taken = True
        return event

    async def send(self, message):
        kind = message["type"]
        if not str(kind).startswith("lifespan."):
            self.strayed = True
            raise RuntimeError("%r was sent in a lifespan" % (kind,))
        self.answer = message
        self.changed.set()

    def on_done(self, task):
        if self.answer and not task.cancelled() and task.exception():
            log(format_error(task.exception()))     # after the startup, nobody else looks
        self.changed.set()

    async def startup(self, limit_s):
        if self.app is None:            # WSGI knows no lifespan
            return
        self.events.put_nowait({"type": "lifespan.startup"})
        self.task = asyncio.get_running_loop().create_task(self.run())
        self.task.add_done_callback(self.on_done)
        try:
            await asyncio.wait_for(self.changed.wait(), limit_s)
        except asyncio.TimeoutError:
            raise StartError("lifespan startup not answered within %g s" % limit_s,
                             waiting_at(self.task.get_coro()))
        kind = self.answer["type"] if self.answer else ""
        if kind == "lifespan.startup.failed":
            text = str(self.answer.get("message", "")).strip()
            raise StartError(("lifespan startup failed: " + text.split("\n")[-1]).rstrip(": "), text)
        if kind != "lifespan.startup.complete":
            self.without()

    def without(self):
        """The call ended unanswered: a program without lifespan support, unless its own
        startup raised. A program that takes the event for a request trips over what is not
        there; by the ASGI specification it must start all the same."""
        error = asyncio.CancelledError() if self.task.cancelled() else self.task.exception()
        if isinstance(error, StartError):
            raise error
        if error is None or not self.taken or self.strayed:
            return
        if isinstance(error, (KeyError, TypeError, AttributeError)):
            log(format_error(error))
            return
        raise StartError("lifespan startup failed: " + describe(error), format_error(error))

    async def shutdown(self):
        if self.task is None or self.task.done():
            return
        self.changed.clear()
        self.events.put_nowait({"type": "lifespan.shutdown"})
        await self.changed.wait()
        if self.answer["type"] == "lifespan.shutdown.failed":
            log("lifespan shutdown failed: %s" % self.answer.get("message", ""))
        await asyncio.wait({self.task}, timeout=EXIT_S)


# ---- Tasks whose first step is not put off ---------------------------------------------------

if sys.version_info >= (3, 12):
    def task_starter(loop):
        return functools.partial(asyncio.Task, loop=loop, name="request", eager_start=True)
else:
    def task_starter(loop):
        """A Task gives its first step to its loop's call_soon, which for this once is ours; what the
        garbage collector calls meanwhile may want that, too, but in another context."""
        step = within = None

        def call_soon(callback, *args, context=None):
            nonlocal step
            if context is within:
                step = callback
            else:
                type(loop).call_soon(loop, callback, *args, context=context)

        def start(coro):
            nonlocal step, within
            context = within = contextvars.copy_context()
            loop.call_soon = call_soon
            try:
                task = asyncio.Task(coro, loop=loop, name="request", context=context)
            finally:
                del loop.call_soon      # the method of its class again
            first, step, within = step, None, None
            context.run(first)
            return task

        return start


# ---- Worker: the program and its exchanges ---------------------------------------------------

class Worker:
    def __init__(self, channel):
        self.channel = channel
        self.put, self.put_body = channel.put, channel.put_body
        self.exchanges = {}             # open streams, by number
        self.running = set()            # calls that have not returned, some past their response
        self.state = {}                 # lifespan state, copied for each request
        self.tracks_tasks = False
        self.lingers = False            # calls have gone on after their response
        self.ready = self.stopping = False

    async def serve(self, conf, pythonpath, warmed):
        self.loop = asyncio.get_running_loop()
        self.start_task = task_starter(self.loop)
        self.stop, self.idle = asyncio.Event(), asyncio.Event()
        try:
            lifespan = await self.start(conf, pythonpath, warmed)
        except StartError as exc:       # whatever the program has begun ends here
            log(exc.details or str(exc))
            self.channel.say(START_FAILED, error_payload(str(exc), exc.details))
            leave(1)
        gc.freeze()                     # what the start has made is not looked through again
        self.ready = True
        self.put(0, READY)
        await self.stop.wait()
        await self.drain()
        await lifespan.shutdown()
        self.channel.finish()
        for number in (signal.SIGTERM, signal.SIGINT):  # it ends already, and what runs at exit shall
            self.loop.remove_signal_handler(number)     # else the loop's end puts back the default
            signal.signal(number, signal.SIG_IGN)
        timer = threading.Timer(EXIT_S, leave, (0,))    # for what will not end by itself
        timer.daemon = True
        timer.start()

    async def start(self, conf, pythonpath, warmed):
        prepare(conf, pythonpath, warmed)
        self.app = load(conf)
        lifespan = self.adapt(conf["entry"])
        self.channel.start(self.loop, self.on_frame, self.on_end)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.on_stop)
        await lifespan.startup(conf.get("lifespan_s", 30.0))
        return lifespan

    def adapt(self, entry):
        """Make self.app callable as its kind wants."""
        app, kind = self.app, interface_of(self.app, entry)
        self.makers, self.event = {"http": Exchange, "websocket": WebSocket}, Event
        if kind == "wsgi":
            from concurrent.futures import ThreadPoolExecutor
            from urllib.parse import unquote_to_bytes
            self.pool, self.unquote = ThreadPoolExecutor(THREADS, "wsgi"), unquote_to_bytes
            self.makers, self.event = {}, WsgiExchange
            return Lifespan(None, None)
        if kind == "asgi2":
            async def asgi3(scope, receive, send):
                return await app(scope)(receive, send)
            self.app = asgi3
        return Lifespan(self.app, self.state)

    def on_frame(self, stream, kind, flags, payload):
        if kind == REQUEST:
            parts = marshal.loads(payload)
            make = self.makers.get(parts[0], self.event)
            scope = self.event_scope(*parts) if len(parts) == 2 else self.request_scope(parts)
            self.exchanges[stream] = exchange = make(self, stream, scope, flags & END != 0)
            if self.stopping:
                return exchange.fail("the program is shutting down")
            try:
                exchange.start()
            except Exception as exc:    # no thread to be had, say; the other frames go on
                exchange.on_error(exc)
        elif kind == SHUTDOWN:
            self.on_stop()
        else:
            exchange, payload = self.exchanges.get(stream), payload.tobytes()
            if exchange is None:
                pass                    # we have closed it; the agent did not know yet
            elif kind == REQUEST_BODY:
                exchange.on_body(payload, flags & END != 0)
            elif kind == WINDOW:
                exchange.on_window(int.from_bytes(payload, "little"))
            elif kind == DISCONNECT:
                exchange.on_disconnect(payload)
            elif kind in (TEXT, BINARY):
                exchange.on_piece(kind, payload, flags & END != 0)

    def request_scope(self, parts):
        kind, version, method, scheme, path, raw_path, query, client, server, headers = parts
        return {"type": kind, "asgi": {"version": "3.0", "spec_version": "2.4"},
                "http_version": version, "method": method, "scheme": scheme, "path": path,
                "raw_path": raw_path, "query_string": query, "root_path": "", "client": client,
                "server": server, "headers": headers, "state": self.state.copy()}

    def event_scope(self, kind, body):
        return {"type": kind, "asgi": {"version": "3.0", "spec_version": "2.4"}, "body": body,
                "state": self.state.copy()}

    def on_end(self):
        """The agent is gone: nobody waits for any answer."""
        for exchange in list(self.exchanges.values()):
            exchange.gone = True
            exchange.closed()
        self.on_stop()

    def on_stop(self):
        if not self.ready:
            leave(0)                    # a program that has not started needs no shutdown
        self.stopping = True
        for exchange in list(self.exchanges.values()):
            exchange.on_stop()
        self.stop.set()

    def new_task(self, coro):
        """loop.create_task without making up a name, unless the program has its own factory; and
        its first step needs no turn of the loop, unless that itself is run by a step."""
        if self.loop.get_task_factory() is not None:
            return self.loop.create_task(coro)
        if self.channel.selector is None or self.channel.nested:
            return asyncio.Task(coro, loop=self.loop, name="request")
        return self.start_task(coro)

    def check_idle(self):
        if not self.exchanges and not self.running:
            self.idle.set()

    async def drain(self):
        if self.exchanges or self.running:
            await asyncio.wait({self.loop.create_task(self.idle.wait())}, timeout=DRAIN_S)
        for exchange in list(self.exchanges.values()):
            exchange.fail("the program is shutting down")
        await asyncio.sleep(0)          # the last frames leave at the end of this turn


def main():
    pythonpath = os.environ.get("PYTHONPATH", "")
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:          # closed from the start
            stream.reconfigure(line_buffering=True)
    if sys.stderr is not None:
        faulthandler.enable()           # a crash in C leaves the Python stack in the log
    channel = Channel(socket.socket(fileno=3))
    channel.say(HELLO)
    warmed = warm(channel)
    kind, payload = channel.wait_for_frame()
    if kind != CONFIGURE:
        return                          # told to stop, or the agent is gone
    conf = marshal.loads(payload)
    serve = Worker(channel).serve(conf, pythonpath, warmed)
    if not hasattr(asyncio, "Runner"):  # before 3.11: no choice of the loop
        return asyncio.run(serve)
    with asyncio.Runner(loop_factory=lambda: new_loop(channel)) as runner:
        runner.run(serve)


if __name__ == "__main__":
    main()

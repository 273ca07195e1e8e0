"""What a program may do to the channel that its worker and the agent share (fd 3).

  /                answers                        /pid             of the worker
  /hold            half of its answer, then waits for /release, which lets all go on
  /wait            waits for /release, then answers
  /frames?f=..     writes frames of the program's own making and answers nothing; each f is
                   STREAM,TYPE,FLAGS,ZERO,LENGTH,PAYLOAD: the stream is a number, `own`, or
                   `other` for the oldest other request; the length may be left out; the
                   payload is hex, or xN for N bytes
  /flood/SECONDS   credit of no bytes, as fast as it goes, from a thread
  /resize          tries to cut and to extend the memory for long bodies, and says how that went
  /scribble/N      N bytes, while a thread writes to that memory
  /DEED            one of the deeds below
"""
import asyncio
import ctypes
import mmap
import os
import socket
import struct
import threading
import time
from urllib.parse import parse_qsl

waiting = set()
streams = []                # of requests under way, oldest first


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    stream = receive.__self__.stream
    streams.append(stream)
    name, *args = scope["path"].strip("/").split("/")
    try:
        if name in deeds:
            deeds[name](*args)
            await asyncio.sleep(3600)
        elif name in ("hold", "wait", "release"):
            await globals()[name](send)
        elif name == "frames":
            write(frames(scope["query_string"].decode(), stream))
            await asyncio.sleep(3600)
        elif name == "flood":
            await asyncio.get_running_loop().run_in_executor(None, flood, stream, float(args[0]))
            await answer(send, b"flooded")
        elif name == "resize":
            await answer(send, resize())
        elif name == "scribble":
            stop = threading.Event()
            thread = threading.Thread(target=scribble, args=[stop])
            thread.start()
            await answer(send, b"s" * int(args[0]))
            stop.set()
            thread.join()
        else:
            await answer(send, b"%d" % os.getpid() if name == "pid" else b"well")
    finally:
        streams.remove(stream)


async def answer(send, body):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def wait(send=None):
    future = asyncio.get_running_loop().create_future()
    waiting.add(future)
    await future
    if send:
        await answer(send, b"waited")


async def hold(send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first ", "more_body": True})
    await wait()
    await send({"type": "http.response.body", "body": b"last"})


async def release(send):
    while waiting:
        waiting.pop().set_result(None)
    await answer(send, b"released")


def frames(query, own):
    for _, text in parse_qsl(query):
        stream, kind, flags, zero, length, payload = text.split(",")
        payload = b"p" * int(payload[1:]) if payload.startswith("x") else bytes.fromhex(payload)
        stream = own if stream == "own" else streams[0] if stream == "other" else int(stream)
        yield struct.pack("<IIBBH", int(length) if length else len(payload), stream, int(kind),
                          int(flags), int(zero)) + payload


def write(pieces, fd=3):
    data = b"".join(pieces)
    os.set_blocking(fd, True)
    while data:
        data = data[os.write(fd, data):]
    os.set_blocking(fd, False)


def flood(stream, seconds):
    data = struct.pack("<IIBBHI", 4, stream, 6, 0, 0, 0) * 256
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:                            # the kernel takes a small write whole or not at all, so
            os.write(3, data)           # that frames which the loop's thread writes stay whole
        except BlockingIOError:
            time.sleep(0.001)


# ---- The memory for long bodies ----

def memory():
    """A descriptor of it."""
    return next(int(fd) for fd in os.listdir("/proc/self/fd")
                if os.readlink("/proc/self/fd/" + fd).startswith("/memfd:bodies"))


def resize():
    """What is left of it afterwards is a hole."""
    said, fd = [], memory()
    size = os.fstat(fd).st_size
    for other in (0, size - 1, size + 1):
        try:
            os.ftruncate(fd, other)
            said.append("%d bytes" % other)
        except OSError as exc:
            said.append(exc.strerror)
    hole = ctypes.CDLL(None, use_errno=True).fallocate
    hole.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    said.append("hole: %d" % hole(fd, 3, 0, size))      # PUNCH_HOLE, KEEP_SIZE
    return ", ".join(said).encode()


def scribble(stop):
    """Its bytes, and the flags of the slots, too."""
    with mmap.mmap(memory(), 0) as all:
        while not stop.is_set():
            all[0:16] = os.urandom(16)
            all[4096:4096 + 300000] = os.urandom(300000)


# ---- Deeds ----

def closerange():
    os.close(3)
    os.closerange(3, 1024)


def replace():
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 3)


def half(how):
    socket.socket(fileno=os.dup(3)).shutdown(socket.SHUT_WR if how == "write" else socket.SHUT_RD)


def fill():
    """Without reading, until the agent has had enough."""
    os.set_blocking(3, True)
    while True:
        write([struct.pack("<IIBBH", 65536, 0x7fffffff, 0xee, 0, 0), bytes(65536)])


def fork_writes(stream, text):
    """A fork with a copy of the channel writes to it."""
    channel = os.dup(3)
    if os.fork() == 0:
        try:
            own = streams[-1]
            write(frames("f=" + text.replace("own", str(own)), own) if stream == "frames"
                  else [text.encode()], channel)
            time.sleep(60)
        finally:
            os._exit(0)


def fork_holds(code):
    """A fork in another session, with a copy of the channel, outlives the worker."""
    os.dup(3)
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
        os._exit(0)
    os._exit(int(code))


def steal():
    """Takes the next frames for itself, from a thread, unless the loop is faster for 5 s."""
    channel = socket.socket(fileno=os.dup(3))

    def run():
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                if channel.recv(1 << 16):
                    return
            except BlockingIOError:
                pass
    threading.Thread(target=run, daemon=True).start()


def send_descriptors():
    channel = socket.socket(fileno=os.dup(3))
    null = os.open("/dev/null", os.O_RDWR)
    own = streams[-1]
    for _ in range(100):
        socket.send_fds(channel, [struct.pack("<IIBBHI", 4, own, 6, 0, 0, 0)], [null] * 10)


def block(seconds):
    time.sleep(float(seconds))


deeds = {f.__name__: f for f in (closerange, replace, half, fill, fork_writes, fork_holds, steal,
                                 send_descriptors, block)}

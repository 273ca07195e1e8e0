#!/usr/bin/env python3
"""An HTTP server on bare sockets that answers with whatever bytes it is told to, so that a proxy
before it meets every kind of server; and that tells what it has seen.

The path /play/NAME plays the script of that name, /hello says hello, and any other path answers
with the request as JSON: its head as it came, its body, on which connection it came and as which
request there.

Scripts and questions come over a channel of its own, the Unix socket $SIDE: one JSON object a
connection, which is answered with one.

    {"script": NAME, "steps": [[STEP, ARGUMENT...]...]}     {"state": true}     {"release": true}

The connection goes on after the last step. The steps:

    body                the request's body is read to its end
    take N              N bytes of it are, or more
    send HEX            these bytes are sent                send HEX N      N times
    drip HEX S          byte by byte, with S seconds between
    flood HEX           again and again, until the other side hangs up
    pause S             nothing happens for S seconds
    held                nothing happens until somebody says release
    gone                waits for the other side to hang up
    echo                sends back what comes, until the other side hangs up, and hangs up
    arm STEPS           the next request on this connection, whatever it is, is answered so
    end                 no more will be sent, but read
    close, reset        the connection ends, by FIN, by RST
    exit N, kill N      the program ends, by exit code, by signal

Environment: HOST and PORT; LATE=S listens after S seconds; FAMILY=6 listens on ::1 alone;
STARTS=FILE appends a line at each start, and LATE counts from the second on.
"""
import asyncio
import hashlib
import json
import os
import resource
import socket
import struct
import sys
import time

PIECE = 1 << 18


class Gone(Exception):
    """The other side has hung up, or is not to be talked to any more."""


class Program:
    def __init__(self):
        self.scripts, self.plays, self.heads, self.bodies, self.ends = {}, {}, {}, {}, {}
        self.connections = self.open = self.requests = self.armed = 0
        self.wrong = []                 # requests that are no HTTP
        self.released = asyncio.Event()

    def state(self):
        return {"pid": os.getpid(), "connections": self.connections, "open": self.open,
                "requests": self.requests, "armed": self.armed, "plays": self.plays, "heads": self.heads,
                "bodies": self.bodies, "ends": self.ends, "wrong": self.wrong, "argv": sys.argv,
                "environment": dict(os.environ), "folder": os.getcwd()}

    async def on_side(self, reader, writer):
        asked = json.loads(await reader.readline())
        if "script" in asked:
            self.scripts[asked["script"]] = asked["steps"]
        if "release" in asked:
            self.released.set()
            self.released = asyncio.Event()
        writer.write(json.dumps(self.state() if "state" in asked else {}).encode() + b"\n")
        await writer.drain()
        writer.close()


class Request:
    def __init__(self, head):
        self.head = head
        lines = head[:-4].split(b"\r\n")
        if any(b"\n" in line or b"\r" in line for line in lines):
            raise ValueError("a bare CR or LF")
        self.method, self.target, version = lines[0].split(b" ")
        if version != b"HTTP/1.1":
            raise ValueError("version %r" % version)
        fields = [line.split(b":", 1) for line in lines[1:]]
        names = [name.lower() for name, _ in fields]
        if names.count(b"host") != 1:
            raise ValueError("%d Host fields" % names.count(b"host"))
        framing = [(name, value.strip()) for name, (_, value) in zip(names, fields)
                   if name in (b"content-length", b"transfer-encoding")]
        if len(framing) > 1:
            raise ValueError("%d fields say how long the body is" % len(framing))
        self.length, self.framing = 0, "none"
        if framing and framing[0][0] == b"content-length":
            self.length, self.framing = int(framing[0][1]), "length"
        elif framing:
            if framing[0][1].lower() != b"chunked":
                raise ValueError("coding %r" % framing[0][1])
            self.length, self.framing = None, "chunked"
        self.size, self.digest, self.whole = 0, hashlib.sha256(), self.length == 0

    def took(self, data):
        self.size += len(data)
        self.digest.update(data)

    def body(self):
        return {"bytes": self.size, "sha256": self.digest.hexdigest(), "framing": self.framing, "whole": self.whole}


class Connection:
    def __init__(self, program, sock):
        self.program, self.sock, self.data = program, sock, b""
        self.loop = asyncio.get_running_loop()
        self.number, self.nth, self.trap, self.name = program.connections, 0, None, ""

    # ---- bytes ----

    async def fill(self):
        more = await self.loop.sock_recv(self.sock, PIECE)
        if not more:
            raise Gone
        self.data += more

    async def until(self, mark):
        while mark not in self.data:
            await self.fill()
        found, _, self.data = self.data.partition(mark)
        return found

    async def send(self, data):
        await self.loop.sock_sendall(self.sock, data)

    async def pieces(self, request, count):
        """Reads count bytes of a body as they come."""
        while count:
            if not self.data:
                await self.fill()
            piece, self.data = self.data[:count], self.data[count:]
            request.took(piece)
            count -= len(piece)
            yield piece

    async def parts(self, request):
        """Reads a body in whatever framing it has."""
        if request.length is not None:
            async for piece in self.pieces(request, request.length - request.size):
                yield piece
            request.whole = True
        while not request.whole:
            line = await self.until(b"\r\n")
            size = int(line, 16)
            async for piece in self.pieces(request, size):
                yield piece
            if await self.until(b"\r\n"):
                raise ValueError("a chunk is followed by something, or there are trailers")
            request.whole = size == 0

    # ---- requests ----

    async def run(self):
        try:
            while True:
                head = await self.until(b"\r\n\r\n") + b"\r\n\r\n"
                self.program.requests += 1
                self.nth += 1
                await self.answer(Request(head))
        except (Gone, OSError):
            self.program.ends[self.name] = time.monotonic()
        except ValueError as exc:
            self.program.wrong.append("%s: %s" % (self.name, exc))
        finally:
            self.program.open -= 1
            self.sock.close()

    async def answer(self, request):
        program, path = self.program, request.target.decode("latin-1")
        self.name = ""
        if self.trap:
            program.armed += 1
            steps, self.trap = self.trap, None
            return await self.play(request, steps)
        name = path.removeprefix("/play/").partition("?")[0]
        if name in program.scripts and path.startswith("/play/"):
            self.name = name
            program.plays[name] = program.plays.get(name, 0) + 1
            program.heads[name] = request.head.decode("latin-1")
            return await self.play(request, program.scripts[name])
        async for _ in self.parts(request):
            pass
        body = b"hello" if path == "/hello" else json.dumps({"head": request.head.decode("latin-1"), "connection": self.number, "nth": self.nth,
                           "pid": os.getpid(), "body": request.body()}).encode()
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                        % (len(body), b"" if request.method == b"HEAD" else body))

    async def play(self, request, steps):
        for step, *arguments in steps:
            await getattr(self, "step_" + step)(request, *arguments)

    # ---- steps ----

    async def step_body(self, request):
        self.program.bodies[self.name] = request.body()
        async for _ in self.parts(request):
            self.program.bodies[self.name] = request.body()
        self.program.bodies[self.name] = request.body()

    async def step_take(self, request, count):
        async for _ in self.parts(request):
            self.program.bodies[self.name] = request.body()
            if request.size >= count:
                return

    async def step_send(self, _, data, times=1):
        data = bytes.fromhex(data)
        for _ in range(times):
            await self.send(data)

    async def step_drip(self, _, data, seconds):
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in bytes.fromhex(data):
            await self.send(bytes([byte]))
            await asyncio.sleep(seconds)

    async def step_flood(self, _, data):
        data = bytes.fromhex(data)
        data *= max(1, PIECE // len(data))
        while True:
            await self.send(data)

    async def step_pause(self, _, seconds):
        await asyncio.sleep(seconds)

    async def step_held(self, _):
        await self.program.released.wait()

    async def step_gone(self, _):
        while True:
            await self.fill()
            self.data = b""

    async def step_echo(self, _):
        while True:
            if self.data:
                await self.send(self.data)
            self.data = b""
            await self.fill()

    async def step_arm(self, _, steps):
        self.trap = steps

    async def step_end(self, _):
        self.sock.shutdown(socket.SHUT_WR)

    async def step_close(self, _):
        raise Gone

    async def step_reset(self, _):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Gone

    async def step_exit(self, _, code):
        os._exit(code)

    async def step_kill(self, _, number):
        os.kill(os.getpid(), number)


async def serve(sock, program):
    loop, tasks = asyncio.get_running_loop(), set()
    while True:
        accepted, _ = await loop.sock_accept(sock)
        accepted.setblocking(False)
        program.connections += 1
        program.open += 1
        task = loop.create_task(Connection(program, accepted).run())
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def is_late():
    if "STARTS" not in os.environ:
        return True
    with open(os.environ["STARTS"], "a+") as file:
        file.write("%d\n" % os.getpid())
        file.seek(0)
        return len(file.readlines()) > 1


async def main():
    program = Program()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if "SIDE" in os.environ:
        if os.path.exists(os.environ["SIDE"]):
            os.unlink(os.environ["SIDE"])
        await asyncio.start_unix_server(program.on_side, os.environ["SIDE"], limit=1 << 26)
    if is_late():
        await asyncio.sleep(float(os.environ.get("LATE", 0)))
    is_v6 = os.environ.get("FAMILY") == "6"
    sock = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)   # grows no more: 200 MiB must not fit
    sock.setblocking(False)
    sock.bind(("::1" if is_v6 else os.environ["HOST"], int(os.environ["PORT"])))
    sock.listen(4096)
    print("listening", flush=True)
    await serve(sock, program)


asyncio.run(main())

"""Load that wrk and h2load cannot make: echoes over WebSockets, and connections through the
vsock of a guest. Frames and requests are made once and compared as bytes, so that little time
of the machine goes into the client."""
import base64
import concurrent.futures
import hashlib
import os
import select
import socket
import time

TIMEOUT_S = 20


def percentiles(times):
    """p50 and p99 in ms."""
    times = sorted(times)
    return 1e3 * times[int(len(times) * 0.5)], 1e3 * times[int(len(times) * 0.99)]


# ---- WebSockets (RFC 6455) ----------------------------------------------------------------

PAYLOAD = os.urandom(100)               # one byte of length suffices up to 125
MASK = os.urandom(4)
MASKED = bytes(byte ^ MASK[i % 4] for i, byte in enumerate(PAYLOAD))
MESSAGE = bytes([0x82, 0x80 | len(PAYLOAD)]) + MASK + MASKED
ECHO = bytes([0x82, len(PAYLOAD)]) + PAYLOAD
CLOSE = bytes([0x88, 0x80]) + MASK


def read_to(s, end):
    got = b""
    while not got.endswith(end):
        byte = s.recv(1)
        if not byte:
            raise ConnectionError("closed after %r" % got)
        got += byte
    return got


def websocket(port):
    """An open one, without extensions."""
    key = base64.b64encode(os.urandom(16))
    s = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
              b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n")
    head = read_to(s, b"\r\n\r\n")
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    if not head.startswith(b"HTTP/1.1 101 ") or accept not in head:
        raise ConnectionError(head)
    return s


def websocket_close(s):
    with s:
        s.settimeout(TIMEOUT_S)
        s.sendall(CLOSE)
        s.recv(4096)


def echoes(sockets, seconds):
    """One message under way on each, all the time: a duration for every echo."""
    poll, times, states = select.epoll(), [], {}
    clock = time.perf_counter
    start = clock()
    for s in sockets:
        s.setblocking(False)
        s.send(MESSAGE)
        states[s.fileno()] = [s, clock(), b""]
        poll.register(s, select.EPOLLIN)
    waiting = len(states)
    while waiting:
        ready = poll.poll(TIMEOUT_S)
        if not ready:
            raise TimeoutError("%d echoes do not come" % waiting)
        for fd, _ in ready:
            state = states[fd]
            s, sent, before = state
            got = before + s.recv(4096) if before else s.recv(4096)
            if got == ECHO:
                now = clock()
                times.append(now - sent)
                if now - start < seconds:
                    s.send(MESSAGE)
                    state[1:] = now, b""
                else:
                    waiting -= 1
            elif got and ECHO.startswith(got):
                state[2] = got
            else:
                raise ConnectionError("not the echo: %r" % got)
    poll.close()
    return times


# ---- Through a guest's vsock ----------------------------------------------------------------

def exchange(path, port, message, length=None):
    """A connection of its own, as the supervisor makes one for each request: what comes back
    until the end, or until it has so many bytes."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(TIMEOUT_S)
        s.connect(path)
        s.sendall(b"CONNECT %d\n" % port)
        line = s.recv(64)
        if not line.startswith(b"OK ") or not line.endswith(b"\n"):
            raise ConnectionError("port %d: %r" % (port, line))
        s.sendall(message)
        got = b""
        while len(got) != length:
            part = s.recv(65536)
            if not part:
                break
            got += part
        return got


def in_turn(count, ask):
    times = []
    for _ in range(count):
        start = time.perf_counter()
        ask()
        times.append(time.perf_counter() - start)
    return times


def at_once(connections, seconds, ask):
    """So many clients, each asking again as soon as it has its answer."""
    end = time.perf_counter() + seconds

    def client(_):
        times = []
        while time.perf_counter() < end:
            times += in_turn(1, ask)
        return times
    with concurrent.futures.ThreadPoolExecutor(connections) as pool:
        return [t for times in pool.map(client, range(connections)) for t in times]

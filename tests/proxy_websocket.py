#!/usr/bin/env python3
"""Talks to the program tests/apps/executables/websocket.py through port 80 of a guest, and checks
every byte; run by executables.sh.

    proxy_websocket.py SOCKET

Each check is one line, `ok NAME` or `FAIL NAME: why`.
"""
import base64
import hashlib
import os
import random
import struct
import sys
import time

from peer import Peer

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def report(name, condition, why=""):
    print("ok " + name if condition else "FAIL %s: %.300s" % (name, str(why).replace("\n", " ")), flush=True)


class WebSocket:
    def __init__(self, socket_path):
        self.sock = Peer(socket_path, port=80).connect()
        self.data = b""
        key = base64.b64encode(os.urandom(16))
        self.sock.sendall(b"GET /chat HTTP/1.1\r\nHost: guest\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
                          b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n")
        while b"\r\n\r\n" not in self.data:
            self.fill()
        self.head, _, self.data = self.data.partition(b"\r\n\r\n")
        self.accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())

    def fill(self):
        more = self.sock.recv(1 << 18)
        if not more:
            raise EOFError("after %.100r" % self.data)
        self.data += more

    def exactly(self, count):
        while len(self.data) < count:
            self.fill()
        found, self.data = self.data[:count], self.data[count:]
        return found

    def send(self, kind, payload, fin=True):
        size, mask = len(payload), os.urandom(4)
        length = bytes([size | 0x80]) if size < 126 else struct.pack("!BH", 0xfe, size) if size < 65536 else struct.pack("!BQ", 0xff, size)
        key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
        self.sock.sendall(bytes([kind | (0x80 if fin else 0)]) + length + mask
                          + (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big"))

    def read(self):
        first, size = self.exactly(2)
        if size == 126:
            size, = struct.unpack("!H", self.exactly(2))
        elif size == 127:
            size, = struct.unpack("!Q", self.exactly(8))
        return first & 15, bool(first & 0x80), self.exactly(size)

    def ends_within(self, seconds):
        self.sock.settimeout(seconds)
        try:
            return self.sock.recv(1) == b""
        except OSError:
            return False


def main():
    ws = WebSocket(sys.argv[1])
    report("websocket: 101", ws.head.startswith(b"HTTP/1.1 101 "), ws.head)
    report("websocket: the key is answered", b"\r\nSec-WebSocket-Accept: " + ws.accept + b"\r\n" in ws.head + b"\r\n", ws.head)
    for size in (0, 1, 5, 125, 126, 65535, 65536, 1 << 20):
        payload = random.Random(size).randbytes(size)
        ws.send(BINARY, payload)
        report("websocket: %d bytes come back" % size, ws.read() == (BINARY, True, payload))
    ws.send(TEXT, b"first ", fin=False)
    ws.send(0, b"last")
    report("websocket: a message in two frames", (ws.read(), ws.read()) == ((TEXT, False, b"first "), (0, True, b"last")))
    ws.send(PING, b"are you there")
    report("websocket: ping", ws.read() == (PONG, True, b"are you there"))
    time.sleep(1)
    start = time.monotonic()
    for number in range(200):
        ws.send(TEXT, b"%d" % number)
        if ws.read() != (TEXT, True, b"%d" % number):
            report("websocket: message %d comes back" % number, False)
            return
    report("websocket: 200 messages in turn (%.1f ms each)" % ((time.monotonic() - start) * 5), True)
    ws.send(TEXT, b"close")
    report("websocket: the program closes: its frame", ws.read() == (CLOSE, True, b"\x03\xe8"))
    report("websocket: the program closes: the connection ends within 1 s", ws.ends_within(1))
    others = [WebSocket(sys.argv[1]) for _ in range(50)]
    for number, other in enumerate(others):
        other.send(TEXT, b"%d" % number)
    report("websocket: 50 at once", [other.read()[2] for other in others] == [b"%d" % number for number in range(50)])
    for other in others:
        other.sock.close()


try:
    main()
except Exception as exc:
    report("websocket: runs to its end", False, repr(exc))

"""A WebSocket server (RFC 6455) that sends back what it gets, and closes on the text `close`."""
import asyncio
import base64
import hashlib
import os
import struct

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


def frame(kind, payload, fin=True):
    size = len(payload)
    length = bytes([size]) if size < 126 else struct.pack("!BH", 126, size) if size < 65536 else struct.pack("!BQ", 127, size)
    return bytes([kind | (0x80 if fin else 0)]) + length + payload


async def read_frame(reader):
    first, size = await reader.readexactly(2)
    if not size & 0x80:
        raise ValueError("a client's frame is masked (section 5.1)")
    size &= 0x7f
    if size == 126:
        size, = struct.unpack("!H", await reader.readexactly(2))
    elif size == 127:
        size, = struct.unpack("!Q", await reader.readexactly(8))
    mask = await reader.readexactly(4)
    data = await reader.readexactly(size)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return first & 15, bool(first & 0x80), (int.from_bytes(data, "big") ^ key).to_bytes(size, "big")


async def echo(reader, writer):
    while True:
        kind, fin, data = await read_frame(reader)
        if kind == PING:
            writer.write(frame(PONG, data))
        elif kind == CLOSE or data == b"close":
            writer.write(frame(CLOSE, data if kind == CLOSE else struct.pack("!H", 1000)))
            return
        else:
            writer.write(frame(kind, data, fin))
        await writer.drain()


async def serve(reader, writer):
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if fields.get("upgrade", "").lower() != "websocket":
            writer.write(b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n")
            return
        accept = base64.b64encode(hashlib.sha1(
            fields["sec-websocket-key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     b"Sec-WebSocket-Accept: %s\r\n\r\n" % accept)
        await echo(reader, writer)
    except asyncio.IncompleteReadError:
        pass
    finally:
        writer.close()


async def main():
    server = await asyncio.start_server(serve, os.environ["HOST"], int(os.environ["PORT"]))
    await server.serve_forever()


asyncio.run(main())

"""The client of the package websockets against a server at ws://127.0.0.1:PORT or wss://; run by websocket*.sh.

    websocket_clients.py LABEL URL [scope]

The server echoes what comes to /echo and ends /bye?CODE with that code; with `scope` it tells its scope at
/scope. Each check is one line, `ok NAME` or `FAIL NAME: why`.
"""
import asyncio
import json
import os
import sys

import websockets

LABEL, URL = sys.argv[1:3]


def equal(name, expected, actual):
    print("ok %s: %s" % (LABEL, name) if expected == actual else
          "FAIL %s: %s: expected %.200r, got %.200r" % (LABEL, name, expected, actual), flush=True)


async def main():
    options = {"max_size": 1 << 26, "compression": "deflate"}
    async with websockets.connect(URL + "/echo", subprotocols=["chat"], **options) as ws:
        equal("no compression is agreed on", [], ws.extensions)
        for text in ("", "h\u00e9 \U0001f600", "x" * 300000):
            await ws.send(text)
            equal("text of %d characters" % len(text), text, await ws.recv())
        data = os.urandom(16 << 20)
        await ws.send([data[at:at + 100000] for at in range(0, len(data), 100000)])
        equal("16 MiB in 168 fragments", data, await ws.recv())
        await asyncio.wait_for(await ws.ping(b"there?"), 30)
        equal("a ping is answered", True, True)
        await ws.close(3456, "done")
        equal("our code is answered", 3456, ws.close_code)
    for code in (1000, 1001, 1008, 1011, 3000, 4999):
        async with websockets.connect(URL + "/bye?%d" % code, **options) as ws:
            try:
                await ws.recv()
            except websockets.ConnectionClosed:
                pass
            equal("its code %d comes" % code, code, ws.close_code)
    async with websockets.connect(URL + "/echo", **options) as ws:
        await ws.write_frame(True, 1, b"no \xff UTF-8")
        await asyncio.wait_for(ws.wait_closed(), 30)
        equal("what is no UTF-8 is 1007", 1007, ws.close_code)
    if "scope" in sys.argv[3:]:
        async with websockets.connect(URL + "/scope", **options) as ws:
            scope = json.loads(await ws.recv())
            scheme, host, port = URL.replace("//", "").split(":")
            equal("its scope has the scheme and the server", [scheme, [host, int(port)]], [scope["scheme"], scope["server"]])
    all = [await websockets.connect(URL + "/echo", **options) for _ in range(64)]
    for number, ws in enumerate(all):
        await ws.send(str(number))
    equal("64 at once", [str(number) for number in range(64)], [await ws.recv() for ws in all])
    for ws in all:
        await ws.close()


asyncio.run(main())

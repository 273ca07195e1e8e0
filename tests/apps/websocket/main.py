"""WebSockets, by path; what befell them is in /log, in order."""
import asyncio
import json
import os
import struct

log = []
BROWSER = open(os.path.join(os.path.dirname(__file__), "browser.html"), "rb").read()


async def echo(receive, send):
    while True:
        event = await receive()
        if event["type"] == "websocket.disconnect":
            log.append([event["code"], event.get("reason")])
            return
        if event.get("text") == "crash":
            os.kill(os.getpid(), 9)
        await send({**event, "type": "websocket.send"})


async def app(scope, receive, send):
    if scope["type"] == "http":
        body = json.dumps(log).encode() if scope["path"] == "/log" else BROWSER if scope["path"] == "/browser" else b"hello"
        if scope["path"] == "/report":
            log.append(scope["query_string"].decode())
        if scope["path"] == "/clear":
            log.clear()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        return await send({"type": "http.response.body", "body": body})
    if scope["type"] != "websocket":
        return
    path, query = scope["path"], scope["query_string"].decode()
    assert (await receive())["type"] == "websocket.connect"
    if path == "/close":
        return await send({"type": "websocket.close"})
    if path == "/deny":
        await send({"type": "websocket.http.response.start", "status": 418, "headers": [(b"x-why", b"tea")]})
        await send({"type": "websocket.http.response.body", "body": b"short and ", "more_body": True})
        return await send({"type": "websocket.http.response.body", "body": b"stout"})
    if path == "/raise":
        raise RuntimeError("before accept")
    if path == "/return":
        return
    if path == "/late":
        log.append([(await receive())["code"], "late"])
        return
    await send({"type": "websocket.accept", "subprotocol": (scope["subprotocols"] or [None])[-1],
                "headers": [(b"x-accepted", b"yes"), (b"connection", b"close"), (b"sec-websocket-extensions", b"permessage-deflate")]})
    if path == "/scope":
        names = ("type", "http_version", "scheme", "path", "query_string", "root_path", "server", "subprotocols", "extensions", "asgi", "method", "state")
        await send({"type": "websocket.send", "text": json.dumps({name: scope[name] for name in names if name in scope}, default=str)})
    if path == "/bye":
        await send({"type": "websocket.close", "code": int(query or 1000), "reason": "so it is"})
        log.append([(await receive())["code"], "bye"])
        return
    if path == "/frames":               # TYPE,FLAGS,HEX and so on, written to the agent as they stand
        for text in query.split("&"):
            kind, flags, payload = text.split(",")
            payload = bytes(int(payload[1:])) if payload.startswith("x") else bytes.fromhex(payload)
            os.write(3, struct.pack("<IIBBH", len(payload), receive.__self__.stream, int(kind), int(flags), 0) + payload)
        await asyncio.sleep(3600)
    if path == "/throw":
        raise RuntimeError("after accept")
    elif path == "/send":
        for part in query.split(","):
            await send({"type": "websocket.send", "bytes": bytes(int(part))})
    elif path == "/idle":
        await asyncio.sleep(3600)
    elif path == "/both":
        await asyncio.gather(*(send({"type": "websocket.send", "text": letter * 300000}) for letter in "abc"))
    if path != "/return-open":
        await echo(receive, send)

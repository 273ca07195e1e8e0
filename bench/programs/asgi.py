"""/ says hello, /large answers with 100 kB, an upload is read to its end, WebSockets echo."""
HELLO, LARGE = b"hello, world\n", b"x" * 100_000


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await send({"type": (await receive())["type"] + ".complete"})
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "bytes": message["bytes"]})
        return
    while scope["method"] == "POST" and (await receive()).get("more_body"):
        pass
    body = LARGE if scope["path"] == "/large" else HELLO
    await send({"type": "http.response.start", "status": 200, "headers": [
        (b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

"""The smallest useful ASGI program: no framework, nothing to install.

The agent calls app(scope, receive, send) once per request. scope says what was asked,
receive() gives the body piece by piece, send() takes the answer: one start, then the body.
Its entrypoint is main:app.
"""


async def app(scope, receive, send):
    if scope["type"] != "http":         # lifespan, for instance: not needed here
        raise NotImplementedError(scope["type"])
    text = "Hello from Python. You asked for %s\n" % scope["path"]
    body = text.encode()
    await send({
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"text/plain; charset=utf-8"),
                    (b"content-length", b"%d" % len(body))],
    })
    await send({"type": "http.response.body", "body": body})

"""Lifespans of every kind, one per attribute."""
import asyncio


async def serve(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    body = b"state %d" % scope["state"].get("count", -1)
    await send({"type": "http.response.body", "body": body})


def program(lifespan):
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await lifespan(scope, receive, send)
        else:
            await serve(scope, receive, send)
    return app


@program
async def good(scope, receive, send):
    await receive()
    scope["state"]["count"] = 1
    await send({"type": "lifespan.startup.complete"})
    await receive()
    print("shutdown heard", flush=True)
    await send({"type": "lifespan.shutdown.complete"})


@program
async def hang(scope, receive, send):
    await receive()
    await asyncio.sleep(3600)


@program
async def stubborn(scope, receive, send):
    """Hangs and cannot be cancelled."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass


@program
async def fail(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})


@program
async def startup_raises(scope, receive, send):
    await receive()
    raise RuntimeError("no database")


@program
async def startup_exits(scope, receive, send):
    await receive()
    raise SystemExit(6)


@program
async def unsupported(scope, receive, send):
    raise NotImplementedError("only http")


@program
async def returns(scope, receive, send):
    pass


async def unaware(scope, receive, send):
    """Takes the startup event for a request."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"unaware"})


async def unaware_of_body(scope, receive, send):
    """Takes the startup event for a request, and misses what a request has."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % len(body)})


@program
async def shutdown_fails(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.failed", "message": "could not save"})

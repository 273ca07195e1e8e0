"""Programs that answer aleph.message events, in the ways that programs do, by the event's
text; and one like the network's SDK wrapper, whose call returns what is to be awaited."""
import asyncio
import enum

keep = []


class Colour(str, enum.Enum):
    RED = "red"


async def app(scope, receive, send):
    if scope["type"] != "aleph.message":
        raise NotImplementedError(scope["type"])
    body = scope["body"]
    message = await receive()
    if body == "receive":
        await send(message)
    elif body == "types":
        await send({"none": None, "yes": True, "no": False, "small": 7, "minus": -7, "k": 300,
                    "big": 2**63 + 5, "low": -2**63, "float": 1.5, "text": "gr\u00fc\u00df",
                    "long": "t" * 70000, "bytes": b"\0\xff", "list": [1, [2, (3,)]],
                    "set": {1}, "huge": 2**70, "many": list(range(20)), 5: "int key",
                    ("a", 1): "tuple key", "enum": Colour.RED})
    elif body == "scalar":
        await send("just text")
    elif body == "big":
        await send({"body": b"b" * 1000000})
    elif body == "first":
        await send("first")
        await send("second")
    elif body == "task":
        async def later():
            await asyncio.sleep(0.05)
            await send("from a task")
        keep.append(asyncio.ensure_future(later()))
    elif body == "nested task":
        async def later():
            await asyncio.sleep(0.02)
            await send("from a task's task")
        async def outer():
            keep.append(asyncio.ensure_future(later()))
        keep.append(asyncio.ensure_future(outer()))
    elif body == "task raises":
        async def later():
            raise ValueError("in the task")
        keep.append(asyncio.ensure_future(later()))
    elif body == "raise":
        raise ValueError("event raised")
    elif body == "deep":
        deep = []
        for _ in range(100):
            deep = [deep]
        await send(deep)
    elif body == "wait":
        await send({"after": await receive()})


class Wrapper:
    """Registers handlers; the call for an event returns a coroutine that sends."""

    def __init__(self, http_app=None):
        self.http_app = http_app
        self.handlers = []

    def event(self, function):
        self.handlers.append(function)
        return function

    async def __call__(self, scope, receive=None, send=None):
        if scope["type"] == "aleph.message":
            for handler in self.handlers:
                async def result():
                    await send(await handler(event=scope))
                return result()
        elif scope["type"] == "lifespan":
            if self.http_app:
                await self.http_app(scope, receive, send)
        elif self.http_app:
            await self.http_app(scope, receive, send)
        else:
            raise ValueError("No HTTP app registered")

    def __getattr__(self, name):
        return getattr(self.http_app, name)


wrapper = Wrapper()


@wrapper.event
async def on_event(event):
    return {"seen": event["body"]}

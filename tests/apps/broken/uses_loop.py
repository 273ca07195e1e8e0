"""Uses asyncio while it is imported, as programs under a running server may."""
import asyncio

lock = asyncio.Lock()
queue = asyncio.Queue()
asyncio.get_running_loop().call_soon(queue.put_nowait, "from the import")


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    async with lock:
        body = (await queue.get()).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

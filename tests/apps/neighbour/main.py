"""Listens on port 7000 of every address, both families, and says its machine's name to whoever
connects.

  /HOST     what the machine at that address says
"""
import asyncio
import os


async def greet(reader, writer):
    writer.write(os.uname().nodename.encode())
    writer.close()


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        for host in "0.0.0.0", "::":
            await asyncio.start_server(greet, host, 7000)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["type"] != "http":
        raise NotImplementedError
    body = b"neighbour"
    if scope["path"] != "/":
        reader, writer = await asyncio.wait_for(asyncio.open_connection(scope["path"][1:], 7000), 10)
        body = await reader.read()
        writer.close()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})

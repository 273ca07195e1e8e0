"""A task of the program's own that exits: this ends the process, unlike one in a request."""
import asyncio
import sys


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    if scope["path"] == "/exit":
        sys.exit(5)

    async def leave():
        sys.exit(7)
    asyncio.ensure_future(leave())
    await asyncio.sleep(10)

"""Forks while it is imported; the child raises."""
import os

child = os.fork()
if not child:
    raise ValueError("in the child")


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"parent"})

"""Forks while it is imported; the child comes back as if nothing had happened."""
import os

child = os.fork()


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"parent" if child else b"child"})

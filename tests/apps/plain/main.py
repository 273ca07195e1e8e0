"""A program in one file: its functions see its top-level names and imports."""
import json

greeting = "from plain code"


def text(name):
    return json.dumps({"greeting": greeting, "name": name, "module": __name__})


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    if scope["path"] == "/raise":
        raise ValueError("line of plain code")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text(scope["path"]).encode()})

"""What a Python program can show of its runtime: `app` is ASGI, `wsgi` is WSGI."""
import hashlib
import json


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] == "aleph.message":
        await send({"heard": scope["body"]})
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body")
    told = {"path": scope["path"], "query": scope["query_string"].decode(), "method": scope["method"],
            "sha256": hashlib.sha256(body).hexdigest()}
    await send({"type": "http.response.start", "status": 200, "headers": [[b"content-type", b"application/json"]]})
    await send({"type": "http.response.body", "body": json.dumps(told, sort_keys=True).encode()})


def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"wsgi ", environ["PATH_INFO"].encode(), b"?", environ["QUERY_STRING"].encode()]

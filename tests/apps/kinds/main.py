"""The same answer from programs of every calling convention, one per attribute, and what
WSGI programs do."""
import functools
import hashlib
import json
import os
import time


async def reply(send, kind):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": kind})


# ---- ASGI ----

async def asgi3(scope, receive, send):
    await reply(send, b"asgi3")


class Asgi3Object:
    async def __call__(self, scope, receive, send):
        await reply(send, b"asgi3 object")

    async def method(self, scope, receive, send):
        await reply(send, b"asgi3 method")


def asgi3_sync(scope, receive, send):
    return reply(send, b"asgi3 sync")


async def asgi3_more(kind, scope, receive, send):
    await reply(send, kind)


def decorated(app):
    def wrapper(*args, **kwargs):
        return app(*args, **kwargs)
    return wrapper


class Asgi2:
    def __init__(self, scope):
        self.scope = scope

    async def __call__(self, receive, send):
        await reply(send, b"asgi2 class")


def asgi2_function(scope):
    async def instance(receive, send):
        await reply(send, b"asgi2 function")
    return instance


asgi3_object = Asgi3Object()
asgi3_method = asgi3_object.method
asgi3_partial = functools.partial(asgi3_more, b"asgi3 partial")
asgi3_decorated = decorated(asgi3)


# ---- WSGI ----

def wsgi_function(environ, start_response):
    start_response("200 OK", [])
    return [b"wsgi function"]


class WsgiObject:
    def __call__(self, environ, start_response):
        start_response("200 OK", [])
        return [b"wsgi object"]


class WsgiClass:
    def __init__(self, environ, start_response):
        self.start_response = start_response

    def __iter__(self):
        self.start_response("200 OK", [])
        yield b"wsgi class"


wsgi_object = WsgiObject()
wsgi_partial = functools.partial(lambda kind, environ, start_response:
                                 (start_response("200 OK", []), [kind])[1], b"wsgi partial")
closed = []


class Parts:
    """An iterable that remembers its close()."""

    def __init__(self, parts):
        self.parts = iter(parts)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.parts)

    def close(self):
        closed.append(True)


def wsgi(environ, start_response):
    name, *args = environ["PATH_INFO"].strip("/").split("/")
    plain = [("Content-Type", "text/plain")]
    if name == "environ":
        start_response("200 OK", plain)
        return [json.dumps({key: value if isinstance(value, (str, bool, list, tuple)) else
                            type(value).__name__ for key, value in environ.items()}).encode()]
    if name == "body":
        body = environ["wsgi.input"].read()
        start_response("200 OK", plain)
        return [b"%d " % len(body), hashlib.sha256(body).hexdigest().encode()]
    if name == "lines":
        lines = [environ["wsgi.input"].readline()] + environ["wsgi.input"].readlines()
        start_response("200 OK", plain)
        return [b"|".join(lines)]
    if name == "slowbody":
        time.sleep(float(args[0]))
        size = 0
        while True:
            piece = environ["wsgi.input"].read(1000)
            if not piece:
                break
            size += len(piece)
        start_response("200 OK", plain)
        return [b"%d" % size]
    if name == "parts":
        start_response("200 OK", plain)
        return Parts([b"a", b"", b"b" * int(args[0])])
    if name == "closed":
        start_response("200 OK", plain)
        return [b"%d" % len(closed)]
    if name == "forever":
        start_response("200 OK", plain)
        return Parts(iter(lambda: b"x" * 1000, None))
    if name == "drip":
        start_response("200 OK", plain)
        return Parts(time.sleep(0.2) or b"drip" for _ in range(int(args[0])))
    if name == "write":
        write = start_response("200 OK", plain)
        write(b"written ")
        return [b"returned"]
    if name == "sleep":
        time.sleep(float(args[0]))
        start_response("200 OK", plain)
        return [b"slept"]
    if name == "excinfo":
        start_response("200 OK", plain)
        try:
            raise ValueError("before the head was sent")
        except ValueError:
            import sys
            start_response("500 Oops", plain, sys.exc_info())
        return [b"replaced"]
    if name == "excinfo_late":
        write = start_response("200 OK", plain)
        write(b"sent")
        try:
            raise ValueError("after the head was sent")
        except ValueError:
            import sys
            start_response("500 Oops", plain, sys.exc_info())
        return [b"never"]
    if name == "twice":
        start_response("200 OK", plain)
        start_response("200 OK", plain)
    if name == "nohead":
        return [b"body"]
    if name == "silent":
        return []
    if name == "str":
        start_response("200 OK", plain)
        return ["text"]
    if name == "badheader":
        start_response("200 OK", [("X-Test", "one\r\nX-Smuggled: two")])
        return [b"never"]
    if name == "raise":
        raise ValueError("raised on purpose")
    if name == "fork":
        child = os.fork()               # the child comes back as if nothing had happened
        start_response("200 OK", plain)
        return [b"%d" % child]
    if name == "reap":
        os.waitpid(-1, os.WNOHANG)
        start_response("200 OK", plain)
        return []
    if name == "empty":
        start_response("204 No Content", [])
        return []
    if environ.get("HTTP_ALEPH_EVENT"):
        body = environ["wsgi.input"].read()
        start_response("200 OK", plain)
        return [environ["HTTP_ALEPH_EVENT"].encode() + b" " + body]
    start_response("404 Not Found", plain)
    return [b"no " + name.encode("latin-1")]


# ---- neither ----

def takes_nothing():
    pass


def takes_four(a, b, c, d):
    pass


async def async_one(scope):
    pass


not_callable = "text"

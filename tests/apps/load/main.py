"""A program that is hard to stop: it ignores SIGTERM, its lifespan has no end, its children are
a hundred and write to /data all the time.

  /           "load"                           /inflight   how many requests wait
  /wait       waits for an hour                /block      the same, and nothing else is done
  /write/X    X in /data/token, without fsync  /bridge     opens the guest API and keeps it
  /fork       starts the children              /count      the next number, after fsync
"""
import asyncio
import os
import signal
import socket
import time

waiting = number = 0
kept = []


def child(i):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.setsid()
    os.chdir("/data")
    with open("child-%d" % i, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 100)
            time.sleep(2)


def fork():
    for i in range(100):
        if os.fork() == 0:
            try:
                child(i)
            finally:
                os._exit(1)
    return "forked"


def write(text):
    with open("/data/token", "w") as file:
        file.write(text)
    return "written"


def bridge():
    s = socket.socket(socket.AF_UNIX)
    s.connect("/tmp/socat-socket")
    s.sendall(b"GET / HTTP/1.1\r\n")
    kept.append(s)
    return "open"


def count():
    """Also something that keeps the journal busy: files come, grow and go."""
    global number
    number += 1
    with open("/data/numbers", "ab") as file:
        file.write(b"%d\n" % number)
    with open("/data/files/%d" % (number % 20), "wb") as file:
        file.write(b"y" * (number % 7 * 1000))
    if number % 5 == 0:
        os.remove("/data/files/%d" % (number % 20))
    fd = os.open("/data/new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.write(fd, b"%d" % number)
    os.fsync(fd)
    os.close(fd)
    os.rename("/data/new", "/data/counter")
    fd = os.open("/data", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return str(number)


async def answer(path):
    global waiting
    if path == "/wait":
        waiting += 1
        await asyncio.sleep(3600)
    if path == "/block":
        time.sleep(3600)
    if path.startswith("/write/"):
        return write(path[7:])
    return {"/": lambda: "load", "/inflight": lambda: str(waiting), "/fork": fork, "/bridge": bridge,
            "/count": count}[path]()


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.makedirs("/data/files", exist_ok=True)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.sleep(3600)
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    body = await answer(scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body.encode()})

"""A tenant that does to its machine whatever a process may. Also the same with a start and an
end that never come to an end: main:stubborn.

  /         "tenant"                      /eat        takes memory until it is stopped
  /bomb     forks without end             /adj        its oom_score_adj
"""
import asyncio
import os
import signal
import time


def eat():
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1 << 16) * 16))


def bomb():
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.01)


def adj():
    with open("/proc/self/oom_score_adj") as file:
        return file.read()


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    action = {"/eat": eat, "/bomb": bomb, "/adj": adj}.get(scope["path"], lambda: "tenant")
    body = action()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body.encode()})


async def stubborn(scope, receive, send):
    """Hears no signal and nothing else as soon as it has been asked for anything."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        await receive()
        while True:
            time.sleep(1)
    await app(scope, receive, send)

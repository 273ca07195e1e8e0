"""Tells what the program sees of a request, and does whatever a bad program may do.

Any path not listed below answers with the request as JSON.

  /bytes/N            N bytes in one message        /raise        raises before the start
  /stream/PARTS/SIZE  PARTS messages of SIZE bytes  /late         raises after the start
  /sleep/S            answers after S seconds       /never        never answers
  /slowread/S         waits S s, then reads         /early        body before start
  /background/S       answers, then works S s       /nothing      returns without an answer
  /state              lifespans begun, and state    /badheader    CR LF in a header's value
  /env /pid /threads  of this process               /disconnects  how many clients went away
  /flood/N            prints N MiB                  /print/TEXT   prints a line
  /exit/N             os._exit(N)                   /kill9        SIGKILL to itself
  /stop               SIGSTOP to itself             /block/S      blocks the event loop
  /closefds           closes fd 3 and up            /fork         a child that stays, with our fds
  /rawframe?hex=..    writes bytes to fd 3          /fill         fills fd 3 until it blocks
  /ownframe?type=N&flags=N&hex=..                   a frame of this very exchange, on fd 3
  /hold               half of it, then waits for    /release      which lets all /hold go on
  /status/N           that status, with a body      /hopbyhop     headers of one connection only
  /length/N/M         declares N bytes, sends M     /counts       of requests, begun and read
  /task               of the task that answers      /nested       looks for events inside a step
  /window             calls call_soon while the next Task is made
  /head/KIND/N        a header with N, its headers in tuples, lists or a generator
"""
import asyncio
import contextvars
import hashlib
import json
import os
import signal
import struct
import threading
import time
from urllib.parse import parse_qs

lifespans = 0
disconnects = 0
begun = 0           # requests handed to the program, whatever became of them
whole = 0           # of these, read to the end
held = set()        # futures of /hold
mark = contextvars.ContextVar("mark", default=None)


async def app(scope, receive, send):
    global begun, disconnects
    if scope["type"] == "lifespan":
        return await lifespan(scope, receive, send)
    if scope["type"] == "aleph.message":
        return await send({"event": scope["body"], "pid": os.getpid()})
    begun += 1
    name, *args = scope["path"].strip("/").split("/")
    try:
        await routes.get(name, echo)(scope, receive, send, *args)
    except OSError:
        disconnects += 1
        raise


async def lifespan(scope, receive, send):
    global lifespans
    lifespans += 1
    await receive()
    scope["state"]["from_lifespan"] = "yes"
    print("lifespan startup", flush=True)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    print("lifespan shutdown", flush=True)
    await send({"type": "lifespan.shutdown.complete"})


async def start(send, status=200, headers=()):
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def answer(send, value):
    body = json.dumps(value).encode() + b"\n"
    await start(send, 200, [(b"content-type", b"application/json"),
                            (b"content-length", b"%d" % len(body))])
    await send({"type": "http.response.body", "body": body})


async def read(receive):
    global whole
    size, digest, parts = 0, hashlib.sha256(), 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError("the client went away inside the body")
        size += len(message["body"])
        digest.update(message["body"])
        parts += 1
        if not message["more_body"]:
            whole += 1
            return size, digest.hexdigest(), parts


async def echo(scope, receive, send, *args):
    size, digest, parts = await read(receive)
    await answer(send, {
        "method": scope["method"],
        "path": scope["path"],
        "raw_path": scope["raw_path"].decode("latin-1"),
        "query": scope["query_string"].decode("latin-1"),
        "root_path": scope["root_path"],
        "http_version": scope["http_version"],
        "scheme": scope["scheme"],
        "client": scope["client"],
        "server": scope["server"],
        "asgi": scope["asgi"],
        "headers": [[name.decode("latin-1"), value.decode("latin-1")]
                    for name, value in scope["headers"]],
        "body_bytes": size,
        "body_sha256": digest,
    })


async def bytes_(scope, receive, send, count):
    await start(send)
    await send({"type": "http.response.body", "body": b"x" * int(count)})


async def stream(scope, receive, send, parts, size):
    await start(send)
    for number in range(int(parts)):
        await send({"type": "http.response.body", "more_body": True,
                    "body": bytes([97 + number % 26]) * int(size)})
    await send({"type": "http.response.body"})


async def sleep(scope, receive, send, seconds):
    await asyncio.sleep(float(seconds))
    await answer(send, {"slept": float(seconds)})


async def slowread(scope, receive, send, seconds):
    await asyncio.sleep(float(seconds))
    await echo(scope, receive, send)


async def background(scope, receive, send, seconds):
    await answer(send, {"background": float(seconds)})
    await asyncio.sleep(float(seconds))
    print("background done", flush=True)


async def state(scope, receive, send):
    await answer(send, {"lifespans": lifespans, "state": scope["state"]})


async def never(scope, receive, send):
    global disconnects
    while (await receive())["type"] != "http.disconnect":
        pass
    disconnects += 1


async def raise_(scope, receive, send):
    raise ValueError("raised on purpose")


async def late(scope, receive, send):
    await start(send)
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    raise ValueError("raised in the middle")


async def early(scope, receive, send):
    await send({"type": "http.response.body", "body": b"too early"})


async def nothing(scope, receive, send):
    pass


async def badheader(scope, receive, send):
    await start(send, 200, [(b"x-test", b"one\r\nx-smuggled: two")])
    await send({"type": "http.response.body", "body": b"never sent"})


async def exit_(scope, receive, send, code):
    os._exit(int(code))


async def flood(scope, receive, send, mib):
    line = "f" * 1023
    for _ in range(int(mib) * 1024):
        print(line)
    await answer(send, {"printed": int(mib)})


async def print_(scope, receive, send, text):
    print(text)
    await answer(send, {"printed": text})


async def env(scope, receive, send):
    await answer(send, dict(os.environ))


async def pid(scope, receive, send):
    await answer(send, {"pid": os.getpid(), "ppid": os.getppid(), "cwd": os.getcwd()})


async def threads(scope, receive, send):
    await answer(send, {"threads": threading.active_count()})


async def count_disconnects(scope, receive, send):
    await answer(send, {"disconnects": disconnects})


async def kill9(scope, receive, send):
    os.kill(os.getpid(), signal.SIGKILL)


async def stop(scope, receive, send):
    os.kill(os.getpid(), signal.SIGSTOP)
    await answer(send, {"stopped": True})


async def block(scope, receive, send, seconds):
    time.sleep(float(seconds))
    await answer(send, {"blocked": float(seconds)})


async def closefds(scope, receive, send):
    os.closerange(3, 1024)
    await answer(send, {"closed": True})


async def fork(scope, receive, send):
    """The child closes nothing itself and outlives the worker."""
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    await answer(send, {"child": child})


async def rawframe(scope, receive, send):
    """Bytes of the program's own making on the agent's channel."""
    data = bytes.fromhex(parse_qs(scope["query_string"].decode())["hex"][0])
    os.set_blocking(3, True)
    while data:
        data = data[os.write(3, data):]
    await asyncio.sleep(30)


async def fill(scope, receive, send):
    """Frames of an unknown type and stream, as many as the agent's patience takes."""
    frame = (65536).to_bytes(4, "little") + b"\xff\xff\xff\x7f\xee\0\0\0" + bytes(65536)
    os.set_blocking(3, True)
    while True:
        os.write(3, frame)


async def ownframe(scope, receive, send):
    """Bytes of the program's own making, on the stream of its own request."""
    query = parse_qs(scope["query_string"].decode(), keep_blank_values=True)
    payload = bytes.fromhex(query["hex"][0])
    os.set_blocking(3, True)
    os.write(3, struct.pack("<IIBBH", len(payload), receive.__self__.stream,
                            int(query["type"][0]), int(query["flags"][0]), 0) + payload)
    await asyncio.sleep(30)


async def hold(scope, receive, send):
    await start(send)
    await send({"type": "http.response.body", "body": b"first ", "more_body": True})
    future = asyncio.get_running_loop().create_future()
    held.add(future)
    await future
    await send({"type": "http.response.body", "body": b"last"})


async def release(scope, receive, send):
    await answer(send, {"released": len(held)})
    while held:
        held.pop().set_result(None)


async def status(scope, receive, send, number):
    await start(send, int(number), [(b"content-type", b"text/plain")])
    await send({"type": "http.response.body", "body": b"a body"})


async def length(scope, receive, send, declared, sent):
    await start(send, 200, [(b"content-length", declared.encode())])
    await send({"type": "http.response.body", "body": b"x" * int(sent)})


async def hopbyhop(scope, receive, send):
    names = (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer",
             b"transfer-encoding", b"upgrade")
    await start(send, 200, [(name, b"x-one") for name in names] + [(b"x-kept", b"yes")])
    await send({"type": "http.response.body", "body": b"hops"})


async def counts(scope, receive, send):
    await answer(send, {"begun": begun, "whole": whole, "disconnects": disconnects})


async def task(scope, receive, send):
    before, first = mark.get(), asyncio.current_task()
    mark.set("set")
    listed = first in asyncio.all_tasks()
    await asyncio.sleep(0)
    await answer(send, {"before": before, "after": mark.get(), "listed": listed,
                        "same": first is not None and first is asyncio.current_task()})


async def nested(scope, receive, send):
    time.sleep(0.2)                     # other requests come
    for _ in range(8):                  # what a loop that runs inside another would do
        asyncio.get_running_loop()._selector.select(0)
    await answer(send, {})


notes = []


async def window(scope, receive, send):
    loop, tasks = asyncio.get_running_loop(), getattr(asyncio.tasks, "_all_tasks", None)

    def add(it):
        del tasks.add
        loop.call_soon(notes.append, "called")
        tasks.add(it)

    if tasks is not None and not notes:
        tasks.add = add
    await answer(send, {"notes": len(notes), "there": tasks is not None})


async def head(scope, receive, send, kind, number):
    pair = (b"x-number", number.encode())
    await start(send, 200, {"tuples": [pair], "lists": [list(pair)], "generator": (pair for _ in "1")}[kind])
    await send({"type": "http.response.body", "body": b"x"})


routes = {
    "task": task, "nested": nested, "window": window, "head": head,
    "ownframe": ownframe, "hold": hold, "release": release, "status": status,
    "length": length, "hopbyhop": hopbyhop, "counts": counts,
    "bytes": bytes_, "stream": stream, "sleep": sleep, "slowread": slowread,
    "background": background, "state": state, "never": never, "raise": raise_, "late": late,
    "early": early, "nothing": nothing, "badheader": badheader, "exit": exit_, "flood": flood,
    "print": print_, "env": env, "pid": pid, "threads": threads, "kill9": kill9, "stop": stop,
    "block": block, "closefds": closefds, "fork": fork, "rawframe": rawframe, "fill": fill,
    "disconnects": count_disconnects,
}

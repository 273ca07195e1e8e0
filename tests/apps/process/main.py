"""What a program sees when the agent is an ordinary process, and what it leaves behind.

  /facts    a JSON map: environment, folder, user, process, descriptors
  /slow     answers after half a second
  /orphan   the id of a process in a session of its own, whose parent has ended; it stays
  /gone     the same of one that has ended
  /exit     ends the program with exit code 7
  /body     reads the body first

$BYE names a file that is written when the lifespan ends.
"""
import asyncio
import json
import os
import time


def facts():
    return json.dumps({"env": dict(os.environ), "cwd": os.getcwd(), "uid": os.getuid(), "pid": os.getpid(),
                       "ppid": os.getppid(), "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))})


def orphan(seconds):
    readable, writable = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writable, b"%d" % os.getpid())
            time.sleep(seconds)
        os._exit(0)
    os.wait()
    return os.read(readable, 20).decode()


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if "BYE" in os.environ:
            with open(os.environ["BYE"], "w") as file:
                file.write("bye")
        await send({"type": "lifespan.shutdown.complete"})
        return
    path = scope["path"]
    body = "hello"
    if path == "/facts":
        body = facts()
    elif path == "/slow":
        await asyncio.sleep(0.5)
    elif path == "/orphan":
        body = orphan(1000)
    elif path == "/gone":
        body = orphan(0)
    elif path == "/exit":
        os._exit(7)
    elif path == "/body":
        more = True
        while more:
            more = (await receive()).get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body.encode()})

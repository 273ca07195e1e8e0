"""Reads and writes the files that its requests name.

  GET /PATH       the file                    POST /PATH    writes the body to it, and fsync
  GET /           "files"                     GET /import   the text of the package greetings
  GET /hold/PATH  opens the file for writing, enters its folder and keeps both
  GET /dir        its current folder, and the first two of sys.path

An event's body is a path that is written. An error of the system is answered with 507 and its name, as ENOSPC.
"""
import errno
import os
import sys

kept = []


def write(path, content):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)     # what is there is written over
    try:
        done = 0
        while done < len(content):
            done += os.pwrite(fd, content[done:], done)
        os.ftruncate(fd, done)
        os.fsync(fd)
    finally:
        os.close(fd)
    return b"%d bytes" % len(content)


def hold(path):
    kept.append(open(path, "ab", buffering=0))
    kept[-1].write(b"held")
    os.chdir(os.path.dirname(path))
    return b"held"


def package():
    import greetings
    return greetings.TEXT.encode()


def read(path):
    with open(path, "rb") as file:
        return file.read()


def act(method, path, body):
    if method == "POST":
        return write(path, body)
    if path.startswith("/hold/"):
        return hold(path[5:])
    return {"/": lambda: b"files", "/import": package,
            "/dir": lambda: " ".join([os.getcwd(), *sys.path[:2]]).encode()}.get(path, lambda: read(path))()


async def app(scope, receive, send):
    if scope["type"] == "aleph.message":
        write((await receive())["body"], b"by an event")
        await send({"type": "aleph.message.ack"})
        return
    if scope["type"] != "http":
        raise NotImplementedError
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    try:
        status, answer = 200, act(scope["method"], scope["path"], body)
    except OSError as error:
        status, answer = 507, errno.errorcode[error.errno].encode()
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": answer})

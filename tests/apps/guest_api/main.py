"""Uses the guest API as the network's SDK does: HTTP over the Unix socket whose path is in the
environment.

  /mode         the socket's permissions as they were when this module was imported
  /get/N        N requests at once, of /bytes each: how many bytes each got
  /half         one that says first that no more will follow
  /crash        ends the process
"""
import asyncio
import os
import stat

SOCKET = os.environ["ALEPH_API_UNIX_SOCKET"]
HOST = os.environ["ALEPH_API_HOST"].removeprefix("http://")
FOUND = stat.filemode(os.lstat(SOCKET).st_mode)


async def get(path, ends=False):
    reader, writer = await asyncio.open_unix_connection(SOCKET)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
    if ends:
        writer.write_eof()
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200 "), head
    assert body == bytes(range(256)) * (len(body) // 256), "other bytes"
    return len(body)


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    path = scope["path"]
    if path == "/crash":
        os._exit(3)
    body = FOUND
    if path.startswith("/get/"):
        body = " ".join(map(str, await asyncio.gather(*[get("/bytes") for _ in range(int(path[5:]))])))
    elif path == "/half":
        body = str(await get("/bytes", ends=True))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body.encode()})

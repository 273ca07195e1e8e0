"""The host's side of input_data and output_data, with Python's zipfile: data_peer.py SOCKET CASE…
makes checks, one line each. The program is tests/apps/files."""
import io
import os
import stat
import sys
import threading
import time
import zipfile

import msgpack

from peer import Peer, zipped

MIB = 1 << 20


def check(name, good, why=""):
    print("ok " + name if good else "FAIL %s: %s" % (name, str(why)[:400]), flush=True)


def unpacked(data):
    """{name: (mode, content)} of an archive; folders end with a slash. None for None."""
    if data is None:
        return None
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {i.filename: (i.external_attr >> 16, archive.read(i)) for i in archive.infolist()}


def contents(data):
    archive = unpacked(data)
    return archive and {name: text for name, (_, text) in archive.items() if not name.endswith("/")}


def reply(path="/", **others):
    answer = peer.request(path, **others)
    assert set(answer) == {"headers", "body", "output", "output_data"}, answer
    return answer


def get():
    return reply()["output_data"]


def write(path, content):
    answer = reply(path, method="POST", body=content)
    assert answer["headers"]["status"] == 200, answer
    return answer["output_data"]


def run(command):
    return peer.raw(b"!" + command.encode() + b"\n")


def configure():
    """With input data, which is no news."""
    with open(os.path.join(os.path.dirname(__file__), "apps/files/main.py")) as file:
        code = zipped({"main.py": file.read()})
    answer = peer.configure(code, "main:app", input_data=zipped({"in/a": "input", "in/b": b"\0\1" * 1000}))
    check("data: configured", answer == {"success": True}, answer)


SERVER = """
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/":
            with open("/data" + self.path, "w") as file:
                file.write("by an executable")
        self.send_response(204)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
"""


def executable():
    answer = peer.configure(zipped({"serve.py": SERVER}), "serve.py", interface="executable", input_data=zipped({"in": "x"}))
    check("data: an executable: configured", answer == {"success": True}, answer)
    check("data: an executable: nothing yet", get() is None)
    data = contents(reply("/out")["output_data"])
    check("data: an executable's reply carries it too", data == {"in": b"x", "out": b"by an executable"}, data)
    check("10: an executable: once", get() is None)


def unchanged():
    check("10: input data alone is not sent back", get() is None)
    data = contents(write("/data/out", b"first"))
    check("10: what changed brings all of it", data == {"in/a": b"input", "in/b": b"\0\1" * 1000, "out": b"first"}, data)
    replies = [get() for _ in range(30)]
    check("10: and is not packed again", replies == [None] * 30, replies)
    wrong = [i for i in range(50) if (contents(write("/data/out", b"%05d" % i)) or {}).get("out") != b"%05d" % i]
    check("10: 50 changes of the same size in quick succession, each is seen", wrong == [], wrong)
    check("10: nothing since", get() is None)


def changes():
    """Every kind of change is one."""
    cases = [("a new file", "echo new >/data/new", "new"), ("an empty one", ": >/data/empty", "empty"),
             ("a folder", "mkdir -p /data/x/y", "x/y/"), ("permissions", "chmod 755 /data/new", "new"),
             ("a link", "ln -s new /data/link", "link"), ("another name", "mv /data/new /data/renamed", "renamed"),
             ("a time", "touch -d 2001-01-01 /data/renamed", "renamed"),
             ("__pycache__", "mkdir /data/__pycache__; echo x >/data/__pycache__/x", "__pycache__/x")]
    for name, command, file in cases:
        run(command)
        archive = unpacked(get())
        check("10: a change: " + name, archive is not None and file in archive, archive and list(archive))
        if name == "permissions":
            check("data: permissions are kept", archive["new"][0] == stat.S_IFREG | 0o755, oct(archive["new"][0]))
        if name == "a link":
            check("data: a link is kept", archive["link"] == (stat.S_IFLNK | 0o777, b"new"), archive["link"])
        check("10: once: " + name, get() is None)
    run("rm /data/renamed")
    archive = unpacked(get())
    check("10: a change: a file that is gone", archive is not None and "renamed" not in archive)
    run("rm -r /data/*")
    check("10: a change: nothing is left", contents(get()) == {})
    check("10: once: nothing is left", get() is None)
    big = os.urandom(3 * MIB)
    answer = reply("/data/big", method="POST", body=big)
    check("data: 3 MiB come back whole", contents(answer["output_data"]) == {"big": big}, answer["output"])
    answer = peer.event("/data/event")
    check("data: an event's reply carries it too", contents(answer["output_data"]) == {"big": big, "event": b"by an event"},
          list(answer))
    run("rm /data/*")
    get()


def unfit():
    """What no archive can hold is left out, the rest is there."""
    run("cd /data; mkfifo fifo; mknod null c 1 3; ln -s /etc/passwd out; ln -s ../.. up; echo x >'a\\b'; mkdir v; "
        "mount -t tmpfs none v; echo volume >v/file; echo good >good")
    data = contents(get())
    check("data: pipes, devices, links that lead out and what is mounted are left out", data == {"good": b"good\n"}, data)
    run("echo more >/data/v/file")
    check("data: a change on a volume is none", get() is None)
    run("umount /data/v; rm -r /data/*; mount -t tmpfs none /data; echo x >/data/x")
    check("data: a volume on /data is not packed", get() is None)
    run("umount /data")
    check("data: emptied meanwhile", contents(get()) == {})


def at_once():
    """50 requests that each leave a file."""
    answers, late = [None] * 50, []

    def one(i):
        answers[i] = write("/data/%d" % i, b"%d" % i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(50)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    packed = [contents(a) for a in answers if a is not None]
    whole = {str(i): b"%d" % i for i in range(50)}
    check("data: 50 at once: the fullest archive has all", packed and max(packed, key=len) == whole, [len(p) for p in packed])
    check("data: 50 at once: nobody's file is missed", all(answers[i] is None or str(i) in contents(answers[i]) for i in range(50)))
    check("data: 50 at once: nothing since", get() is None)


def hung_up():
    """A reply that reached nobody does not count as sent."""
    write("/data/big", os.urandom(3 * MIB))
    for moment in (0, 0.02, 0.04):          # as good as certainly while it is packed
        name = "gone at %g" % moment
        with peer.connect() as s:
            s.sendall(msgpack.packb(peer.scope("/data/" + name, method="POST")))
            time.sleep(moment)
        time.sleep(0.5)
        data = contents(get())
        check("data: a host that hung up after %g s: the next reply carries it" % moment, data is not None and name in data,
              data and list(data))
    run("rm -r /data/*")
    get()


def too_large():
    """reply_bytes is 4 MiB."""
    answer = reply("/data/large", method="POST", body=os.urandom(5 * MIB))
    check("data: too large: the response is whole", (answer["headers"]["status"], answer["body"]["body"]) == (200, b"%d bytes" % (5 * MIB)))
    check("data: too large: and says why nothing comes with it",
          answer["output_data"] is None and "/data/large: the archive is larger than 4194" in answer["output"], answer["output"])
    answer = reply()
    check("data: too large: said once", (answer["output_data"], answer["output"]) == (None, ""), answer["output"])
    run("rm /data/large; echo small >/data/small")
    check("data: too large: then smaller", contents(get()) == {"small": b"small\n"})


def too_slow():
    """data_ms is 200."""
    run("truncate -s 100G /data/sparse")
    start = time.monotonic()
    answer = reply()
    took = time.monotonic() - start
    check("data: too slow: answered in time", answer["headers"]["status"] == 200 and took < 8, took)
    check("data: too slow: says why", answer["output_data"] is None and "output data took longer than 200 ms" in answer["output"], answer["output"])
    answer = reply()
    check("data: too slow: not tried again", (answer["output_data"], answer["output"]) == (None, ""), answer["output"])


def too_many():
    """zip_entries is 2000: the last case, there is no output data after it."""
    run("cd /data; i=0; while [ $i -lt 2100 ]; do : >$i; i=$((i + 1)); done")
    answer = reply()
    check("data: too many entries: says so", answer["output_data"] is None and "more than 2000 entries" in answer["output"], answer["output"])
    run("rm -r /data/*; echo x >/data/x")
    answer = reply()
    check("data: too many entries: none from then on", (answer["output_data"], answer["output"]) == (None, ""))


def cost():
    """Prints what a look at 1,000 files costs a reply, in ms."""
    def best(n=30):
        took = []
        for _ in range(n):
            start = time.monotonic()
            reply()
            took.append(time.monotonic() - start)
        return sorted(took)[n // 2] * 1e3

    run("rm -rf /data")
    without = best()
    run("mkdir /data")
    get()
    empty = best()
    run("cd /data; i=0; while [ $i -lt 1000 ]; do echo $i >$i; i=$((i + 1)); done")
    get()
    check("data: cost of a reply in ms: without /data %.2f, empty %.2f, 1,000 files %.2f" % (without, empty, best()), without < 1000)
    run("rm -r /data/*")
    get()


peer = Peer(sys.argv[1])
for case in sys.argv[2:]:
    globals()[case]()

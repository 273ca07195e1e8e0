"""Programs that misuse the channel between worker and agent; run by frames.sh.

    frames.py SOCKET CONSOLE PID GROUP...

Arguments and output are those of http_raw.py; behind SOCKET runs apps/frames.
"""
import os
import re
import struct
import time
import urllib.parse

from http_raw import (CONSOLE, HOST, SANITIZED, Client, Ended, ask, console_since, descriptors, equal, expect, get, main,
                      report, rss_kib, settled, unfold)

RESPONSE_HEAD, RESPONSE_BODY, FAILURE, WINDOW, RESPONSE_SLOT = 10, 11, 12, 6, 16
SLOTS, SLOT_BYTES = 32, 192 << 10
HEAD = struct.pack("<HH", 200, 0)           # of a response without fields


def frame(kind, payload=b"", stream="own", flags=0, zero=0, length=""):
    payload = payload if isinstance(payload, str) else payload.hex()
    return "%s,%d,%d,%d,%s,%s" % (stream, kind, flags, zero, length, payload)


def frames(*all):
    return "/frames?" + "&".join("f=" + urllib.parse.quote(text, safe=",") for text in all)


def pid():
    return ask("/pid").body


class Others:
    """Two requests in flight, one with half of its answer out."""

    def __enter__(self):
        self.held, self.waiting = Client(), Client()
        self.held.send(get(HOST, target=b"/hold"))
        self.held.head()
        self.held.chunk()
        self.waiting.send(get(HOST, target=b"/wait"))
        time.sleep(0.05)
        return self

    def __exit__(self, *_):
        self.held.sock.close()
        self.waiting.sock.close()

    def end(self, name, reason):
        """They end with this reason, or well when there is none."""
        if reason is None:
            ask("/release")
        answer = self.waiting.response()
        if reason is None:
            equal("%s: another request is untouched" % name, (200, b"waited"), (answer.status, answer.body))
        else:
            expect("%s: another request is told" % name,
                   answer.status == 502 and re.search(reason, answer.body.decode()), (answer.status, answer.body))
        try:
            rest = [self.held.chunk(), self.held.chunk()]
            expect("%s: a response under way goes on" % name, reason is None and rest == [b"last", b""], rest)
        except Ended:
            expect("%s: a response under way is cut" % name, reason is not None, "it should not be")


def replaced(name, before, at, reason):
    expect("%s: on the console" % name, console_since(at, reason), "not there")
    now = ask("/pid")
    expect("%s: the next request is answered by another worker" % name, now.status == 200 and now.body != before,
           (now.status, now.body))


def deadly(name, target, reason, status=502):
    """The worker is killed; whoever has a request there is told exactly why."""
    before = pid()
    unfold()
    at = os.path.getsize(CONSOLE)
    with Others() as others, Client() as client:
        start = time.monotonic()
        client.send(get(HOST, target=target.encode()))
        answer = client.response()
        expect("%s: told" % name, answer.status == status and re.search(reason, answer.body.decode()),
               (answer.status, answer.body))
        others.end(name, reason)
        took = time.monotonic() - start
        expect("%s: at once (%.2f s)" % (name, took), took < (3 if SANITIZED else 1.5), "it took long")
    replaced(name, before, at, reason)


def harmless(name, target, status, body):
    """The worker goes on, and so do other requests. A status of None: the response is cut."""
    before = pid()
    with Others() as others, Client() as client:
        client.send(get(HOST, target=target.encode()))
        try:
            answer = client.response()
            expect("%s: answered" % name, answer.status == status and re.search(body, answer.body), (answer.status, answer.body))
        except Ended:
            equal("%s: the response is cut" % name, None, status)
        others.end(name, None)
    equal("%s: the same worker goes on" % name, before, pid())


def group_sizes():
    """82: frames whose length is a lie."""
    grown = rss_kib()
    for name, length in (("4 GiB", 0xffffffff), ("2 GiB", 0x80000000), ("one byte past the limit", (256 << 10) + 1)):
        for where, stream in (("its own stream", "own"), ("stream 0", 0), ("no stream", 0x7fffffff)):
            deadly("82 length of %s on %s" % (name, where), frames(frame(RESPONSE_BODY, b"x", stream, length=length)),
                   r"malformed frame \(%d bytes" % length)
    grown = rss_kib() - grown
    expect("82 nothing is allocated for a length (%d KiB more)" % grown, SANITIZED or grown < 512, "much more")
    deadly("82 flags that do not exist", frames(frame(RESPONSE_BODY, flags=2)), "malformed frame")
    deadly("82 the zero field is none", frames(frame(RESPONSE_BODY, zero=1)), "malformed frame")


def group_streams():
    """83: frames for streams that are not the program's to use."""
    for kind in (RESPONSE_HEAD, RESPONSE_BODY, FAILURE, WINDOW):
        deadly("83 type %d on an unknown stream" % kind, frames(frame(kind, HEAD, 0x7fffffff)),
               "request 2147483647, which is not open")
    deadly("83 the last stream there can be", frames(frame(RESPONSE_HEAD, HEAD, 0xffffffff)), "which is not open")
    deadly("83 a stream that has finished", frames(frame(RESPONSE_BODY, b"x", 1)), "request 1, which is not open")
    for kind in (0, 1, 2, 3, 4, 5, 7, 8, 9, 17, 255):
        deadly("83 type %d on its own stream" % kind, frames(frame(kind)), "frame of unknown type %d" % kind)
    for kind in (0, 5, 6, 7, 8, 9, 10, 11, 12, 16, 255):
        deadly("83 type %d on stream 0" % kind, frames(frame(kind, b"", 0)), "frame of type %d out of turn" % kind)
    # A program that answers another's request harms only its own: that one is answered so.
    before, at = pid(), os.path.getsize(CONSOLE)
    with Client() as other, Client() as client:
        other.send(get(HOST, target=b"/wait"))
        time.sleep(0.1)
        client.send(get(HOST, target=frames(frame(RESPONSE_HEAD, HEAD, "other"),
                                            frame(RESPONSE_BODY, b"foreign", "other", 1)).encode()))
        answer = other.response()
        equal("83 a foreign stream: that request has the answer", (200, b"foreign"), (answer.status, answer.body))
        ask_later(b"/release")
        answer = client.response()
        expect("83 a foreign stream: the worker's own answer then is one too many", answer.status == 502
               and b"which is not open" in answer.body, (answer.status, answer.body))
    replaced("83 a foreign stream", before, at, "which is not open")


def ask_later(target):
    """Its answer does not matter."""
    with Client() as client:
        client.send(get(HOST, target=target))
        try:
            client.response()
        except (Ended, OSError):
            pass


def group_order():
    """84: frames of its own stream out of order."""
    head = lambda *pairs, count=None: struct.pack("<HH", 200, len(pairs) if count is None else count) + b"".join(pairs)
    deadly("84 body before head", frames(frame(RESPONSE_BODY, b"early")), "a body before its head")
    deadly("84 end before head", frames(frame(RESPONSE_BODY, flags=1)), "a body before its head")
    for name, payload, reason in (
            ("of no bytes", b"", "a head cut short"), ("of 3 bytes", b"abc", "a head cut short"),
            ("with fewer fields than it says", head(b"a\0b\0", count=2), "not 2 names and values"),
            ("with 65,535 fields that are not there", head(count=65535), "not 65535 names and values"),
            ("with more fields than it says", head(b"a\0b\0", b"c\0d\0", count=1), "not 1 names and values"),
            ("without its last NUL", head(b"a\0b"), "not 1 names and values"),
            ("with a name and no value", head(b"a\0"), "not 1 names and values"),
            ("with a NUL in a value", head(b"a\0b\0c\0"), "not 1 names and values")):
        deadly("84 a head %s" % name, frames(frame(RESPONSE_HEAD, payload)), reason)
    for kind in (13, 14):
        deadly("84 a message of type %d without a WebSocket" % kind, frames(frame(kind, b"x")), "where there is no WebSocket")
    deadly("84 a close without a WebSocket", frames(frame(15, b"\xe8\3")), "which cannot be")
    deadly("84 credit of 4 GiB", frames(frame(WINDOW, b"\xff\xff\xff\xff")), "more credit than it had taken")
    deadly("84 credit of one byte", frames(frame(WINDOW, b"\1\0\0\0")), "more credit than it had taken")
    deadly("84 credit of 3 bytes length", frames(frame(WINDOW, b"\0\0\0")), "more credit than it had taken")
    # After the head the client can only be cut off; the others are told the reason.
    for name, all, reason in (
            ("two heads", [frame(RESPONSE_HEAD, HEAD)] * 2, "two heads for one request"),
            ("two heads, a body between", [frame(RESPONSE_HEAD, HEAD), frame(RESPONSE_BODY, b"x"), frame(RESPONSE_HEAD, HEAD)],
             "two heads for one request"),
            ("more than its credit in one frame", [frame(RESPONSE_HEAD, HEAD), frame(RESPONSE_BODY, "x196609")], "than it had credit for"),
            ("a frame after the end", [frame(RESPONSE_HEAD, HEAD), frame(RESPONSE_BODY, b"", flags=1), frame(RESPONSE_BODY)],
             "which is not open")):
        before = pid()
        unfold()
        at = os.path.getsize(CONSOLE)
        with Others() as others, Client() as client:
            client.send(get(HOST, target=frames(*all).encode()))
            try:
                answer = client.response()
                expect("84 %s: no wrong answer" % name, "after the end" in name and answer.body == b"", answer.body)
            except Ended:
                report("84 %s: cut" % name)
            others.end("84 " + name, reason)
        replaced("84 " + name, before, at, reason)
    before, at = pid(), os.path.getsize(CONSOLE)
    with Client() as client:                # one that does not read gives no credit back
        client.send(get(HOST, target=frames(frame(RESPONSE_HEAD, HEAD), *[frame(RESPONSE_BODY, "x65536")] * 16).encode()))
        replaced("84 more than its credit in many frames", before, at, "than it had credit for")
    harmless("84 a failure of its own", frames(frame(FAILURE, b"odd \xff\x1b\r\nX: y\0trace\0more")), 500, rb"^odd \xef\xbf\xbd")
    harmless("84 a failure without text", frames(frame(FAILURE)), 500, b"")
    harmless("84 a failure of 256 KiB", frames(frame(FAILURE, "x%d" % (256 << 10))), 500, b"^pppp")
    harmless("84 a failure after the head", frames(frame(RESPONSE_HEAD, HEAD), frame(FAILURE, b"late")), None, b"")


def group_slots():
    """85: the memory for long bodies, which the program can write, too."""
    slot = lambda number, size: struct.pack("<II", number, size)
    for name, payload in (
            ("slot %d" % SLOTS, slot(SLOTS, 1)), ("slot 4294967295", slot(0xffffffff, 1)),
            ("a byte more than fits", slot(0, SLOT_BYTES + 1)), ("4 GiB", slot(SLOTS - 1, 0xffffffff)),
            ("no payload", b""), ("7 bytes of payload", slot(0, 1)[:7]), ("9 bytes of payload", slot(0, 1) + b"x")):
        deadly("85 a body in %s" % name, frames(frame(RESPONSE_SLOT, payload)), r"a body of \d+ bytes in slot \d+, which cannot be")
    deadly("85 a body in a slot, before its head", frames(frame(RESPONSE_SLOT, slot(0, 1))), "a body before its head")
    before, at = pid(), os.path.getsize(CONSOLE)
    with Client() as client:                # one that does not read gives no credit back
        client.send(get(HOST, target=frames(frame(RESPONSE_HEAD, HEAD), *[frame(RESPONSE_SLOT, slot(0, SLOT_BYTES))] * 16).encode()))
        replaced("85 more than its credit in slots", before, at, "than it had credit for")
    harmless("85 a slot that nobody has filled", frames(frame(RESPONSE_HEAD, HEAD), frame(RESPONSE_SLOT, slot(9, 5), flags=1)),
             200, b"^\\0{5}$")
    for target, size in ((b"/bytes", 4), (b"/scribble/30000", 30000), (b"/scribble/190000", 190000), (b"/scribble/1000000", 1000000)):
        for _ in range(10):
            answer = ask(target.decode())
            equal("85 %s: its length is right" % target.decode(), (200, size), (answer.status, len(answer.body)))
    equal("85 memory that is to change its size", b"Operation not permitted, Operation not permitted, Operation not permitted, hole: 0",
          ask("/resize").body)
    answer = ask("/scribble/190000")
    equal("85 memory with a hole", (200, 190000), (answer.status, len(answer.body)))


def group_channel():
    """85: the channel itself."""
    gone = r"closed its channel|exited with exit code|was killed by signal"
    deadly("85 closed by os.closerange", "/closerange", gone)
    deadly("85 replaced by another file", "/replace", gone)
    deadly("85 shut down for writing", "/half/write", gone)
    deadly("85 shut down for reading", "/half/read", gone)
    deadly("85 filled without reading", "/fill", "which is not open")
    deadly("85 written by a fork: garbage", "/fork_writes/text/garbage-that-is-no-frame-at-all", "malformed frame")
    deadly("85 written by a fork: a frame", "/fork_writes/frames/own,11,0,0,,78", "a body before its head")
    deadly("85 held open by a fork", "/fork_holds/9", "exited with exit code 9")
    # A frame cut short swallows what the worker writes next; that shows as soon as enough has come.
    before, at = pid(), os.path.getsize(CONSOLE)
    with Client() as client:
        client.send(get(HOST, target=frames(frame(RESPONSE_BODY, b"begun", length=3000)).encode()))
        time.sleep(0.1)
        crowd = [Client() for _ in range(100)]
        for one in crowd:
            one.send(get(HOST))
        answers = [one.response() for one in crowd]
        expect("85 half a frame: each request in the way is answered or told", all(
            (a.status, a.body) == (200, b"well") or (a.status == 502 and b"was killed: it sent" in a.body) for a in answers),
            [(a.status, a.body) for a in answers][:5])
        for one in crowd:
            one.sock.close()
    replaced("85 half a frame", before, at, "killed: it sent|malformed|before its head|not open")
    before = descriptors()
    with Client() as client:
        client.send(get(HOST, target=b"/send_descriptors"))
        time.sleep(0.2)
        equal("85 descriptors sent along: the next request works", 200, ask("/").status)
        expect("85 descriptors sent along: none arrives", settled(lambda: descriptors() <= before + 1, True), descriptors())
    # Valid frames without end: the agent still has time for others.
    with Client() as client:
        client.send(get(HOST, target=b"/flood/2"))
        times = []
        for _ in range(20):
            start = time.monotonic()
            with Client() as other:         # refused by the agent itself
                other.send(b"bad\r\n\r\n")
                other.response()
            times.append(time.monotonic() - start)
            time.sleep(0.05)
        times.sort()
        expect("85 a flood of valid frames: others are served (median %.1f ms)" % (times[10] * 1000),
               times[10] < (0.5 if SANITIZED else 0.1), times[-3:])
        equal("85 a flood of valid frames: its own answer", b"flooded", client.response().body)


def group_stolen():
    """Under response_head_ms=1500: a program that takes the agent's frames for itself."""
    with Client() as thief, Client() as client:
        thief.send(get(HOST, target=b"/steal"))
        lost, end = 0, time.monotonic() + 6     # it tries for 5 s
        while time.monotonic() < end:
            answer = client.ask("/")
            if answer.status == 504 and b"no response head within" in answer.body:
                lost += 1
                break
            if answer.status != 200:
                report("85 frames stolen by the program: told", (answer.status, answer.body))
        thief.sock.close()
    expect("85 frames stolen by the program: served or told (%d lost)" % lost, lost <= 1, lost)
    equal("85 frames stolen by the program: the next request works", 200, ask("/").status)


def group_unread():
    """A worker that does not read what the agent has for it: 16 MiB of requests wait, no more."""
    before = rss_kib()
    with Client() as blocker:
        blocker.send(get(HOST, target=b"/block/2"))
        time.sleep(0.1)
        crowd, most = [], 0
        big = get(HOST + b"X: " + b"h" * 60000 + b"\r\n")
        for _ in range(600):                # 36 MB of heads
            one = Client()
            one.send(big)
            crowd.append(one)
            if len(crowd) % 50 == 0:
                most = max(most, rss_kib())
        time.sleep(0.3)
        most = max(most, rss_kib())
        statuses = {}
        for one in crowd:
            answer = one.response()
            key = answer.status if answer.status == 200 else "%d %s" % (answer.status, answer.body.decode().strip())
            statuses[key] = statuses.get(key, 0) + 1
            one.sock.close()
    expect("85 36 MB of heads for a worker that does not read: %d KiB at most" % (most - before),
           SANITIZED or most - before < 20 * 1024, "much more than may wait")
    expect("85 36 MB of heads for a worker that does not read: each is answered or told %s" % statuses,
           set(statuses) == {200, "503 too many requests wait for the program to read them"} and statuses[200] > 200, statuses)


if __name__ == "__main__":
    main()

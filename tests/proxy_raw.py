"""Drives the reverse proxy from both of its ends; run by proxy.sh.

    proxy_raw.py SOCKET CONSOLE PID GROUP...

Arguments and output are those of http_raw.py; behind SOCKET runs apps/upstream, whose scripts
say what it answers. SIDE in the environment is the socket that they go to, ALEPH that of the
supervisor's wire.
"""
import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import socket
import threading
import time

import msgpack

from http_raw import (CONSOLE, HOST, MIB, SANITIZED, Client, Ended, ask, console_since, descriptors, equal, expect, get,
                      highest_rss, main, report, rss_kib, settled, timed, unfold)
from peer import Peer

ALEPH = Peer(os.environ["ALEPH"])
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


# ---- The program's end ------------------------------------------------------------------

def side(**asked):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.environ["SIDE"])
        sock.settimeout(30)
        sock.sendall(json.dumps(asked).encode() + b"\n")
        return json.loads(Peer.read_all(sock))


def state(key):
    return side(state=True)[key]


def script(*steps):
    """Returns the name under which the program plays it; its path is /play/NAME."""
    script.number += 1
    name = "s%d.%d" % (os.getpid(), script.number)
    side(script=name, steps=steps)
    return name


script.number = 0


def plays(name):
    return state("plays").get(name, 0)


def is_closed(name, seconds=5):
    """Whether the connection that played the script has ended, or does so soon."""
    return settled(lambda: name in state("ends"), True, seconds)


def send(data, *times):
    return ["send", data.hex(), *times]


def fields(head):
    return [line for line in head.split("\r\n")[1:] if line]


def seen(target="/", method="GET", headers=b"", body=b""):
    """What the program says of a request that it answers by itself."""
    return json.loads(ask(target, method, headers, body).body)


def is_right():
    """None, or what is wrong with the answer to a good request."""
    found = ask("/good")
    return None if b"GET /good HTTP/1.1" in found.body else "the next request is answered with %d %.200r" % (found.status, found.body)


# ---- Both ways, byte for byte -------------------------------------------------------------

TARGETS = ["/?a=%26%2B+x&b", "/", "/?", "/??", "//", "//a//b/", "/a%2Fb/../c/./d;e=f", "/%00%ff", "/%zz", "/a?b=c?d/e",
           "/~!$&'()*+,;=:@-._", "/a?%26=%3D&%0D%0A", "/?+%20+", "/a%20b?c%20d", "/a\"<>[]^`{|}", "/?a[]=1&a[]=2", "*"]


def group_exact():
    for target in TARGETS:
        method = "OPTIONS" if target == "*" else "GET"
        equal("target %s arrives unchanged, port 80" % target, "%s %s HTTP/1.1" % (method, target),
              seen(target, method)["head"].partition("\r\n")[0])
    for target, arrives in (("http://other.example/x?y", "GET /x?y HTTP/1.1"), ("http://other.example", "GET / HTTP/1.1"),
                            ("http://other.example?q", "GET /?q HTTP/1.1")):
        head = seen(target)["head"]
        equal("A24 target %s arrives in origin form" % target, (arrives, ["Host: other.example"]),
              (head.partition("\r\n")[0], [field for field in fields(head) if field.lower().startswith("host:")]))
    for query, arrives in (("a=%26%2B x&b", "a=%26%2B+x&b"), ("a=b c", "a=b+c"), ("ü=é", "%C3%BC=%C3%A9"), ("", "")):
        reply = json.loads(ALEPH.request("/p q/%", query=query)["body"]["body"])
        equal("query %s arrives in its equivalent, port 52" % query, "GET /p%20q/%25" + ("?" + arrives if arrives else "") + " HTTP/1.1",
              reply["head"].partition("\r\n")[0])
    sent = [b"X-One: 1", b"Host: Guest.Example:8080", b"x-oNe: 2", b"ACCEPT-Encoding: gzip, br;q=0.5", b"Cookie: a=b; c=\"d\"",
            b"X-Latin: \xe9\xff", b"X-Empty: ", b"X-ONE: 1", b"Cookie: e=f", b"user-agent: x  y\tz", b"X_Under: s",
            b"X-Forwarded-For: 192.0.2.7", b"Via: 1.1 before", b"Range: bytes=0-1"]
    with Client() as client:
        client.send(b"GET / HTTP/1.1\r\n" + b"\r\n".join(sent) + b"\r\n\r\n")
        head = json.loads(client.response().body)["head"]
        equal("request fields: order, case, repeats and bytes", [line.decode("latin-1").strip() for line in sent],
              [line.strip() for line in fields(head) if not line.lower().startswith("connection:")])
    reply = json.loads(ALEPH.request(headers=[(b"Host", b"guest"), (b"X-One", b"1"), (b"x-one", b"2"), (b"X-Latin", b"\xe9")])["body"]["body"])
    equal("request fields on port 52: order, case, repeats and bytes", ["X-One: 1", "x-one: 2", "X-Latin: \xe9"],
          [line for line in fields(reply["head"]) if line.lower().startswith("x-")])
    for method in ("DELETE", "PATCH", "PUT", "OPTIONS", "PROPFIND", "PURGE"):
        equal("method %s arrives" % method, method, seen("/", method)["head"].split(" ")[0])
    answered = [b"X-B: 1", b"server: Weird/1.0", b"Set-Cookie: a=1; Path=/; Expires=Mon, 01 Jan 2001 00:00:00 GMT", b"x-a: \xe9",
                b"SET-COOKIE: b=2", b"CONTENT-length: 5", b"X-B: 2", b"Date: Mon, 01 Jan 2001 00:00:00 GMT", b"X-Empty: ",
                b"Content-Encoding: made-up", b"Location: HTTP://Other/%7e?a=%26", b"ETag: W/\"x\"", b"Via: 1.0 inner"]
    name = script(send(b"HTTP/1.1 299 Not quite OK\r\n" + b"\r\n".join(answered) + b"\r\n\r\nhello"))
    with Client() as client:
        client.send(get(HOST, target=b"/play/" + name.encode()))
        lines = client.until(b"\r\n\r\n").split(b"\r\n")
        equal("response fields: order, case, repeats and bytes", [line.strip() for line in answered], [line.strip() for line in lines[1:]])
        equal("response status and body", (b"HTTP/1.1 299", b"hello"), (lines[0][:12], client.exactly(5)))
        equal("the next request on that connection", b"ok", client.ask("/play/" + script(send(OK))).body)
    reply = ALEPH.request("/play/" + name)
    equal("response on port 52", (299, b"hello", [b"1", b"2"]),
          (reply["headers"]["status"], reply["body"]["body"], [bytes(v) for k, v in reply["headers"]["headers"] if bytes(k) == b"X-B"]))
    followed = script(send(OK))
    for status in (301, 302, 303, 307, 308):
        name = script(send(b"HTTP/1.1 %d Moved\r\nLocation: /play/%s\r\nContent-Length: 0\r\n\r\n" % (status, followed.encode())))
        answer = ask("/play/" + name)
        equal("redirect %d is passed on, port 80" % status, (status, "/play/" + followed, 0), (answer.status, answer.get("location"), plays(followed)))
        reply = ALEPH.request("/play/" + name)
        equal("redirect %d is passed on, port 52" % status, (status, 0), (reply["headers"]["status"], plays(followed)))
    packed = gzip.compress(bytes(range(256)) * 400)
    name = script(send(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed))
    answer = ask("/play/" + name, "GET", b"Accept-Encoding: gzip\r\n")
    equal("a gzip body arrives whole with its header, port 80", ("gzip", str(len(packed)), packed),
          (answer.get("content-encoding"), answer.get("content-length"), answer.body))
    reply = ALEPH.request("/play/" + name, headers=[(b"accept-encoding", b"gzip")])
    equal("a gzip body arrives whole with its header, port 52", ([b"gzip"], packed),
          ([bytes(v) for k, v in reply["headers"]["headers"] if bytes(k).lower() == b"content-encoding"], reply["body"]["body"]))


# ---- Fields of one connection -------------------------------------------------------------

def group_hops():
    """RFC 9110 section 7.6.1: what is for one connection only stays there."""
    def kept(raw):
        return [line for line in fields(seen("/", "GET", raw)["head"])
                if not line.lower().startswith(("host:", "connection:"))]
    for name in ("Keep-Alive: 300", "Proxy-Connection: keep-alive", "TE: trailers", "Trailer: X-Sum", "Upgrade: h2c",
                 "Proxy-Authorization: Basic eDp5", "Proxy-Authenticate: Basic"):
        equal("A25 %s stays behind" % name, ["X-Kept: 1"], kept(b"X-Kept: 1\r\n%s\r\n" % name.encode()))
    for what, raw in (("before it", b"X-One: 1\r\nConnection: x-oNe\r\n"), ("after it", b"Connection: X-One\r\nx-one: 1\r\n"),
                      ("among others", b"Connection: keep-alive , X-One,\tx-two,, close\r\nX-One: 1\r\nX-Two: 2\r\n"),
                      ("twice", b"X-One: 1\r\nConnection: X-One\r\nX-One: 2\r\n"),
                      ("in two fields", b"Connection: X-Two\r\nX-One: 1\r\nX-Two: 2\r\nConnection: X-One\r\n")):
        equal("A25 a field that Connection names stays behind: %s" % what, ["X-Kept: 1"], kept(raw + b"X-Kept: 1\r\n"))
    equal("A25 a field whose name is only like a named one is kept", ["X-On: 1", "X-One-More: 2"],
          kept(b"Connection: X-One\r\nX-On: 1\r\nX-One-More: 2\r\n"))
    for named in (b"Host", b"Content-Length", b"Host, Content-Length, Transfer-Encoding"):
        with Client() as client:
            client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Connection: " + named + b"\r\nContent-Length: 5\r\n\r\nhello" + get(HOST, target=b"/second"))
            answer = client.response()
            found = None
            if answer.status == 200:
                found = json.loads(answer.body)
            expect("A25 Connection that names %s takes no framing away" % named.decode(), answer.status == 400
                   or (found["body"]["bytes"], "\r\nHost: guest\r\n" in found["head"]) == (5, True), (answer.status, answer.body))
    reply = json.loads(ALEPH.request("/", headers=[(b"Connection", b"X-One"), (b"X-One", b"1"), (b"X-Kept", b"1"), (b"TE", b"trailers"),
                                                  (b"Transfer-Encoding", b"chunked"), (b"Content-Length", b"77")], method="POST", body=b"hello")["body"]["body"])
    equal("A25 on port 52", (["X-Kept: 1"], 5), ([line for line in fields(reply["head"]) if line.startswith(("X-", "TE"))], reply["body"]["bytes"]))
    name = script(send(b"HTTP/1.1 200 OK\r\nX-One: secret\r\nConnection: keep-alive, X-One, x-two\r\nKeep-Alive: timeout=5\r\nX-Kept: 1\r\n"
                       b"X-TWO: secret\r\nProxy-Connection: x\r\nProxy-Authenticate: Basic\r\nUpgrade: h2c\r\nTrailer: X-Sum\r\nContent-Length: 2\r\n\r\nok"))
    with Client() as client:
        client.send(get(HOST, target=b"/play/" + name.encode()))
        head = client.until(b"\r\n\r\n").decode()
        equal("A25 of a response they stay behind, port 80", ["X-Kept: 1", "Content-Length: 2"],
              [line for line in fields(head) if not line.lower().startswith(("date:", "connection:"))])
    names = [bytes(name).lower() for name, _ in ALEPH.request("/play/" + name)["headers"]["headers"]]
    equal("A25 of a response they stay behind, port 52", [b"x-kept"], [name for name in names if name not in (b"content-length", b"date")])


# ---- Good answers of every shape ------------------------------------------------------------

def chunks(*parts, extension=b"", trailer=b""):
    return b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts) + b"0\r\n" + trailer + b"\r\n"


def whole(name, raw, status, body, method="GET", then=(), reused=None, in_bytes=True):
    """The answer comes through as it is meant, in one piece or in bytes, on both ports, and so
    does the next one."""
    why = None
    for way, step in (("whole", send(raw)), ("bytes", ["drip", raw.hex(), 0]))[:1 + in_bytes]:
        key = script(step, *then)
        try:
            with Client() as client:
                answer = client.ask("/play/" + key, method)
                if (answer.status, answer.body) != (status, body):
                    why = "%d %.100r" % (answer.status, answer.body)
                elif client.ask("/play/" + script(send(OK))).body != b"ok":
                    why = "the next request on that connection is answered otherwise"
        except Exception as exc:
            why = repr(exc)
        if not why and reused is not None and is_closed(key, 0.1 if reused else 5) == reused:
            why = "the program's connection is %s" % ("closed" if reused else "kept")
        if not why:
            reply = ALEPH.request("/play/" + key, method=method)
            if "error" in reply or (reply["headers"]["status"], reply["body"]["body"]) != (status, body):
                why = "on port 52: %.200r" % reply
        why = why or is_right()
        if why:
            why = "(sent in %s) %s" % (way, why)
            break
    report(name, why)


def group_framing():
    close = (["close"],)
    head = b"HTTP/1.1 200 OK\r\n"
    inner = b"HTTP/1.1 404 No\r\nContent-Length: 3\r\n\r\nno!"
    whole("HTTP/1.1 with a length, kept", head + b"Content-Length: 5\r\n\r\nhello", 200, b"hello", reused=True)
    whole("HTTP/1.1 with a length, closed", head + b"Content-Length: 5\r\nConnection: close\r\n\r\nhello", 200, b"hello", then=close)
    whole("HTTP/1.1 with a length, not closed though it said so", head + b"Content-Length: 5\r\nConnection: close\r\n\r\nhello", 200, b"hello", reused=False)
    whole("HTTP/1.1 of length 0", head + b"Content-Length: 0\r\n\r\n", 200, b"", reused=True)
    whole("HTTP/1.1 of length 0000000000000000005", head + b"Content-Length: 0000000000000000005\r\n\r\nhello", 200, b"hello")
    whole("HTTP/1.1 up to the end of the connection", head + b"X: y\r\n\r\nhello", 200, b"hello", then=close)
    whole("HTTP/1.1 up to the end, declared", head + b"Connection: close\r\n\r\nhello", 200, b"hello", then=close)
    whole("HTTP/1.1 up to the end, no byte", head + b"\r\n", 200, b"", then=close)
    whole("HTTP/1.1 without a reason", b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello", 200, b"hello")
    whole("HTTP/1.1 with an empty reason", b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello", 200, b"hello")
    whole("HTTP/1.1 with a reason in Latin-1", b"HTTP/1.1 200 Tr\xe8s bien\r\nContent-Length: 5\r\n\r\nhello", 200, b"hello")
    whole("HTTP/1.0 up to the end", b"HTTP/1.0 200 OK\r\nX: y\r\n\r\nhello", 200, b"hello", then=close)
    whole("HTTP/1.0 with a length", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, b"hello", then=close)
    whole("HTTP/1.0 with a length, not closed", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, b"hello", reused=False)
    whole("HTTP/1.0 kept alive", b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 5\r\n\r\nhello", 200, b"hello")
    whole("chunks", head + CHUNKED + b"\r\n" + chunks(b"hello", b" ", b"world"), 200, b"hello world", reused=True)
    whole("chunks: none", head + CHUNKED + b"\r\n" + chunks(), 200, b"", reused=True)
    whole("chunks: in capitals", head + b"TRANSFER-ENCODING: Chunked\r\n\r\n" + chunks(b"hello"), 200, b"hello")
    whole("chunks: sizes in capitals and with zeros", head + CHUNKED + b"\r\n000A\r\n0123456789\r\n00\r\n\r\n", 200, b"0123456789")
    whole("chunks: with extensions", head + CHUNKED + b"\r\n" + chunks(b"hello", extension=b";a=b;c=\"d\""), 200, b"hello")
    whole("chunks: trailers are dropped", head + CHUNKED + b"Trailer: X-Sum\r\n\r\n" + chunks(b"hello", trailer=b"X-Sum: 5\r\nHost: x\r\n"), 200, b"hello", reused=True)
    whole("chunks: closed after them", head + CHUNKED + b"Connection: close\r\n\r\n" + chunks(b"hello"), 200, b"hello", then=close)
    whole("a body that looks like a response", head + b"Content-Length: %d\r\n\r\n" % len(inner) + inner, 200, inner)
    whole("chunks that look like a response", head + CHUNKED + b"\r\n" + chunks(inner, inner), 200, inner + inner)
    whole("a body up to the end that looks like a response", head + b"\r\n" + inner, 200, inner, then=close)
    for status in (200, 201, 205, 400, 404, 418, 500, 503, 599, 799):
        whole("status %d" % status, b"HTTP/1.1 %d Some\r\nContent-Length: 4\r\n\r\nbody" % status, status, b"body")
    whole("A22 204", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", reused=True)
    whole("A22 304 with the length of what it stands for", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, b"", reused=True)
    whole("A22 304 with the coding of what it stands for", b"HTTP/1.1 304 Not Modified\r\n" + CHUNKED + b"\r\n", 304, b"")
    whole("A22 HEAD with a length", head + b"Content-Length: 5\r\n\r\n", 200, b"", "HEAD", reused=True)
    whole("A22 HEAD with a coding", head + CHUNKED + b"\r\n", 200, b"", "HEAD", reused=True)
    whole("A22 HEAD without either", head + b"\r\n", 200, b"", "HEAD")
    for what, start, method in (("204", b"HTTP/1.1 204 No Content\r\n", "GET"), ("304", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 41\r\n", "GET"),
                                ("HEAD", head + b"Content-Length: 41\r\n", "HEAD"), ("HEAD in chunks", head + CHUNKED, "HEAD")):
        status = int(start[9:12])
        # In bytes they would come after the next request, and be its answer.
        whole("A22 %s with a body: it is not sent, and the connection closed" % what, start + b"\r\n" + POISON, status, b"", method, reused=False, in_bytes=False)
    answer = ask("/play/" + script(send(head + b"Content-Length: 12345\r\n\r\n")), "HEAD")
    equal("A22 HEAD: the length is told", "12345", answer.get("content-length"))
    answer = ask("/play/" + script(send(head + CHUNKED + b"\r\n" + chunks(b"hello", trailer=b"X-Sum: 5\r\n"))))
    expect("trailers: none becomes a field", answer.get("x-sum") is None, answer.headers)
    with Client() as client:
        client.send(get(HOST, target=b"/play/" + script(send(head + CHUNKED + b"\r\n" + chunks(b"hello", trailer=b"X-Sum: 5\r\n"))).encode()) + get(HOST, target=b"/play/" + script(send(OK)).encode()))
        client.head()
        equal("trailers: none comes after the last chunk", (b"hello", b"", 200), (client.chunk(), client.chunk(), client.head().status))
    with Client() as client:
        client.send(get(HOST, b"HTTP/1.0", b"/play/" + script(send(head + CHUNKED + b"\r\n" + chunks(b"hello"))).encode()))
        answer = client.response()
        equal("chunks for a client of HTTP/1.0: it gets none", (200, None, b"hello"), (answer.status, answer.get("transfer-encoding"), answer.body))
    whole("32 103, then 200", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK, 200, b"ok", reused=True)
    whole("32 100, then 200", b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok", reused=True)
    whole("32 102, 103, 100, then 404", b"".join(b"HTTP/1.1 %d X\r\nX-Interim: 1\r\n\r\n" % n for n in (102, 103, 100)) + b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nok", 404, b"ok")
    whole("32 twenty of 103, then 204", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 20 + b"HTTP/1.1 204 No\r\n\r\n", 204, b"")
    answer = ask("/play/" + script(send(b"HTTP/1.1 103 Early Hints\r\nX-Interim: 1\r\n\r\n"), ["pause", 0.05], send(OK)))
    equal("32 103, then 200 later: no field of the first is left", (200, None), (answer.status, answer.get("x-interim")))
    for count in (1, 65535, 65536, 65537, 3 * MIB):
        body = random.Random(count).randbytes(count)
        for what, raw, then in (("with a length", b"Content-Length: %d\r\n\r\n" % count + body, ()), ("up to the end", b"\r\n" + body, close),
                                ("in chunks", CHUNKED + b"\r\n" + chunks(*(body[at:at + 50000] for at in range(0, count, 50000))), ())):
            name = script(send(head + raw), *then)
            equal("a response of %d bytes %s, port 80" % (count, what), body, ask("/play/" + name).body)
            equal("a response of %d bytes %s, port 52" % (count, what), body, ALEPH.request("/play/" + name)["body"]["body"])


# ---- Bad answers, group B ---------------------------------------------------------------------

def failing(statuses, steps, method, played):
    """None, or what is wrong with how an answer that is none is told, on both ports."""
    for port in (80, 52):
        key = script(*steps, ["gone"])
        unfold()
        at = os.path.getsize(CONSOLE)
        if port == 80:
            answer = ask("/play/" + key, method)
            reason = answer.body.decode().strip()
            if answer.status not in statuses:
                return "status %d: %.200r" % (answer.status, answer.body)
        else:
            reply = ALEPH.request("/play/" + key, method=method)
            if "error" not in reply or not isinstance(reply.get("traceback"), str):
                return "port 52: %.300r" % reply
            reason = reply["error"].strip()
        if not 8 <= len(reason) <= 300 or "\n" in reason:
            return "port %d: the reason is %.300r" % (port, reason)
        if not console_since(at, re.escape(reason[-60:])):
            return "port %d: %r is not on the console" % (port, reason)
        if plays(key) not in played:
            return "port %d: the program got it %d times" % (port, plays(key))
        if not is_closed(key):
            return "port %d: the program's connection stays" % port
        why = is_right()
        if why:
            return "port %d: %s" % (port, why)
    return None


def bad(name, *steps, statuses=(502,), method="GET", played=(1,)):
    report(name, failing(statuses, steps, method, played))


def bad_bytes(name, raw, *then):
    bad(name, send(raw), *then)


def cut(name, *steps):
    """The head is out when the mistake shows: the response must not look complete."""
    key = script(*steps, ["gone"])
    why = None
    with Client() as client:
        try:
            answer = client.ask("/play/" + key)
            if answer.status != 502:
                why = "looks complete: %d %.100r" % (answer.status, answer.body)
        except (Ended, ConnectionResetError):
            pass
    reply = ALEPH.request("/play/" + key)
    if not why and "error" not in reply:
        why = "looks complete on port 52: %.200r" % reply
    if not why and not is_closed(key):
        why = "the program's connection stays"
    report(name, why or is_right())


def group_heads():
    bad_bytes("27 no status line", b"hello\r\n\r\n")
    for raw in (b"\r\n\r\n", b"\n", b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/1.1 2000 OK\r\n\r\n",
                b"HTTP/1.1 099 OK\r\n\r\n", b"HTTP/1.1 000 OK\r\n\r\n", b"HTTP/1.1 -200 OK\r\n\r\n", b"HTTP/1.1  200 OK\r\n\r\n", b"HTTP/1.1\t200 OK\r\n\r\n",
                b"HTTP/1.1 200\tOK\r\n\r\n", b" HTTP/1.1 200 OK\r\n\r\n", b"http/1.1 200 OK\r\n\r\n", b"ICY 200 OK\r\n\r\n", b"RTSP/1.0 200 OK\r\n\r\n",
                b"HTTP/2.0 200 OK\r\n\r\n", b"HTTP/0.9 200 OK\r\n\r\n", b"HTTP/1.12 200 OK\r\n\r\n", b"HTTP/1.2 200 OK\r\n\r\n", b"HTTP/11 200 OK\r\n\r\n",
                b"HTTP 200 OK\r\n\r\n", b"<html>hello</html>\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x15\x03\x01\x00\x02\x02\x46", b"\0" * 100, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"HTTP/1.1 200 O\0K\r\n\r\n", b"HTTP/1.1 200 O\rK\r\n\r\n"):
        bad_bytes("27 %.40s" % repr(raw.decode("latin-1")), raw, ["close"])
    for what, raw in (("LF after the status line", b"HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nok"), ("LF after a field", b"HTTP/1.1 200 OK\r\nContent-Length: 2\n\r\nok"),
                      ("LF for the empty line", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\nok"), ("LF everywhere", b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"),
                      ("CR in a value", b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 2\r\n\r\nok"), ("NUL in a value", b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\nok"),
                      ("a control byte in a value", b"HTTP/1.1 200 OK\r\nX: a\x01b\r\nContent-Length: 2\r\n\r\nok"), ("DEL in a value", b"HTTP/1.1 200 OK\r\nX: a\x7fb\r\nContent-Length: 2\r\n\r\nok"),
                      ("a space in a name", b"HTTP/1.1 200 OK\r\nX Y: z\r\nContent-Length: 2\r\n\r\nok"), ("a space before the colon", b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok"),
                      ("no colon", b"HTTP/1.1 200 OK\r\nX\r\nContent-Length: 2\r\n\r\nok"), ("no name", b"HTTP/1.1 200 OK\r\n: x\r\nContent-Length: 2\r\n\r\nok"),
                      ("a byte past ASCII in a name", b"HTTP/1.1 200 OK\r\n\xe9: x\r\nContent-Length: 2\r\n\r\nok"), ("a folded value", b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nok"),
                      ("a space before the first field", b"HTTP/1.1 200 OK\r\n X: a\r\nContent-Length: 2\r\n\r\nok")):
        bad_bytes("27 %s" % what, raw)


def group_lengths():
    head = b"HTTP/1.1 200 OK\r\n"
    for value in (b"chunked\t", b"\x0bchunked", b"chunked\x0b", b"chunked \t", b"xchunked", b"chunked, identity", b"gzip, chunked", b"chunked, chunked", b"identity", b"gzip",
                  b"chun\tked", b"chunked;q=1", b"\"chunked\"", b"", b",chunked", b"chunke", b"chunked\0"):
        bad_bytes("28 coding %r" % value.decode("latin-1"), head + b"Transfer-Encoding: " + value + b"\r\n\r\n" + chunks(b"hello") + POISON, ["close"])
    for what, more in (("twice", CHUNKED + CHUNKED), ("and a length", CHUNKED + b"Content-Length: 5\r\n"), ("after a length", b"Content-Length: 5\r\n" + CHUNKED),
                       ("and another", CHUNKED + b"Transfer-Encoding: gzip\r\n"), ("after another", b"Transfer-Encoding: gzip\r\n" + CHUNKED),
                       ("and length 0", CHUNKED + b"Content-Length: 0\r\n")):
        bad_bytes("28 a coding %s" % what, head + more + b"\r\n" + chunks(b"hello") + POISON)
    bad_bytes("28 a coding in HTTP/1.0", b"HTTP/1.0 200 OK\r\n" + CHUNKED + b"\r\n" + chunks(b"hello"), ["close"])
    for what, more in (("the same", b"Content-Length: 5\r\nContent-Length: 5\r\n"), ("not the same", b"Content-Length: 5\r\nContent-Length: 6\r\n"),
                       ("the longer first", b"Content-Length: 50\r\nContent-Length: 5\r\n"), ("far apart", b"Content-Length: 5\r\nX: y\r\ncontent-length: 5\r\n")):
        bad_bytes("29 two lengths, %s" % what, head + more + b"\r\nhello")
    for value in (b"5,5", b"5, 5", b"5 5", b"+5", b"-1", b"0x5", b"5a", b"", b"99999999999999999999", b"18446744073709551621", b"9223372036854775808", b"5;", b"1e1", b"5.0"):
        bad_bytes("29 length %r" % value.decode(), head + b"Content-Length: " + value + b"\r\n\r\nhello")
    bad_bytes("29 a bad length in 304", b"HTTP/1.1 304 Not\r\nContent-Length: +5\r\n\r\n")
    for what, then in (("closed", ["close"]), ("reset", ["reset"])):
        cut("30 length too long, then %s" % what, send(head + b"Content-Length: 100\r\n\r\nhello"), ["pause", 0.05], then)
        cut("30 no byte of those declared, then %s" % what, send(head + b"Content-Length: 100\r\n\r\n"), ["pause", 0.05], then)
        cut("30 chunks without the last, then %s" % what, send(head + CHUNKED + b"\r\n5\r\nhello\r\n"), ["pause", 0.05], then)
        cut("30 a chunk cut short, then %s" % what, send(head + CHUNKED + b"\r\n50\r\nhello"), ["pause", 0.05], then)
        cut("30 the last chunk cut short, then %s" % what, send(head + CHUNKED + b"\r\n5\r\nhello\r\n0\r\n"), ["pause", 0.05], then)
    cut("34 up to the end, but reset", send(head + b"X: y\r\n\r\nhello"), ["pause", 0.05], ["reset"])
    cut("34 reset within a body of HTTP/1.0", send(b"HTTP/1.0 200 OK\r\n\r\nhello"), ["pause", 0.05], ["reset"])
    for what, raw in (("a size that is none", b"zz\r\nhello\r\n0\r\n\r\n"), ("a size of 17 digits", b"10000000000000005\r\nhello\r\n0\r\n\r\n"), ("size -5", b"-5\r\nhello\r\n0\r\n\r\n"),
                      ("size 0x5", b"0x5\r\nhello\r\n0\r\n\r\n"), ("size 5 and a space", b"5 \r\nhello\r\n0\r\n\r\n"), ("no size", b"\r\nhello\r\n0\r\n\r\n"),
                      ("more bytes than its size", b"3\r\nhello\r\n0\r\n\r\n"), ("fewer bytes than its size", b"6\r\nhello\r\n0\r\n\r\n"), ("LF after a size", b"5\nhello\r\n0\r\n\r\n"),
                      ("LF after a chunk", b"5\r\nhello\n0\r\n\r\n"), ("LF after the last", b"5\r\nhello\r\n0\n\r\n"), ("CR in an extension", b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
                      ("a trailer that is none", b"5\r\nhello\r\n0\r\nX\0Y\r\n\r\n")):
        cut("30 in chunks: %s" % what, send(head + CHUNKED + b"\r\n" + raw))
    for what, raw, method, body in (("more bytes than the length", head + b"Content-Length: 5\r\n\r\nhello", "GET", b"hello"), ("more after the last chunk", head + CHUNKED + b"\r\n" + chunks(b"hello"), "GET", b"hello"),
                                    ("more after HEAD", head + b"Content-Length: 5\r\n\r\n", "HEAD", b""), ("more after 204", b"HTTP/1.1 204 No\r\n\r\n", "GET", b""),
                                    ("more after length 0", head + b"Content-Length: 0\r\n\r\n", "GET", b"")):
        for when, steps in (("at once", [send(raw + POISON)]), ("a moment later", [send(raw), ["pause", 0.1], send(POISON)])):
            key, why = script(*steps, ["gone"]), None
            with Client() as client:
                answer = client.ask("/play/" + key, method)
                if answer.body != body:
                    why = "%d %.200r" % (answer.status, answer.body)
                if when != "at once" and not is_closed(key):    # or the next request may be on it before those bytes are
                    why = why or "the program's connection stays"
                for _ in range(3):
                    found = client.ask("/good")
                    if not why and b"GET /good " not in found.body:
                        why = "the next request is answered with %.200r" % found.body
            if not why and not is_closed(key):
                why = "the program's connection stays"
            report("30 %s, %s: nobody gets them, and the connection is closed" % (what, when), why)


def bounded(name, act):
    """What is endless must not be kept."""
    before, most, done = rss_kib(), [0], threading.Event()

    def watch():
        while not done.is_set():
            most[0] = max(most[0], rss_kib())
            time.sleep(0.01)
    watcher = threading.Thread(target=watch)
    watcher.start()
    act()
    done.set()
    watcher.join()
    expect("%s: %d KiB more" % (name, most[0] - before), SANITIZED or most[0] - before <= 1024, "more than 1 MiB")


def group_endless():
    head = b"HTTP/1.1 200 OK\r\n"
    for what, start, more in (("fields", head, b"X: " + b"y" * 80 + b"\r\n"), ("one field", head + b"X: ", b"y" * 100), ("one name", head, b"y" * 100),
                              ("a reason", b"HTTP/1.1 200 ", b"y" * 100), ("white space", head + b"X:", b" " * 100), ("a status line", b"HTTP/1.1 ", b"2" * 100),
                              ("a first line", b"", b"y" * 100), ("empty lines", b"", b"\r\n" * 50), ("interim responses", b"", b"HTTP/1.1 103 Early\r\nX: y\r\n\r\n"),
                              ("fields of an interim response", b"HTTP/1.1 103 Early\r\n", b"X: y\r\n"), ("interim responses without fields", b"", b"HTTP/1.1 100 Continue\r\n\r\n")):
        bounded("31 an endless head: %s: bounded" % what, lambda: bad("31 an endless head: %s" % what, send(start), ["flood", more.hex()]))
    bad_bytes("31 257 fields", head + b"X: y\r\n" * 257 + b"Content-Length: 2\r\n\r\nok")
    bad_bytes("31 a head of 65 KiB", head + b"X: " + b"y" * (65 << 10) + b"\r\nContent-Length: 2\r\n\r\nok")
    whole("31 200 fields are taken", head + b"X: y\r\n" * 200 + b"Content-Length: 2\r\n\r\nok", 200, b"ok")
    name = script(send(head + b"X: " + b"y" * (60 << 10) + b"\r\nContent-Length: 2\r\n\r\nok"))
    equal("31 a head of 60 KiB is taken", b"ok", ask("/play/" + name).body)
    for what, more in (("a chunk's extension", b"5;" + b"a" * 100), ("trailers", b"0\r\n" + b"X: y\r\n" * 10)):
        start, rest = more[:3], more[3:]
        bounded("31 endless %s: bounded" % what, lambda: cut("31 endless %s" % what, send(head + CHUNKED + b"\r\n" + start), ["flood", rest.hex()]))


def group_ends():
    head = b"HTTP/1.1 200 OK\r\n"
    for what, then in (("closed", ["close"]), ("reset", ["reset"])):
        bad("34 %s before the head" % what, then, played=(1, 2))    # a GET may be repeated once
        bad("34 %s before the head, a while later" % what, ["pause", 0.1], then, played=(1, 2))
        bad("34 %s within the status line" % what, send(b"HTTP/1.1 2"), ["pause", 0.05], then)
        bad("34 %s within the head" % what, send(head + b"Content-Le"), ["pause", 0.05], then)
        bad("34 %s before the empty line" % what, send(head + b"Content-Length: 5\r\n"), ["pause", 0.05], then)
        bad("34 %s after an interim response" % what, send(b"HTTP/1.1 103 Early\r\n\r\n"), ["pause", 0.05], then)
        bad("34 POST: %s before the head" % what, then, method="POST")
        bad("34 POST: %s within the head" % what, send(head), ["pause", 0.05], then, method="POST")
        cut("34 %s after the head" % what, send(head + b"Content-Length: 5\r\n\r\n"), ["pause", 0.05], then)
    answer = ask("/play/" + script(["end"], ["gone"]))
    equal("34 the program half-closes without an answer", 502, answer.status)
    switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    bad_bytes("33 101 unasked", switch)
    bad_bytes("33 101 unasked, with a response after it", switch + POISON)
    bad_bytes("33 101 unasked, without fields", b"HTTP/1.1 101 X\r\n\r\n")
    bad("33 101 unasked, for POST", send(switch), method="POST")
    bad_bytes("33 101 unasked, after 103", b"HTTP/1.1 103 Early\r\n\r\n" + switch)
    expect("33 101 for a client of HTTP/1.0 that asks for it", *(lambda a: (a.status == 502, (a.status, a.body)))(tunnel_10(switch)))
    equal("group B: every request that the program got was one", [], state("wrong"))


def tunnel_10(switch):
    with Client() as client:
        client.send(get(HOST + UPGRADE, b"HTTP/1.0", b"/play/" + script(send(switch), ["gone"]).encode()))
        return client.response()


# ---- The pool -----------------------------------------------------------------------------------

def armed(*steps, count=1):
    """Connections in the pool on which the next request is answered so."""
    name = script(send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"), ["held"], ["arm", steps], send(b"ok"))
    clients = [Client() for _ in range(count)]
    for client in clients:
        client.send(get(HOST, target=b"/play/" + name.encode()))
    settled(lambda: plays(name), count)
    side(release=True)
    for client in clients:
        if client.response().body != b"ok":
            raise ValueError("the pool is not as it should be")
        client.sock.close()


def drained():
    """Leaves no connection in the pool that something has been set upon."""
    with contextlib.suppress(Exception):
        for _ in range(3):
            ask("/")


def stale(name, method, steps, expected, sent, body=b"", wait=0.0, count=1):
    """A request that finds its connection in the pool to have ended: its status, and how many
    times the program has seen it in all."""
    armed(*steps, count=count)
    time.sleep(wait)
    key, before = script(["body"], send(OK)), state("armed")
    answer = ask("/play/" + key, method, b"", body)
    found = plays(key) + state("armed") - before
    equal("%s: status, and times that the program saw it" % name, (expected, sent), (answer.status, found))
    if expected == 200 and body:
        equal("%s: the body is whole" % name, [len(body), hashlib.sha256(body).hexdigest()],
              [state("bodies")[key][what] for what in ("bytes", "sha256")])
    drained()


def group_pool():
    before = state("connections")
    with Client() as client:
        for _ in range(100):
            client.ask("/")
    expect("100 requests in turn use one connection (%d new)" % (state("connections") - before), state("connections") - before <= 1)
    before = state("connections")
    for _ in range(20):
        ask("/")
        ALEPH.request("/")
    expect("40 requests of 40 clients, on both ports, use one connection (%d new)" % (state("connections") - before), state("connections") - before <= 1)
    before = state("connections")
    for _ in range(20):
        ask("/", "POST", b"", b"hello")
    expect("20 of POST in quick succession use one connection (%d new)" % (state("connections") - before), state("connections") - before <= 1)
    for what, steps in (("closed", [["close"]]), ("reset", [["reset"]])):
        stale("a stale connection, %s: GET is repeated" % what, "GET", steps, 200, 2)
        stale("a stale connection, %s: DELETE is repeated" % what, "DELETE", steps, 200, 2)
        stale("a stale connection, %s: PUT whose body is not held any more is not repeated" % what, "PUT", steps, 502, 1, b"b" * 1000)
        stale("a stale connection, %s: POST is not repeated" % what, "POST", steps, 502, 1, b"b" * 1000)
        stale("a stale connection, %s: POST without a body is not repeated" % what, "POST", steps, 502, 1)
        stale("a stale connection, %s: PATCH is not repeated" % what, "PATCH", steps, 502, 1, b"b")
        stale("five stale connections, %s: GET is answered" % what, "GET", steps, 200, 2, count=5)
    stale("a stale connection after a second: POST takes a new one", "POST", [["close"]], 200, 1, b"hello", wait=1.2)
    stale("a stale connection that has begun to answer: GET is not repeated", "GET", [send(b"H"), ["pause", 0.05], ["close"]], 502, 1)
    stale("a stale connection that has begun to answer with 103: GET is not repeated", "GET", [send(b"HTTP/1.1 103 X\r\n\r\n"), ["pause", 0.05], ["close"]], 502, 1)
    armed(["close"])
    key = script(["body"], send(OK))
    reply = ALEPH.request("/play/" + key, method="POST", body=b"hello")
    equal("a stale connection: POST on port 52 is not repeated", (True, 0), ("error" in reply, plays(key)))
    drained()
    armed(["close"])
    key = script(["body"], send(OK))
    equal("a stale connection: GET on port 52 is repeated", b"ok", ALEPH.request("/play/" + key)["body"]["body"])
    drained()
    # The program hangs up while the connection is idle: nobody is to notice.
    for what, then in (("closes", ["close"]), ("resets", ["reset"])):
        for method in ("GET", "POST"):
            name = script(send(OK), ["pause", 0.05], then)
            wrong = []
            for _ in range(5):
                ask("/play/" + name)
                time.sleep(0.1)
                answer = ask("/", method, b"", b"hello" if method == "POST" else b"")
                if answer.status != 200:
                    wrong.append((answer.status, answer.body))
            expect("the program %s idle connections: %s is answered" % (what, method), not wrong, wrong)
    together(64)
    before = state("connections")
    together(64)
    new = state("connections") - before
    expect("64 at once, a second time: %d new connections" % new, new <= 64)
    time.sleep(0.2)
    expect("after 64 at once: %d idle connections are kept" % state("open"), state("open") <= 64)
    equal("the pool: every request that the program got was one", [], state("wrong"))


# ---- Bodies of requests ---------------------------------------------------------------------------

def post(target, fields, body=b"", method=b"POST"):
    return method + b" " + target + b" HTTP/1.1\r\n" + HOST + fields + b"\r\n" + body


def took(name):
    return state("bodies").get(name, {}).get("bytes", 0)


def group_bodies():
    for count in (0, 1, 5, 65535, 65536, 65537, 3 * MIB):
        body = random.Random(count).randbytes(count)
        expected = (count, hashlib.sha256(body).hexdigest(), True)
        for what, raw in (("with a length", post(b"/", b"Content-Length: %d\r\n" % count, body)),
                          ("in chunks", post(b"/", CHUNKED, chunks(*(body[at:at + 50000] for at in range(0, count, 50000)))))):
            with Client() as client:
                client.send(raw)
                found = json.loads(client.response().body)["body"]
                equal("a request of %d bytes %s" % (count, what), expected, (found["bytes"], found["sha256"], found["whole"]))
                if what == "with a length":
                    equal("a request of %d bytes %s: has its length" % (count, what), "length", found["framing"])
        found = json.loads(ALEPH.request("/", method="POST", body=body)["body"]["body"])["body"]
        equal("a request of %d bytes on port 52" % count, expected[:2] + ("length" if count else "none",), (found["bytes"], found["sha256"], found["framing"]))
    for method in (b"GET", b"DELETE", b"PUT", b"PATCH", b"OPTIONS"):
        with Client() as client:
            client.send(post(b"/", b"Content-Length: 5\r\n", b"hello", method))
            equal("a body of %s arrives" % method.decode(), 5, json.loads(client.response().body)["body"]["bytes"])
    equal("no body, no length", "none", seen("/", "GET")["body"]["framing"])
    with Client() as client:
        client.send(post(b"/", CHUNKED, chunks(b"hello", extension=b";a=b", trailer=b"X-Sum: 5\r\nHost: x\r\n")))
        found = json.loads(client.response().body)
        equal("trailers of a request are dropped", (5, False), (found["body"]["bytes"], "X-Sum" in found["head"]))
    for what, start, part, end in (("with a length", b"Content-Length: 10\r\n", b"first", b"later"), ("in chunks", CHUNKED, b"5\r\nfirst\r\n", b"5\r\nlater\r\n0\r\n\r\n")):
        name = script(["body"], send(OK))
        with Client() as client:
            client.send(post(b"/play/" + name.encode(), start, part))
            equal("a body %s streams: the first part arrives" % what, 5, settled(lambda: took(name), 5))
            client.send(end)
            equal("a body %s streams: then the rest" % what, (b"ok", 10, True), (client.response().body, took(name), state("bodies")[name]["whole"]))
    with Client() as client:
        for what, framing, body in (("a length", b"Content-Length: 5\r\n", b"hello"), ("chunks", CHUNKED, chunks(b"hello"))):
            name = script(["body"], send(OK))
            client.send(post(b"/play/" + name.encode(), b"Expect: 100-continue\r\n" + framing))
            equal("Expect with %s: 100 comes" % what, 100, client.response().status)
            client.send(body)
            equal("Expect with %s: then the answer" % what, (200, 5), (client.response().status, took(name)))
    # An answer that does not wait for the body is the answer, however the connection ends.
    body = bytes(3 * MIB)
    for what, steps in (("and stays", [["gone"]]), ("and closes", [["pause", 0.1], ["close"]]), ("and resets", [["pause", 0.1], ["reset"]])):
        name = script(send(b"HTTP/1.1 413 Too much\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"), *steps)
        with Client() as client:
            writer = threading.Thread(target=client.send, args=(post(b"/play/" + name.encode(), b"Content-Length: %d\r\n" % len(body), body),))
            writer.start()
            answer = client.response()
            equal("an answer before the body has come, %s" % what, (413, b"no"), (answer.status, answer.body))
            client.sock.shutdown(socket.SHUT_RDWR)
            writer.join()
        expect("an answer before the body has come, %s: the connection is not used again" % what, is_closed(name))
    name = script(send(OK), ["pause", 0.1], ["close"])
    with Client() as client:
        answer = client.ask("/play/" + name, "POST", b"", b"b" * 1000)
        equal("a small body that the program does not read: answered", b"ok", answer.body)
    is_closed(name)
    expect("a small body that the program does not read: the next is answered", is_right() is None)
    equal("bodies: every request that the program got was one", [], state("wrong"))


def group_memory():
    """Bodies of 200 MiB that one side does not take."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (200 * MIB)
    before = rss_kib()
    with Client() as client:
        client.send(get(HOST, target=b"/play/" + script(send(head), send(bytes(MIB), 200)).encode()))
        grown = highest_rss(1) - before
        expect("200 MiB to a client that does not read: %d KiB more" % grown, SANITIZED or grown <= 1024, "more than 1 MiB")
        client.head()
        size, most = 0, 0
        while size < 200 * MIB:
            size += len(client.exactly(min(MIB, 200 * MIB - size)))
            most = max(most, rss_kib())
        expect("200 MiB to a client that reads late: %d KiB more" % (most - before), SANITIZED or most - before <= 1024, "more than 1 MiB")
        equal("200 MiB to a client that reads late: then the next request", b"ok", client.ask("/play/" + script(send(OK))).body)
    with Client() as client:
        client.send(get(HOST, target=b"/play/" + script(send(b"HTTP/1.1 200 OK\r\n\r\n"), send(bytes(MIB), 50), ["close"]).encode()))
        client.head()
        size, part = 0, client.chunk()
        while part:
            size, part = size + len(part), client.chunk()
        equal("50 MiB up to the end of the connection", 50 * MIB, size)
    for what, framing in (("with a length", b"Content-Length: %d\r\n" % (200 * MIB)), ("in chunks", CHUNKED)):
        name = script(["pause", 1.5], ["body"], send(OK))
        before, sent, most = rss_kib(), 0, 0
        piece = bytes(65536) if what == "with a length" else b"10000\r\n" + bytes(65536) + b"\r\n"
        with Client() as client:
            client.sock.settimeout(0.5)
            client.send(post(b"/play/" + name.encode(), framing))
            rest = piece
            with contextlib.suppress(socket.timeout):
                while sent < 200 * MIB:
                    rest = rest[client.sock.send(rest):]
                    if not rest:
                        sent, rest = sent + 65536, piece
            grown = rss_kib() - before
            expect("200 MiB %s to a program that does not read: %d KiB taken" % (what, sent / 1024), sent < 12 * MIB, "too much")
            expect("200 MiB %s to a program that does not read: %d KiB more" % (what, grown), SANITIZED or grown <= 1024, "more than 1 MiB")
            client.sock.settimeout(30)
            while sent < 200 * MIB:
                client.sock.sendall(rest)
                sent, rest = sent + 65536, piece
                most = max(most, rss_kib()) if sent % MIB == 0 else most
            if framing == CHUNKED:
                client.send(b"0\r\n\r\n")
            equal("200 MiB %s to a program that reads late: answered" % what, b"ok", client.response().body)
        equal("200 MiB %s to a program that reads late: all of it" % what, (200 * MIB, True), (took(name), state("bodies")[name]["whole"]))
        expect("200 MiB %s taken: %d KiB more" % (what, most - before), SANITIZED or most - before <= 1024, "more than 1 MiB")


# ---- Clients that leave -------------------------------------------------------------------------------

def left(name, key, act):
    start = time.monotonic()
    act()
    is_closed(key)
    took = state("ends").get(key, start + 99) - start
    expect("%s: the program's connection is closed after %.2f s" % (name, took), took <= (2 if SANITIZED else 1), "later than 1 s")


def group_leaving():
    baseline = descriptors()
    head = b"HTTP/1.1 200 OK\r\n"
    for what, steps, raw in (("while it waits for the head", [["gone"]], b""), ("within a head", [send(head), ["gone"]], b""),
                             ("within a body", [send(head + b"Content-Length: 100\r\n\r\nhello"), ["gone"]], b""), ("within chunks", [send(head + CHUNKED + b"\r\n5\r\nhello\r\n"), ["gone"]], b""),
                             ("within a body up to the end", [send(head + b"\r\nhello"), ["gone"]], b""), ("within its own body", [["body"]], b"POST"),
                             ("within a flood", [send(head + b"\r\n"), ["flood", b"x".hex()]], b"")):
        key = script(*steps)
        client = Client()
        client.send(post(b"/play/" + key.encode(), b"Content-Length: 10\r\n", b"hello") if raw else get(HOST, target=b"/play/" + key.encode()))
        settled(lambda: plays(key), 1)
        if any(b"hello".hex() in str(step) for step in steps):
            client.head()
        time.sleep(0.02)
        left("19 a client leaves %s" % what, key, client.sock.close)
    key = script(["gone"])
    sock = ALEPH.connect()
    sock.sendall(msgpack.packb(Peer.scope("/play/" + key), use_bin_type=True))
    settled(lambda: plays(key), 1)
    left("19 the supervisor leaves while it waits", key, sock.close)
    with Client() as client:
        client.send(get(HOST, target=b"/play/" + script(["pause", 0.2], send(OK)).encode()))
        client.sock.shutdown(socket.SHUT_WR)
        equal("18 a client that half-closes is answered", b"ok", client.response().body)
    for _ in range(50):
        with Client() as client:
            client.send(get(HOST, target=b"/play/" + key.encode()))
    for _ in range(5):
        ask("/")
    settled(lambda: state("open") <= 2, True)
    expect("clients that left: %d connections of the program are open" % state("open"), state("open") <= 2)
    expect("clients that left: no descriptor is left", settled(lambda: descriptors() <= baseline + 1, True), "%d, were %d" % (descriptors(), baseline))


# ---- Tunnels ------------------------------------------------------------------------------------------

UPGRADE = (b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
           b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n")
SWITCH = (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
          b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: chat\r\n\r\n")


def opened(key, early=b"", timeout=30):
    """A client whose connection is a tunnel by now."""
    client = Client(timeout)
    client.send(get(HOST + UPGRADE, target=b"/play/" + key.encode()) + early)
    head = client.until(b"\r\n\r\n") + b"\r\n\r\n"
    if not head.startswith(b"HTTP/1.1 101 "):
        raise ValueError("no tunnel: %r" % head)
    client.head_bytes = head
    return client


def group_tunnel():
    echo = script(send(SWITCH), ["echo"])
    with opened(echo) as client:
        equal("26 101: the fields of the program arrive", sorted(SWITCH.split(b"\r\n")[1:]), sorted(client.head_bytes.split(b"\r\n")[1:]))
        equal("26 101: the fields of the client arrive", sorted((HOST + UPGRADE).decode().split("\r\n")[:-1]), sorted(fields(state("heads")[echo])))
        client.send(b"\x81\x05hello\0\r\n\r\n")
        equal("26 a tunnel: bytes come back", b"\x81\x05hello\0\r\n\r\n", client.exactly(12))
        client.send(get(HOST))
        equal("26 a tunnel: what looks like a request is none", get(HOST), client.exactly(len(get(HOST))))
        data = random.Random(7).randbytes(3 * MIB)
        writer = threading.Thread(target=client.send, args=(data,))
        writer.start()
        equal("26 a tunnel: 3 MiB there and back", hashlib.sha256(data).digest(), hashlib.sha256(client.exactly(len(data))).digest())
        writer.join()
        left("26 the client closes", echo, client.sock.close)
    with opened(script(send(SWITCH + b"at once"), ["echo"]), b"early") as client:
        equal("26 a tunnel: what comes with 101, then what came with the request", b"at onceearly", client.exactly(12))
    for what, then in (("closes", ["close"]), ("resets", ["reset"])):
        with opened(script(send(SWITCH), ["pause", 0.2], then)) as client:
            start = time.monotonic()
            client.rest()
            took = time.monotonic() - start
            expect("26 the program %s: the client is closed after %.2f s" % (what, took), took <= (2.2 if SANITIZED else 1.2), "later than 1 s")
    with opened(script(send(SWITCH), send(b"x" * 1000, 1000), ["close"])) as client:
        equal("26 the program closes: what it sent before arrives", 1000000, len(client.rest()))
    key = script(send(SWITCH), ["echo"])
    with opened(key) as client:
        data = random.Random(8).randbytes(100000)
        client.send(data)
        client.sock.shutdown(socket.SHUT_WR)
        equal("26 the client half-closes: all comes back, then the end", data, client.rest())
    key = script(send(SWITCH), ["end"], ["gone"])
    with opened(key) as client:
        start = time.monotonic()
        client.rest()
        expect("26 the program half-closes: the client is told", time.monotonic() - start <= 1.5, "after %.1f s" % (time.monotonic() - start))
    expect("26 the program half-closes: all is closed in the end", is_closed(key))
    key = script(send(SWITCH), ["gone"])
    client = opened(key)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    left("26 the client resets", key, client.sock.close)
    before = rss_kib()
    with opened(script(send(SWITCH), ["flood", b"x".hex()])) as client:
        grown = highest_rss(1) - before
        expect("26 a tunnel whose client does not read: %d KiB more" % grown, SANITIZED or grown <= 1024, "more than 1 MiB")
    with opened(script(send(SWITCH), ["pause", 2], ["gone"])) as client:
        client.sock.settimeout(0.5)
        sent = 0
        with contextlib.suppress(socket.timeout):
            while sent < 50 * MIB:
                sent += client.sock.send(bytes(65536))
        grown = rss_kib() - before
        expect("26 a tunnel whose program does not read: %d KiB taken, %d KiB more" % (sent / 1024, grown), sent < 12 * MIB and (SANITIZED or grown <= 1024), "too much")
    for what, raw in (("wrong version", b"HTTP/1.1 426 Upgrade Required\r\nSec-WebSocket-Version: 13\r\nContent-Length: 7\r\n\r\nversion"),
                      ("wrong key", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 7\r\n\r\nbad key"), ("not found", b"HTTP/1.1 404 No\r\n" + CHUNKED + b"\r\n" + chunks(b"nothing")),
                      ("plain", b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nno echo")):
        with Client() as client:
            client.send(get(HOST + UPGRADE.replace(b"13", b"12"), target=b"/play/" + script(send(raw)).encode()))
            answer = client.response()
            equal("26 an upgrade that the program does not take (%s): its answer" % what, (int(raw[9:12]), 7), (answer.status, len(answer.body)))
            equal("26 an upgrade that the program does not take (%s): the next request" % what, b"ok", client.ask("/play/" + script(send(OK))).body)
    for what, framing, body in (("a length", b"Content-Length: 5\r\n", b"hello"), ("chunks", CHUNKED, chunks(b"hello"))):
        key = script(send(SWITCH), ["echo"])
        with Client() as client:
            client.send(post(b"/play/" + key.encode(), UPGRADE + framing, body))
            answer = client.response()
            equal("26 an upgrade with %s is refused" % what, (400, "close", 0), (answer.status, answer.get("connection"), plays(key)))
            expect("26 an upgrade with %s: closed" % what, client.is_ended(), "more comes")
    head = seen("/", "GET", b"Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n")["head"]
    equal("26 Upgrade that Connection does not name stays behind", ["Sec-WebSocket-Key: x"], [line for line in fields(head) if "ebs" in line.lower()])
    with Client() as client:
        client.send(get(HOST + UPGRADE, b"HTTP/1.0"))
        answer = client.response()
        equal("26 Upgrade of a client of HTTP/1.0 is ignored", (200, False), (answer.status, "Upgrade: " in json.loads(answer.body)["head"]))
    expect("26 after the tunnels: the next is answered", is_right() is None)
    equal("26 every request that the program got was one", [], state("wrong"))


def group_tunnels():
    """10,000 idle sockets: the two ends of 5,000 tunnels."""
    key, before, kib = script(send(SWITCH), ["echo"]), descriptors(), rss_kib()
    clients = []
    for _ in range(5000):
        clients.append(opened(key))
    expect("26 10,000 idle sockets: all are there", abs(descriptors() - before - 10000) <= 64, "%d, were %d" % (descriptors(), before))
    grown = rss_kib() - kib
    expect("26 10,000 idle sockets: %d KiB" % grown, SANITIZED or grown <= 5000 * 8, "more than 8 KiB a tunnel")
    clients[2500].send(b"hello")
    equal("26 10,000 idle sockets: one of them works", b"hello", clients[2500].exactly(5))
    times = []
    for _ in range(100):
        begin = time.monotonic()
        ask("/play/" + script(send(OK)))
        times.append(time.monotonic() - begin)
    times.sort()
    expect("26 10,000 idle sockets: good requests go on (median %.1f ms)" % (times[50] * 1000), times[50] < (0.2 if SANITIZED else 0.05), times[-5:])
    for client in clients:
        client.sock.close()
    expect("26 10,000 idle sockets: none is left", settled(lambda: descriptors() <= before + 1, True, 20), "%d, were %d" % (descriptors(), before))


# ---- Many, and slow --------------------------------------------------------------------------------------

def together(count, seconds=0.3):
    key = script(["pause", seconds], send(OK))
    clients = [Client() for _ in range(count)]
    for client in clients:
        client.send(get(HOST, target=b"/play/" + key.encode()))
    answers = [client.response().body for client in clients]
    for client in clients:
        client.sock.close()
    return answers


def group_together():
    key = script(send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nsl"), ["pause", 7], send(b"ow"))
    late = script(["pause", 7], send(OK))
    start, replies = time.monotonic(), []
    on_52 = threading.Thread(target=lambda: replies.append(ALEPH.request("/play/" + late)))
    on_52.start()
    with Client() as slow, Client() as silent:
        slow.send(get(HOST, target=b"/play/" + key.encode()))
        silent.send(get(HOST, target=b"/play/" + late.encode()))
        begin = time.monotonic()
        equal("64 at once: all are answered", [b"ok"] * 64, together(64))
        took = time.monotonic() - begin
        expect("64 at once: in %.2f s" % took, took < (4 if SANITIZED else 1.5), "one after the other")
        wrong = []

        def hammer(number):
            try:
                with Client() as client:
                    for turn in range(20):
                        body = b"%d" % number * (turn * 97 % 1000 + 1)
                        found = json.loads(client.ask("/%d/%d" % (number, turn), "POST", b"", body).body)
                        if not found["head"].startswith("POST /%d/%d " % (number, turn)) or found["body"]["sha256"] != hashlib.sha256(body).hexdigest():
                            wrong.append(found)
            except Exception as exc:
                wrong.append(repr(exc))
        threads = [threading.Thread(target=hammer, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expect("64 clients with 20 requests each: every answer is that of its request", not wrong, wrong[:2])
        equal("a 7 s response is not cut, port 80", b"slow", slow.response().body)
        equal("a response that begins after 7 s, port 80", b"ok", silent.response().body)
    on_52.join()
    equal("a response that begins after 7 s, port 52", b"ok", replies[0].get("body", {}).get("body"))
    expect("the 7 s responses took 7 s", 7 <= time.monotonic() - start < 12)


def group_events():
    for body in ("{\"a\": 1}", "", "text: é", "x" * MIB):
        reply = ALEPH.event(body)
        found = json.loads(reply["body"]["body"] if isinstance(reply["body"], dict) else reply["body"])
        head = found["head"]
        equal("an event of %d characters is POST / with its field" % len(body), ("POST / HTTP/1.1", 1, hashlib.sha256(body.encode()).hexdigest()),
              (head.partition("\r\n")[0], head.lower().count("\r\naleph-event: aleph.message\r\n"), found["body"]["sha256"]))


def group_times():
    """Under response_head_ms=1500 head_ms=800 body_ms=700 idle_ms=900 send_ms=1000."""
    def is_504(name, *steps):
        key = script(*steps)
        answer = timed(name, 1.5, 1.9, lambda: ask("/play/" + key))
        expect("%s: 504 with a reason" % name, answer.status == 504 and b"1500 ms" in answer.body, (answer.status, answer.body))
        expect("%s: the program's connection is closed" % name, is_closed(key))
        expect("%s: the next is answered" % name, is_right() is None)
    is_504("35 never answers", ["gone"])
    is_504("35 a head that stops", send(b"HTTP/1.1 200 OK\r\nX: "), ["gone"])
    is_504("31 a head byte by byte", send(b"HTTP/1.1 200 OK\r\nX: "), ["drip", (b"y" * 200).hex(), 0.05])
    is_504("31 an interim response every 50 ms", *[step for _ in range(60) for step in (send(b"HTTP/1.1 103 X\r\n\r\n"), ["pause", 0.05])])
    reply = timed("35 never answers, port 52", 1.5, 1.9, lambda: ALEPH.request("/play/" + script(["gone"])))
    expect("35 never answers, port 52: told", "1500 ms" in reply.get("error", ""), reply)
    answer = ask("/play/" + script(["pause", 1.2], send(OK)))
    equal("a program that answers in time is waited for", b"ok", answer.body)
    answer = ask("/play/" + script(send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nsl"), ["pause", 2], send(b"ow")))
    equal("silence within a body is no fault", b"slow", answer.body)
    key = script(send(SWITCH), ["echo"])
    with opened(key) as client:
        time.sleep(2)
        client.send(b"still there")
        equal("26 a tunnel may be silent", b"still there", client.exactly(11))
    key = script(send(b"HTTP/1.1 200 OK\r\n\r\n"), ["flood", b"x".hex()])
    with Client() as client:
        client.send(get(HOST, target=b"/play/" + key.encode()))
        at = os.path.getsize(CONSOLE)
        expect("a client that does not read: closed", console_since(at, "read nothing for 1000 ms"), "not on the console")
        expect("a client that does not read: the program's connection, too", is_closed(key, 2))
    key = script(["pause", 2], ["body"], send(OK))
    with Client() as client:
        client.send(post(b"/play/" + key.encode(), b"Content-Length: %d\r\n" % (20 * MIB)))
        writer = threading.Thread(target=client.send, args=(bytes(20 * MIB),))
        writer.start()
        answer = client.response()
        writer.join()
        expect("a program that is slow to read a body is waited for, or named", answer.status in (200, 504), (answer.status, answer.body))


if __name__ == "__main__":
    main()

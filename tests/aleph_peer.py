"""Bad and good input on the supervisor's wire, one function per item of the list of bad inputs.

    aleph_peer.py SOCKET ITEM...    an item is a function's name below

Prints `ok NAME` or `FAIL NAME: why` for each case. What must hold after each item (alive, the
next good request, memory) is the calling script's to check."""
import base64
import hashlib
import io
import json
import os
import random
import select
import socket
import sys
import threading
import time
import zipfile
from urllib.parse import quote

import msgpack

from peer import Peer, zipped

FOLDER = os.path.dirname(os.path.abspath(__file__))
HEAD_S = 1.5                        # the script sets head_ms and silent_ms to these
SILENT_S = 6
WRONG_TYPES = {"int": 5, "float": 1.5, "bool": True, "list": [1], "map": {"a": 1},
               "ext": msgpack.ExtType(5, b"five"), "timestamp": msgpack.Timestamp(1, 2)}

PROGRAM = '''
import echo

requests = 0


async def header(scope, receive, send, name, value):
    await echo.start(send, 200, [(bytes.fromhex(name), bytes.fromhex(value))])
    await send({"type": "http.response.body", "body": b"header"})


async def fields(scope, receive, send, count):
    await echo.start(send, 200, [(b"x-%d" % i, b"v") for i in range(int(count))])
    await send({"type": "http.response.body", "body": b"fields"})


async def count(scope, receive, send):
    await echo.answer(send, {"requests": requests})


echo.routes.update(header=header, fields=fields, count=count)


async def app(scope, receive, send):
    global requests
    if scope["type"] == "http" and scope["path"] != "/count":
        requests += 1
    await echo.app(scope, receive, send)
'''


def packed(value):
    return msgpack.packb(value, use_bin_type=True)


def unpacked(answer):
    return msgpack.unpackb(answer, raw=False)


def case(name, ok, why=""):
    if ok:
        print("ok " + name)
    else:
        print("FAIL %s: %s" % (name, " ".join(str(why).split())[:600]))


def equal(name, expected, actual):
    case(name, expected == actual, "expected %r, got %r" % (expected, actual))


def program_code(before=""):
    with open(os.path.join(FOLDER, "apps/echo/main.py")) as file:
        return zipped({"main.py": before + PROGRAM, "echo.py": file.read()})


# ---- Refusals -------------------------------------------------------------------------

def refusal(answer):
    """What an answer refuses with, or None: exactly the keys of one of the two error maps."""
    try:
        value = unpacked(answer)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    if set(value) == {"success", "error", "traceback"} and value["success"] is False:
        pass
    elif set(value) != {"error", "traceback", "output"} or value["output"] is not None:
        return None
    texts = value["error"], value["traceback"]
    return value["error"] if all(isinstance(text, str) and text for text in texts) else None


def refused(name, reason, answer):
    """The answer is an error map whose text holds the reason."""
    why = refusal(answer) if answer else None
    case(name, why is not None and reason in why, "not %r but %r" % (reason, answer[:300]))


def send_conf(peer, values):
    return peer.raw(peer.frame(values))


def conf_refused(peer, name, reason, **others):
    refused(name, reason, send_conf(peer, Peer.configuration(b"", **others)))


def talk(peer, data, end=False, close=False, seconds=20):
    """Sends what it can, then half-closes or closes, and returns what comes back."""
    with peer.connect() as s:
        s.settimeout(seconds)
        try:
            s.sendall(data)
            if end:
                s.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass                    # refused before all was sent
        return b"" if close else peer.read_all(s)


# ---- C. Configuration -----------------------------------------------------------------

def item36(peer):
    conf = packed(Peer.configuration())
    size = b"%d" % len(conf)
    for name, data, reason in (
            ("empty length", b"\n" + conf, "0x0a, begins no instruction"),
            ("length -1", b"-1\n" + conf, "0x2d, begins no instruction"),
            ("length +5", b"+5\n" + conf, "0x2b, begins no instruction"),
            ("space before the length", b" " + size + b"\n" + conf, "0x20, begins no instruction"),
            ("a NUL first", b"\0" + size + b"\n" + conf, "0x00, begins no instruction"),
            ("length 1e9", b"1e9\n" + conf, "no decimal number"),
            ("length 0x10", b"0x10\n" + conf, "no decimal number"),
            ("length 1.5", b"1.5\n" + conf, "no decimal number"),
            ("space after the length", size + b" \n" + conf, "no decimal number"),
            ("carriage return after the length", size + b"\r\n" + conf, "no decimal number"),
            ("NUL after the length", size + b"\0\n" + conf, "no decimal number"),
            ("NUL instead of the newline", size + b"\0" + conf, "no decimal number"),
            ("no newline, the map follows", size + conf, "no decimal number"),
            ("10 digits", b"1234567890\n" + conf, "no decimal number of at most 9 digits"),
            ("10 digits, no newline", b"1234567890", "no decimal number of at most 9 digits"),
            ("20 digits", b"18446744073709551616\n", "no decimal number of at most 9 digits"),
            ("1,000 digits", b"1" * 1000, "no decimal number of at most 9 digits"),
            ("length 0", b"0\n" + conf, "no decimal number"),
            ("a length past the limit", b"33554433\n" + conf, "33554433 bytes, at most 33554432"),
            ("the largest length", b"999999999\n" + conf, "999999999 bytes, at most 33554432")):
        refused("36: " + name, reason, talk(peer, data))
    refused("36: end of stream inside the length", "ended within the length", talk(peer, b"12", end=True))
    refused("36: silence inside the length", "stalled", talk(peer, b"12"))
    equal("36: nothing at all, then the end", b"", talk(peer, b"", end=True))


def item37(peer):
    conf = packed(Peer.configuration())
    n = len(conf)
    refused("37: length larger than the map", "ends before its announced length",
            talk(peer, b"%d\n" % (n + 10) + conf))
    refused("37: length larger than the data, end of stream", "ended after %d of" % (n - 10),
            talk(peer, b"%d\n" % n + conf[:-10], end=True))
    refused("37: length larger than the data, silence", "stalled", talk(peer, b"%d\n" % n + conf[:-10]))
    refused("37: length smaller than the map", "larger than the limit", talk(peer, b"%d\n" % 20 + conf))
    refused("37: length one smaller than the map", "", talk(peer, b"%d\n" % (n - 1) + conf))
    refused("37: bytes after the announced length", "1 bytes after its announced length",
            talk(peer, b"%d\n" % n + conf + b"x"))
    refused("37: a value that claims more than the length", "larger than the limit",
            talk(peer, b"8\n" + b"\x81\xa1a\xda\xff\xff__"))
    for cut in (1, n // 2, n - 1):
        equal("37: the peer closes after %s" % ("1 byte", "half", "all but 1 byte")[(cut > 1) + (cut > n // 2)],
              b"", talk(peer, b"%d\n" % n + conf[:cut], close=True))


HUGE = {"array32": b"\xdd\xff\xff\xff\xff", "map32": b"\xdf\xff\xff\xff\xff", "bin32": b"\xc6\xff\xff\xff\xff",
        "str32": b"\xdb\xff\xff\xff\xff", "ext32": b"\xc9\xff\xff\xff\xff\x01"}


def item38(peer):
    for name, claim in HUGE.items():
        claim = claim.ljust(6, b"\0")
        refused("38: a configuration of 6 bytes, %s of 4 GiB" % name, "larger than the limit",
                talk(peer, b"6\n" + claim))
        refused("38: %s of 4 GiB in an announced 32 MiB" % name, "larger than the limit",
                talk(peer, b"33554432\n" + claim))
        refused("38: %s of 4 GiB as the value of a key" % name, "larger than the limit",
                talk(peer, b"13\n" + b"\x81\xa4code" + claim))
        refused("38: an instruction with %s of 4 GiB" % name, "larger than the limit",
                talk(peer, b"\x81\xa5scope" + claim))
        refused("38: a scope with %s of 4 GiB" % name, "larger than the limit",
                talk(peer, b"\x81\xa5scope\x81\xa4body" + claim))
    refused("38: an instruction that is a map32 of 4 GiB", "larger than the limit", talk(peer, HUGE["map32"]))
    refused("38: lists of 2 GiB in lists, one after the other", "",
            talk(peer, b"\x81\xa5scope" + b"\xdd\x00\x80\x00\x00" * 40, end=True))


def item39(peer):
    lists = b"\x91" * 100000 + b"\xc0"
    maps = b"\x81\xc0" * 100000 + b"\xc0"
    keys = b"\x81" * 100000
    for name, value in ("lists", lists), ("maps", maps):
        conf = b"\x81\xa4code" + value
        refused("39: a configuration with 100,000 nested " + name, "nested too deep",
                talk(peer, b"%d\n" % len(conf) + conf))
        refused("39: an instruction with 100,000 nested " + name, "nested too deep",
                talk(peer, b"\x81\xa5scope" + value))
    refused("39: 100,000 maps as each other's keys", "nested too deep", talk(peer, keys))
    for depth, reason in (63, "entrypoint: missing"), (64, "nested too deep"):
        conf = b"\x81\xa1x" + b"\x91" * depth + b"\xc0"
        refused("39: a value %d deep in the map" % depth, reason, talk(peer, b"%d\n" % len(conf) + conf))


def without(values, key):
    return {k: v for k, v in values.items() if k != key}


def doubled(values, key):
    """The map with one of its keys twice: Python's dict holds none, so by hand."""
    pairs = [packed(k) + packed(v) for k, v in values.items()]
    pairs.append(packed(key) + packed(values[key]))
    return b"\xde" + len(pairs).to_bytes(2, "big") + b"".join(pairs)


def item40(peer):
    good = Peer.configuration(b"PK", entrypoint="nope", encoding="zip")
    for key in "entrypoint", "encoding", "code":
        refused("40: no key %s" % key, "%s: missing" % key, send_conf(peer, without(good, key)))
        refused("40: %s is nil" % key, "%s: missing" % key, send_conf(peer, dict(good, **{key: None})))
    refused("40: an empty map", "entrypoint: missing", send_conf(peer, {}))
    for key in good:
        refused("40: %s twice" % key, "%s: stands twice" % key, send_conf(peer, doubled(good, key)))
        right = {"dns_servers": "list", "authorized_keys": "list", "volumes": "list", "variables": "map"}
        for name, value in WRONG_TYPES.items():
            if right.get(key) != name:
                refused("40: %s of type %s" % (key, name), "%s: expected" % key,
                        send_conf(peer, dict(good, **{key: value})))
    for key in "interface", "vm_hash", "encoding", "entrypoint", "ip", "route", "ipv6", "ipv6_gateway":
        refused("40: %s as bytes" % key, "%s: expected a string" % key,
                send_conf(peer, dict(good, **{key: b"bytes"})))
        bad = packed(dict(good, **{key: "~~bad~~"})).replace(b"~~bad~~", b"\xff\xfebad\xc0\x80")
        refused("40: %s that is not UTF-8" % key, "%s: not UTF-8" % key, talk(peer, peer.frame(bad)))
        refused("40: %s with a NUL" % key, "%s: holds a NUL" % key, send_conf(peer, dict(good, **{key: "a\0b"})))
    for name, reason, value in (
            ("dns_servers of numbers", "dns_servers[1]: expected a string", {"dns_servers": ["1.1.1.1", 5]}),
            ("authorized_keys of bytes", "authorized_keys[0]: expected", {"authorized_keys": [b"key"]}),
            ("a variable's name of bytes", "variables: a name: expected", {"variables": {b"A": "b"}}),
            ("a variable's value of bytes", "variables: A: expected", {"variables": {"A": b"b"}}),
            ("a volume that is no map", "volumes[0]: expected a map", {"volumes": ["vdb"]}),
            ("a volume without a device", "volumes[0]: needs mount and device", {"volumes": [{"mount": "/x"}]}),
            ("a volume's mount of type int", "volumes[0].mount: expected", {"volumes": [{"mount": 1}]}),
            ("read_only as text", "volumes[0].read_only: expected a bool",
             {"volumes": [{"mount": "/x", "device": "vdb", "read_only": "yes"}]}),
            ("65 volumes", "volumes: 65 of them", {"volumes": [{}] * 65}),
            ("65 keys", "authorized_keys: 65 entries", {"authorized_keys": ["k"] * 65})):
        refused("40: " + name, reason, send_conf(peer, dict(good, **value)))
    for name, key in (("int", 5), ("bytes", b"code"), ("nil", None), ("bool", True), ("float", 1.5),
                      ("ext", msgpack.ExtType(1, b"e")), ("list", (1, 2))):
        refused("40: a key of type %s" % name, "a key is not a string", send_conf(peer, {key: 1}))
    conf = packed(good)
    refused("40: a byte after the map", "ends before its announced length", talk(peer, peer.frame(conf + b"\xc0")))
    refused("40: not a map", "expected a map", send_conf(peer, [1, 2]))
    refused("40: the byte that msgpack never uses", "0xc1", talk(peer, b"4\n\x81\xa1a\xc1"))
    for name, value in WRONG_TYPES.items():
        refused("40: an unknown key of type %s is ignored" % name, "entrypoint: \"nope\" is not module",
                send_conf(peer, dict(good, **{"unknown_" + name: value})))
    for name, reason, value in (
            ("interface", "\"wsgi\" is not asgi or executable", {"interface": "wsgi"}),
            ("encoding", "\"tar\" is not plain, zip or squashfs", {"encoding": "tar"}),
            ("plain code that is not UTF-8", "code: not UTF-8", {"encoding": "plain", "code": b"\xff"}),
            ("plain code with a NUL", "code: not UTF-8 text", {"encoding": "plain", "code": b"a\0b"}),
            ("a zip that is none", "", {"entrypoint": "main:app"})):
        refused("40: %s of no meaning" % name, reason, send_conf(peer, dict(good, **value)))
    for entry in ("", "mod", "mod:", ":app", "a:b:c", ":", "m" * 513 + ":a"):
        refused("40: entrypoint %.20r" % entry, "entrypoint: ", send_conf(peer, dict(good, entrypoint=entry)))


def item41(peer):
    for name, value in (("of 63 digits", "a" * 63), ("of 1 digit", "a"), ("of 80 digits", "a" * 80),
                        ("of 1,000 digits", "a" * 1000), ("that climbs", "../../../../etc/passwd"),
                        ("with a slash", "ab/c"), ("with a dot", "..cafe.."), ("with a space", "cafe cafe"),
                        ("with a newline", "cafe\ncafe\n"), ("with an accent", "caf\u00e9\u00e9a")):
        conf_refused(peer, "41: vm_hash " + name, "vm_hash: expected an even number of hex digits", vm_hash=value)


def item42(peer):
    for name, reason, value in (
            ("a name with =", "\"A=B\" is empty or holds '='", {"A=B": "c"}),
            ("a name that is =", "\"=\" is empty or holds '='", {"=": "c"}),
            ("an empty name", "\"\" is empty or holds '='", {"": "c"}),
            ("a name with a NUL", "variables: a name: holds a NUL", {"A\0B": "c"}),
            ("a value with a NUL", "variables: A: holds a NUL", {"A": "b\0c"}),
            ("1,025 variables", "variables: 1025 of them, at most 1024", {"V%d" % i: "" for i in range(1025)})):
        conf_refused(peer, "42: " + name, reason, variables=value)


def item43(peer):
    bad_ip = ("10.0.0", "10.0.0.256", "10.0.0.1.2", "01.2.3.4x", "::1", "", "ten", "10.0.0.1/33", "10.0.0.1/",
              "10.0.0.1/-1", "10.0.0.1/255.255.255.0", "10.0.0.1/24/24", "10.0.0.1 ", "1" * 200)
    for value in bad_ip:
        conf_refused(peer, "43: ip %.30r" % value, "ip: \"", ip=value)
    for value in ("10.0.0", "10.0.0.1/24", "fe80::1", "", "gateway"):
        conf_refused(peer, "43: route %r" % value, "route: \"", route=value)
    for value in ("10.0.0.1", "fe80::1::2", "fe80::1/129", "fe80::1/", "", "fe80::1%eth0", "g::1"):
        conf_refused(peer, "43: ipv6 %r" % value, "ipv6: \"", ipv6=value)
    for value in ("10.0.0.1", "fe80::1/64", "", "fe80:::1"):
        conf_refused(peer, "43: ipv6_gateway %r" % value, "ipv6_gateway: \"", ipv6_gateway=value)
    for value in ("", "dns", "1.1.1.1/32", "1.1.1.1\nnameserver 6.6.6.6", "1.1.1.1 ", "2001:db8::1/64", "256.1.1.1"):
        conf_refused(peer, "43: name server %r" % value, "dns_servers[1]: \"", dns_servers=["9.9.9.9", value])
    conf_refused(peer, "43: 100 name servers", "dns_servers: 100 entries, at most", dns_servers=["9.9.9.9"] * 100)


UNDONE = """
import os, socket
applied = {"hostname": socket.gethostname(), "resolver": "192.0.2.53" in open("/etc/resolv.conf").read(),
           "ip": "192.0.2.7" in open("/proc/net/fib_trie").read(), "data": os.listdir("/data")}
raise ValueError("fails on purpose: %s" % applied)
"""


def undone(peer):
    """All is applied, as the program sees; then it fails. The script looks whether all is undone."""
    answer = send_conf(peer, Peer.configuration(
        zipped({"undone_marker.py": UNDONE}), "undone_marker:app", vm_hash="beef" * 16,
        ip="192.0.2.7/25", route="192.0.2.1", dns_servers=["192.0.2.53"], ipv6="2001:db8::7/64", ipv6_gateway="2001:db8::1",
        input_data=zipped({"undone_data": "x"})))
    hostname = base64.b32encode(bytes.fromhex("beef" * 16)).decode().rstrip("=").lower()
    applied = {"hostname": hostname, "resolver": True, "ip": True, "data": ["undone_data"]}
    refused("43: a program that does not start", "fails on purpose: %s" % applied, answer)


def same_size(peer):
    """Two failures from sources of one name, size and time: the second is not the first's byte code."""
    for word in "one", "two":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr(zipfile.ZipInfo("same_size.py"), "raise ValueError('number %s')" % word)
        refused("a failed program of the same size and time: number %s" % word, "number " + word,
                send_conf(peer, Peer.configuration(out.getvalue(), "same_size:app")))


def hangups(peer):
    """A host that hangs up after each byte of a configuration; the whole one gets its failure."""
    frame = peer.frame({"entrypoint": "gone:app", "encoding": "zip", "code": zipped({"a.py": "1"})})
    for n in range(len(frame)):
        talk(peer, frame[:n], close=True)
    for n in range(0, len(frame), 7):
        talk(peer, frame[:n], end=True)
    case("a host hangs up after each of %d bytes of a configuration" % len(frame), True)
    talk(peer, frame, close=True)
    time.sleep(0.1)
    answer = b""
    for _ in range(100):            # the one that nobody waits for may still be applied
        answer = talk(peer, frame)
        if "another configuration" not in (refusal(answer) or ""):
            break
        time.sleep(0.1)
    refused("then a whole one fails as it should", "gone", answer)


def split_conf(peer):
    """A configuration that is refused late, cut in two at each byte, and byte by byte."""
    frame = peer.frame({"entrypoint": "late", "encoding": "plain", "code": b"app = 1", "variables": {"A": "b"},
                        "ip": "192.0.2.300", "x": [1.5, None, {"y": True}]})
    whole = talk(peer, frame)
    refused("45: the configuration to be split", "ip: \"192.0.2.300\"", whole)
    split_everywhere(peer, "a configuration", frame, whole)


def item_not_configured(peer):
    refused("an instruction before the configuration", "no program is configured yet",
            talk(peer, packed(Peer.scope())))
    refused("an event before the configuration", "no program is configured yet",
            talk(peer, packed({"scope": {"type": "aleph.message", "body": "x"}})))
    for first in range(256):
        byte = bytes([first])
        if byte in b"0123456789!h" or first in range(0x80, 0x90) or first in (0xde, 0xdf):
            continue
        answer = talk(peer, byte * 3)
        if refusal(answer) is None or "begins no instruction" not in refusal(answer):
            return refused("first byte 0x%02x" % first, "begins no instruction", answer)
    case("each first byte that begins no instruction is refused", True)


def item47_errors(peer):
    for text, reason in ((b"HALT", "0x48, begins no instruction"), (b"HALT\n", "0x48"), (b"Halt", "0x48"),
                         (b"hal\n", "\"hal\" is no instruction"), (b"hall", "\"hall\" is no instruction"),
                         (b"help", "is no instruction"), (b"hello\n", "is no instruction"),
                         (b"h\0lt", "is no instruction"), (b"hal t\n", "is no instruction"),
                         (b"haltx\n", "\"haltx\" is no instruction"), (b"h" * 5000, "is no instruction")):
        refused("47: %r" % text[:10], reason, talk(peer, text))
    refused("47: hal and the end of the stream", "\"hal\" is no instruction", talk(peer, b"hal", end=True))
    refused("47: hal and silence", "\"hal\" is no instruction", talk(peer, b"hal"))
    refused("47: h and silence", "\"h\" is no instruction", talk(peer, b"h"))


def halts(name, *pieces):
    def run(peer):
        with peer.connect() as s:
            for piece in pieces:
                try:
                    s.sendall(piece)
                except BrokenPipeError:
                    pass            # what follows the fourth byte may come too late
                time.sleep(0.05)
            equal("47: halt as " + name, b"STOP\nSTOPZ\n", peer.read_all(s))
    return run


halt_split = halts("ha and lt", b"ha", b"lt")
halt_bytes = halts("four bytes and a newline", b"h", b"a", b"l", b"t", b"\n")
halt_line = halts("a line", b"halt\n")
halt_plain = halts("one word", b"halt")


def threat1(peer):
    """Whatever bytes come: an answer or none, never a death. The seed is fixed."""
    rng = random.Random(52)
    starts = [peer.frame(Peer.configuration(b"x" * 50, entrypoint="bad")), packed(Peer.scope("/count")),
              packed({"scope": {"type": "aleph.message", "body": "hello"}})]
    wrong = None
    for n in range(600):
        data = bytearray(starts[n % 3])
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 2:
                del data[at:at + rng.randint(1, 8)]
            else:
                data[at:at] = bytes(rng.choice(b"\x00\xc0\xc1\xdf\xdd\xc6\xff\x80\x90") for _ in range(rng.randint(1, 4)))
            data = data or bytearray(b"\0")
        if data[:1] in b"!h":
            continue
        answer = talk(peer, bytes(data), end=True)
        try:
            ok = isinstance(unpacked(answer), dict)
        except ValueError:
            ok = False
        if not ok and wrong is None:
            wrong = "%r got %r" % (bytes(data), answer[:100])
    case("T1: 600 mutilated instructions each get one map", wrong is None, wrong)


def silent(peer, count=10000):
    """Connections that say nothing, while others work; each is told what it did not do."""
    start = time.monotonic()
    open_ones = [peer.connect() for _ in range(count)]
    answer = Peer(peer.address, timeout=10).raw(b"!echo between\n")
    equal("%d silent connections: a command runs between them" % count, b"between\n", answer)
    told, closed = 0, 0
    poll = select.epoll()
    by_fd = {s.fileno(): s for s in open_ones}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    while by_fd and time.monotonic() - start < SILENT_S + 30:
        for fd, _ in poll.poll(1):
            s = by_fd.pop(fd)
            poll.unregister(fd)
            answer = b""
            try:
                answer = peer.read_all(s)
            except OSError:
                pass
            told += "no byte within" in (refusal(answer) or "") if answer else 0
            closed += 1
            s.close()
    equal("%d silent connections are closed" % count, count, closed)
    equal("%d silent connections are told why" % count, count, told)


def crowd(peer):
    """As many connections as the limit allows, then one more. The script sets the limit to 32;
    this port has 64 places of its own."""
    open_ones = [peer.connect() for _ in range(32 + 64)]
    time.sleep(0.1)
    for name, data in ("a request", packed(Peer.scope())), ("a configuration", b"5"), ("a command", b"!echo hello\n"):
        refused("one connection more than the limit: " + name, "too many connections", talk(peer, data))
    for s in open_ones:
        s.close()
    for _ in range(100):
        answer = talk(peer, b"!echo hello\n")
        if answer == b"hello\n":
            break
        time.sleep(0.02)
    equal("and then there is room again", b"hello\n", answer)


# ---- The good configuration, and the second ---------------------------------------------

def configure(peer):
    """Cut into pieces, with LD_PRELOAD; at once another, while it is applied."""
    values = Peer.configuration(program_code("import time; time.sleep(0.7)\n"), variables={"LD_PRELOAD": "libm.so.6", "GREETING": "gr\u00fc\u00df=x"})
    frame = peer.frame(values)
    with peer.connect() as s:
        for piece in frame[:1], frame[1:3], frame[3:1000], frame[1000:]:
            s.sendall(piece)
            time.sleep(0.01)
        refused("44: a second configuration while the first is applied", "another configuration is being applied",
                send_conf(peer, values))
        equal("40: good after bad: the reply is exactly success", packed({"success": True}), peer.read_all(s))
    env = body_json(peer.request("/env"))
    equal("42: LD_PRELOAD reaches the program", "libm.so.6", env.get("LD_PRELOAD"))
    equal("42: a value with = and letters reaches the program", "gr\u00fc\u00df=x", env.get("GREETING"))


def item44(peer):
    for name, values in (("the same", Peer.configuration(program_code())), ("another", Peer.configuration(b"", "x:y")),
                         ("an empty", {})):
        refused("44: %s configuration again" % name, "configured already", send_conf(peer, values))
    refused("44: only a length again", "configured already", talk(peer, b"5"))


# ---- D. Instructions ------------------------------------------------------------------

def body_json(answer):
    if "body" not in answer:
        raise AssertionError("no body but %r" % answer)
    return json.loads(answer["body"]["body"])


def shape_ok(answer):
    """The reply as the supervisor reads it."""
    return (set(answer) == {"headers", "body", "output", "output_data"}
            and set(answer["headers"]) == {"type", "status", "headers"}
            and answer["headers"]["type"] == "http.response.start"
            and set(answer["body"]) == {"type", "body"} and answer["body"]["type"] == "http.response.body"
            and isinstance(answer["headers"]["status"], int) and isinstance(answer["body"]["body"], bytes)
            and isinstance(answer["output"], str)
            and (answer["output_data"] is None or isinstance(answer["output_data"], bytes))
            and all(isinstance(part, bytes) and part.decode() is not None
                    for pair in answer["headers"]["headers"] for part in pair))


def split_everywhere(peer, name, data, expected):
    wrong = None
    for cut in range(1, len(data)):
        with peer.connect() as s:
            s.sendall(data[:cut])
            time.sleep(0.0005)
            s.sendall(data[cut:])
            answer = peer.read_all(s)
        if answer != expected and wrong is None:
            wrong = "cut at %d: %r instead of %r" % (cut, answer[:200], expected[:200])
    case("45: %s of %d bytes split at every byte" % (name, len(data)), wrong is None, wrong)
    with peer.connect() as s:
        for at in range(len(data)):
            s.sendall(data[at:at + 1])
            if at % 8 == 0:
                time.sleep(0.0005)
        equal("45: %s one byte at a time" % name, expected, peer.read_all(s))


def item45(peer):
    for name, value in (("a request", Peer.scope("/a b", method="POST", query="c=d", headers=[(b"x-y", b"z")], body=b"body")),
                        ("an event", {"scope": {"type": "aleph.message", "body": "event"}})):
        data = packed(value)
        split_everywhere(peer, name, data, talk(peer, data))


def item46(peer):
    most = 16 << 20
    body = os.urandom(1 << 20) * 16
    answer = body_json(peer.request("/", method="POST", body=body))
    equal("46: a body of 16 MiB arrives", (most, hashlib.sha256(body).hexdigest()),
          (answer["body_bytes"], answer["body_sha256"]))
    refused("46: a body of 16 MiB and a byte", "larger than the limit",
            peer.raw(packed(Peer.scope("/", method="POST", body=body + b"x"))))
    refused("46: a body of 64 MiB is refused at its head", "larger than the limit",
            talk(peer, packed(Peer.scope("/", method="POST", body=body * 4))))
    body = b"x" * (3 << 20)
    answer = body_json(peer.request("/", method="PUT", body=body))
    equal("a body of 3 MiB arrives", hashlib.sha256(body).hexdigest(), answer["body_sha256"])
    refused("a path of 16 KiB and a byte", "too long", peer.raw(packed(Peer.scope("/" + "p" * (16 << 10)))))


def item49(peer):
    good = Peer.scope("/", headers=[(b"a", b"b")])["scope"]
    before = body_json(peer.request("/count"))["requests"]

    def bad(name, reason, scope):
        refused("49: " + name, reason, peer.raw(packed({"scope": scope})))

    for key in good:
        bad("no " + key, "scope.%s: missing" % key, without(good, key))
        for name, value in dict(WRONG_TYPES, nil=None).items():
            if (key, name) != ("headers", "list"):
                bad("%s of type %s" % (key, name), "scope.%s: expected" % key, dict(good, **{key: value}))
    bad("type as bytes", "scope.type: expected a string", dict(good, type=b"http"))
    bad("type websocket", "neither http nor aleph.message", dict(good, type="websocket"))
    bad("an empty method", "scope.method: no token", dict(good, method=""))
    bad("a method with a space", "scope.method: no token", dict(good, method="GET /x"))
    bad("a method with CR LF", "scope.method: no token", dict(good, method="GET\r\n"))
    for path in "", "x", "*", "http://x/":
        bad("path %r" % path, "scope.path: does not begin with /", dict(good, path=path))
    for name, headers in (("of numbers", [1]), ("of short tuples", [[b"a"]]), ("of long tuples", [[b"a", b"b", b"c"]]),
                          ("with a number for a name", [[1, b"b"]]), ("with a number for a value", [[b"a", 2]]),
                          ("with nil", [[b"a", None]]), ("with a map", [{"a": "b"}])):
        bad("headers %s" % name, "scope.headers: expected a list of pairs", dict(good, headers=headers))
    bad("a header without a name", "a name is no token", dict(good, headers=[[b"", b"b"]]))
    bad("a header name with CR LF", "a name is no token", dict(good, headers=[[b"a\r\nb", b"c"]]))
    bad("a header name with a colon", "a name is no token", dict(good, headers=[[b"a:", b"c"]]))
    bad("a header name with a space", "a name is no token", dict(good, headers=[[b"a ", b"c"]]))
    bad("a header value with CR LF", "control bytes", dict(good, headers=[[b"a", b"b\r\nc: d"]]))
    bad("a header value with LF", "control bytes", dict(good, headers=[[b"a", b"b\nc"]]))
    bad("a header value with NUL", "control bytes", dict(good, headers=[[b"a", b"b\0c"]]))
    bad("257 headers", "too many", dict(good, headers=[[b"a", b"b"]] * 257))
    bad("an event without a body", "scope.body: missing", {"type": "aleph.message"})
    bad("an event with a number for a body", "scope.body: expected", {"type": "aleph.message", "body": 5})
    for name, value in (("no scope", {}), ("Scope", {"Scope": good}), ("another key", {"x": 1})):
        refused("49: " + name, "no key \"scope\"", peer.raw(packed(value)))
    for name, value in dict(WRONG_TYPES, nil=None).items():
        if name != "map":
            refused("49: scope of type " + name, "scope: expected a map", peer.raw(packed({"scope": value})))
    refused("49: an empty scope", "scope.type: missing", peer.raw(packed({"scope": {}})))
    refused("49: a key of type int", "a key is not a string", peer.raw(packed({5: 5, "scope": good})))
    refused("49: a key of type int in the scope", "a key is not a string", peer.raw(packed({"scope": {5: 5}})))
    equal("49: none of these reached the program", before, body_json(peer.request("/count"))["requests"])
    answer = peer.ask({"other": [1], "scope": dict(good, extra={"a": [1.5, None]})})
    equal("49: keys that nobody knows are passed over", "/", body_json(answer)["path"])
    case("49: the answer has the shape that the supervisor reads", shape_ok(answer), answer)


def item50(peer):
    for name, value, expected in (
            ("latin-1", b"caf\xe9", "caf\u00e9"), ("UTF-8", "caf\u00e9".encode(), "caf\u00e9"),
            ("neither", b"\xff\xfe\x80", "\u00ff\u00fe\u0080"), ("a tab", b"a\tb", "a\tb")):
        answer = peer.request("/header/%s/%s" % (b"x-test".hex(), value.hex()))
        case("50: a header value in %s: the reply's shape" % name, shape_ok(answer), answer)
        equal("50: a header value in %s" % name, [[b"x-test", expected.encode()]],
              [pair for pair in answer["headers"]["headers"] if pair[0] == b"x-test"])
    for name, field, value in (("CR LF in a value", b"x", b"a\r\nb: c"), ("LF in a value", b"x", b"a\nb"),
                               ("NUL in a value", b"x", b"a\0b"), ("CR in a name", b"x\r", b"a"),
                               ("a byte past ASCII in a name", b"x\xe9", b"a"), ("an empty name", b"", b"a"),
                               ("a space in a name", b"x y", b"a")):
        answer = peer.request("/header/%s/%s" % (field.hex(), value.hex())) if field else \
            peer.request("/header//" + value.hex())
        case("50: %s is refused" % name, set(answer) == {"error", "traceback", "output"}, answer)
    answer = peer.request("/fields/257")
    case("50: 257 fields are refused", set(answer) == {"error", "traceback", "output"}, answer)
    answer = peer.request("/fields/256")
    equal("50: 256 fields are answered", 256, len([1 for name, _ in answer.get("headers", {}).get("headers", [])
                                                  if name.startswith(b"x-")]))
    for field in b"connection", b"transfer-encoding", b"keep-alive", b"upgrade", b"te", b"trailer":
        answer = peer.request("/header/%s/%s" % (field.hex(), b"close".hex()))
        names = [pair[0].lower() for pair in answer.get("headers", {}).get("headers", [])]
        case("50: %s stays at the machine" % field.decode(), "headers" in answer and field not in names, answer)


def item51(peer):
    """100 at once; every other host leaves before the answer."""
    before = body_json(peer.request("/count"))["requests"]
    stay, leave = [], []
    for n in range(100):
        s = peer.connect()
        s.sendall(packed(Peer.scope("/sleep/0.3" if n % 2 else "/never", headers=[(b"n", b"%d" % n)])))
        (stay if n % 2 else leave).append(s)
    time.sleep(0.2)
    for s in leave:
        s.close()
    answers = [unpacked(peer.read_all(s)) for s in stay]
    equal("51: 100 at once, those who stay are answered", 50, sum(shape_ok(answer) for answer in answers))
    for _ in range(50):
        gone = body_json(peer.request("/disconnects"))["disconnects"]
        if gone == 50:
            break
        time.sleep(0.05)
    equal("51: the program hears of each who left", 50, gone)
    counted = body_json(peer.request("/count"))["requests"] - before
    case("51: none was lost, none came twice", counted - 100 in range(1, 52), counted)
    s = peer.connect()
    s.sendall(packed(Peer.scope("/bytes/3000000")))
    time.sleep(0.1)
    s.close()                       # with the answer under way
    equal("51: who leaves inside the answer hurts nobody", "/", body_json(peer.request("/"))["path"])


# ---- L. Scope ---------------------------------------------------------------------------

def item81(peer):
    path_safe, query_safe = "!$&'()*+,;=:@/-._~", "!$&'()*+,;=:@/?-._~"
    parts = {"CR": "\r", "LF": "\n", "CR LF": "\r\n", "space": " ", "?": "?", "#": "#", "%": "%",
             "an accent": "\u00e9", "%41": "%41", "a smuggled request": " HTTP/1.1\r\nhost: x\r\n\r\nGET /evil",
             "NUL": "\0", "DEL": "\x7f", "a plus": "+", "a tab": "\t", "a quote": "\"<>\\^`{|}"}
    for name, part in parts.items():
        before = body_json(peer.request("/count"))["requests"]
        path = "/before" + part + "after"
        seen = body_json(peer.request(path))
        equal("81: %s in a path" % name, [path, quote(path, safe=path_safe)], [seen["path"], seen["raw_path"]])
        query = "a=before" + part + "_after"
        seen = body_json(peer.request("/", query=query))
        # %XX stays, a bare % does not; a space becomes a plus
        expected = quote(query, safe=query_safe + ("%" if part == "%41" else "") + " ").replace(" ", "+")
        equal("81: %s in a query" % name, ["/", expected], [seen["path"], seen["query"]])
        after = body_json(peer.request("/count"))["requests"]
        equal("81: %s: exactly one request each" % name, 2, after - before)
    seen = body_json(peer.ask({"scope": dict(Peer.scope()["scope"], path=b"/\xff\xfe", query_string=b"\xff=%zz%4")}))
    equal("81: bytes that are no UTF-8", ["/\ufffd\ufffd", "/%FF%FE", "%FF=%25zz%254"],
          [seen["path"], seen["raw_path"], seen["query"]])


def headers_rebuilt(peer):
    sent = [(b"Host", b"example.org"), (b"X-Two", b"1"), (b"x-two", b"2"), (b"Content-Length", b"999"),
            (b"Transfer-Encoding", b"chunked"), (b"Connection", b"close, X-Named"), (b"X-Named", b"gone"),
            (b"Keep-Alive", b"5"), (b"TE", b"trailers"), (b"Upgrade", b"h2c"), (b"x-bin", b"\xe9")]
    seen = body_json(peer.request("/", method="POST", headers=sent, body=b"12345"))
    equal("hop-by-hop headers are dropped, the length is the body's",
          [["host", "example.org"], ["x-two", "1"], ["x-two", "2"], ["x-bin", "\u00e9"], ["content-length", "5"]],
          seen["headers"])
    equal("and the body is the body", (5, "POST"), (seen["body_bytes"], seen["method"]))
    seen = body_json(peer.request("/"))
    equal("a request without a body has no length", [], seen["headers"])
    equal("the scope is completed", ["1.1", "http", "", {"version": "3.0", "spec_version": seen["asgi"]["spec_version"]}],
          [seen["http_version"], seen["scheme"], seen["root_path"], seen["asgi"]])


# ---- Many, large, slow ------------------------------------------------------------------

def together(count, work):
    """Calls work(n) in as many threads; returns the results and the seconds."""
    results = [None] * count

    def run(n):
        try:
            results[n] = work(n)
        except Exception as wrong:
            results[n] = wrong
    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, time.monotonic() - start


def concurrency(peer):
    slow = {}
    thread = threading.Thread(target=lambda: slow.update(body_json(peer.request("/sleep/2"))))
    start = time.monotonic()
    thread.start()
    time.sleep(0.1)
    results, took = together(64, lambda n: body_json(peer.request("/%d" % n, body=b"b" * n * 100, method="POST")))
    wrong = [n for n, seen in enumerate(results)
             if not isinstance(seen, dict) or seen["path"] != "/%d" % n or seen["body_bytes"] != n * 100]
    equal("64 requests at once get their own answers", [], wrong)
    case("a request of 2 s delays no other", took < 1.8 and thread.is_alive(), "64 took %.2f s" % took)
    thread.join()
    equal("and is answered itself", 2.0, slow.get("slept"))
    case("after its 2 s", time.monotonic() - start < 6, time.monotonic() - start)


def large(peer):
    answer = peer.request("/bytes/%d" % (3 << 20))
    case("a response of 3 MiB", shape_ok(answer) and answer["body"]["body"] == b"x" * (3 << 20), str(answer)[:200])
    answer = peer.request("/stream/50/%d" % ((3 << 20) // 50))
    size = (3 << 20) // 50
    case("a response in 50 parts", shape_ok(answer) and answer["body"]["body"]
         == b"".join(bytes([97 + n % 26]) * size for n in range(50)), str(answer)[:200])
    answer = peer.request("/bytes/0")
    equal("an empty response", b"", answer["body"]["body"])
    for path in "/bytes/9000000", "/stream/100/90000":
        answer = peer.request(path)
        case("a reply over the limit gets an error map: " + path, set(answer) == {"error", "traceback", "output"}
             and "larger than" in answer["error"], str(answer)[:200])
    with peer.connect() as s:       # read late: the answer waits, nobody else does
        s.sendall(packed(Peer.scope("/bytes/3000000")))
        equal("another request while nobody reads an answer", "/", body_json(peer.request("/"))["path"])
        equal("an answer that is read late", 3000000, len(unpacked(peer.read_all(s))["body"]["body"]))


def events(peer):
    answer = peer.event("hello")
    equal("an event's answer is the program's first message", "hello", answer["body"].get("event"))
    equal("its headers are empty", {}, answer["headers"])
    equal("its keys are those of a reply", {"headers", "body", "output", "output_data"}, set(answer))
    equal("an event of 1 MiB", 1 << 20, len(peer.event("e" * (1 << 20))["body"]["event"]))
    equal("an event in any language", "gr\u00fc\u00df \U0001f600", peer.event("gr\u00fc\u00df \U0001f600")["body"]["event"])
    equal("an empty event", "", peer.event("")["body"]["event"])


def failures(peer):
    for path, words in (("/raise", "raised on purpose"), ("/late", "raised in the middle"), ("/early", ""),
                        ("/nothing", ""), ("/badheader", "CR, LF or NUL")):
        answer = peer.request(path)
        case("%s gets an error map" % path, set(answer) == {"error", "traceback", "output"}
             and words in answer["error"] + answer["traceback"] and answer["traceback"], answer)
    case("the traceback names the line", "in raise_" in peer.request("/raise")["traceback"], "")


# ---- 48. !command -------------------------------------------------------------------------

def has_process(words):
    """Whether a process with these words on its command line runs; this machine sees those of
    the namespaces below it."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/cmdline" % pid, "rb") as file:
                if words in file.read().replace(b"\0", b" "):
                    return True
        except OSError:
            pass
    return False


def gone(name, words):
    for _ in range(100):
        if not has_process(words):
            return case(name, True)
        time.sleep(0.02)
    case(name, False, "it still runs")


def item48(peer):
    """The script allows a command 4 s, 16 MiB of output, and 3 others beside it."""
    for name, pieces, end, expected in (
            ("a line", (b"!echo one\n",), False, b"one\n"), ("no newline", (b"!echo two",), False, b"two\n"),
            ("the end of the stream", (b"!echo three",), True, b"three\n"),
            ("pieces", (b"!", b"ec", b"ho four\n"), False, b"four\n"),
            ("only the first line counts", (b"!echo five\necho six\n",), False, b"five\n"),
            ("both streams", (b"!echo out; echo err >&2\n",), False, b"out\nerr\n"),
            ("the shell's words", (b"!for i in 1 2; do echo $i | tr 1 a; done\n",), False, b"a\n2\n"),
            ("no output", (b"!true\n",), False, b""), ("an empty one", (b"!\n",), False, b""),
            ("a failing one", (b"!echo before; exit 3\n",), False, b"before\n"),
            ("one that kills itself", (b"!echo before; kill -9 $$\n",), False, b"before\n"),
            ("input is empty", (b"!cat; echo done\n",), False, b"done\n"),
            ("bytes", (b"!printf '\\000\\377\\n'\n",), False, b"\0\xff\n"),
            ("closed streams", (b"!exec >&- 2>&-; exit 0\n",), False, b"")):
        with peer.connect() as s:
            for piece in pieces:
                s.sendall(piece)
                time.sleep(0.01)
            if end:
                s.shutdown(socket.SHUT_WR)
            equal("48: !command: " + name, expected, peer.read_all(s))
    equal("48: the longest command", b"%d\n" % 65000, talk(peer, b"!echo ${#A}; exit; ".replace(b"echo", b"A='" + b"x" * 65000 + b"'; echo") + b"\n"))
    refused("48: a command of 64 KiB and more, in one write", "more than 65536 bytes", talk(peer, b"!echo " + b"x" * 70000))
    refused("48: a command of 64 KiB and more, with its newline", "more than 65536 bytes",
            talk(peer, b"!echo " + b"x" * 70000 + b"\n"))
    answer = talk(peer, b"!head -c 1073741824 /dev/zero\n")
    case("48: 1 GiB of output is cut", (16 << 20) - 32768 < len(answer) < (16 << 20) + 100 and b"too much output" in answer[-100:],
         "%d bytes, %r" % (len(answer), answer[-100:]))
    start = time.monotonic()
    answer = talk(peer, b"!echo begun; exec sleep 31337\n")
    took = time.monotonic() - start
    case("48: a command that never ends is ended", answer == b"begun\n\nagent: took too long, killed\n" and took < 10, answer)
    gone("48: and is gone", b"sleep 31337")
    start = time.monotonic()
    equal("48: a child in the background does not hold the answer", b"begun\n", talk(peer, b"!sleep 31338 & echo begun\n"))
    case("48: and it came at once", time.monotonic() - start < 1, time.monotonic() - start)
    gone("48: and the child is gone", b"sleep 31338")
    talk(peer, b"!sleep 31339\n", close=True)
    gone("48: a host that hangs up ends its command", b"sleep 31339")
    with peer.connect() as s:       # nobody reads: the command waits, not our memory
        s.sendall(b"!yes | head -c 10000000\n")
        time.sleep(0.3)
        equal("48: another command while nobody reads the first one's output", b"second\n", talk(peer, b"!echo second\n"))
        equal("48: output that is read late is whole", 10000000, len(peer.read_all(s)))
    open_ones = []
    for _ in range(4):
        s = peer.connect()
        s.sendall(b"!sleep 31340\n")
        open_ones.append(s)
    time.sleep(0.2)
    refused("48: one command more than the limit", "4 are running already", talk(peer, b"!echo fifth\n"))
    for s in open_ones:
        s.close()
    gone("48: all of them are ended", b"sleep 31340")
    equal("48: and then there is room again", b"sixth\n", talk(peer, b"!echo sixth\n"))


def item48_no_shell(peer):
    answer = talk(peer, b"!echo hello\n")
    case("48: no shell in the image", b"/bin/sh" in answer and b"No such file" in answer, answer)


def main():
    peer = Peer(sys.argv[1], timeout=30)
    for name in sys.argv[2:]:
        globals()[name](peer)
        sys.stdout.flush()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes zip archives, good and evil.

    zip_make.py list            every case: `accept NAME` or `refuse NAME`
    zip_make.py NAME > FILE     one archive

A refused case is named after its number in the list of bad inputs. An entry is a dict: what
it should say, and under `local`, `central` and `descriptor` what it says instead.
"""
import io
import random
import struct
import sys
import zipfile
import zlib

FILE, FOLDER, LINK = 0o100644, 0o040755, 0o120777
SMALL = b"print('hello')\n"


def entry(name, data=SMALL, mode=FILE, method=8, **more):
    name = name.encode() if isinstance(name, str) else name
    packed = data
    if method == 8:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = deflate.compress(data) + deflate.flush()
    return dict(name=name, packed=packed, method=method, mode=mode, crc=zlib.crc32(data),
                size=len(data), flags=0, extra=b"", **more)


def folder(name, **more):
    return entry(name, b"", FOLDER, 0, **more)


def link(name, target, **more):
    return entry(name, target.encode(), LINK, 0, **more)


def header(e, central, at=0):
    e = {**e, "packed_size": len(e["packed"]), **e.get("central" if central else "local", {})}
    fields = struct.pack("<HHHHHIIIHH", 20, e["flags"], e["method"], 0, 0x21, e["crc"],
                         e["packed_size"], e["size"], len(e["name"]), len(e["extra"]))
    if not central:
        return b"PK\3\4" + fields + e["name"] + e["extra"]
    return (b"PK\1\2" + struct.pack("<H", 3 << 8 | 20) + fields
            + struct.pack("<HHHII", 0, 0, 0, e["mode"] << 16, e.get("at", at))
            + e["name"] + e["extra"])


def archive(*entries, prefix=b"", gap=b"", end=(), tail=b"", between=b"", comment=b""):
    """`end` replaces fields of the end record; `between` stands before it."""
    body, directory = bytearray(prefix), bytearray()
    for e in entries:
        directory += header(e, True, len(body))
        body += header(e, False) + e["packed"] + e.get("descriptor", b"")
    fields = {"here": len(entries), "all": len(entries), "size": len(directory),
              "start": len(body) + len(gap), "comment": len(comment), **dict(end)}
    return bytes(body + gap + directory + between + b"PK\5\6"
            + struct.pack("<HHHHIIH", 0, 0, fields["here"], fields["all"], fields["size"],
                          fields["start"], fields["comment"]) + comment + tail)


def zip64(*entries, saturate=True, lies=(), locator=()):
    """The same with a zip64 end record; `lies` and `locator` replace its fields."""
    plain, count = archive(*entries, end=dict(here=0, all=0)), len(entries)
    size, start = struct.unpack("<II2x", plain[-10:])
    f = {"rest": 44, "here": count, "all": count, "size": size, "start": start, **dict(lies)}
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", f["rest"], 45, 45, 0, 0, f["here"], f["all"],
                                     f["size"], f["start"])
    f = {"disk": 0, "at": len(plain) - 22, "disks": 1, **dict(locator)}
    record += b"PK\6\7" + struct.pack("<IQI", f["disk"], f["at"], f["disks"])
    end = dict(here=0xffff, all=0xffff, size=0xffffffff, start=0xffffffff) if saturate else ()
    return archive(*entries, between=record, end=end)


def described(name="a", data=SMALL, form="<4sIII", zero=True, **wrong):
    """An entry whose sizes follow its data."""
    e = entry(name, data)
    says = {"crc": e["crc"], "packed": len(e["packed"]), "size": len(data), **wrong}
    values = [says["crc"], says["packed"], says["size"]]
    e["descriptor"] = struct.pack(form, *([b"PK\7\x08"] if "s" in form else []), *values)
    e["flags"] = 8
    if zero:
        e["local"] = dict(crc=0, packed_size=0, size=0)
    return e


class Pipe(io.BytesIO):
    def seekable(self):
        return False

    def tell(self):
        raise OSError("a pipe has no position")

    seek = tell


def by_zipfile(stream=False, **options):
    """Through Python's own writer; a stream that cannot seek gives descriptors."""
    out = Pipe() if stream else io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name in ("main.py", "pkg/__init__.py", "pkg/deep/x.txt"):
            with z.open(name, "w", **options) as f:
                f.write(SMALL * 100)
    return out.getvalue()


def bomb(size):
    """Deflate of `size` zeros without making them: stored pieces of one packed block."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = bytes(1 << 20)
    packed = b"".join(deflate.compress(piece) for _ in range(size >> 20)) + deflate.flush()
    crc = 0
    for _ in range(size >> 20):
        crc = zlib.crc32(piece, crc)
    return packed, crc


def zeros(name, size, says=None):
    packed, crc = bomb(size)
    return {**entry(name), "packed": packed, "crc": crc, "size": says or size}


def overlapping():
    """Two entries of the directory, one local header."""
    return archive(entry("a"), {**entry("a"), "central": dict(at=0)})


def nested_overlap():
    """The second entry lies inside the stored data of the first."""
    inner = entry("b")
    inside = header(inner, False) + inner["packed"]
    outer = entry("a", inside, method=0)
    e = {**inner, "at": 30 + 1}
    whole = archive(outer)
    start = len(header(outer, False)) + len(inside)
    directory = whole[start:-22] + header(e, True)
    return whole[:start] + directory + b"PK\5\6" + struct.pack(
        "<HHHHIIH", 0, 0, 2, 2, len(directory), start, 0)


def forty_two():
    """Entries that are archives are files to us: five layers, each stored once unpacked."""
    data = archive(entry("0.dll", bytes(1 << 16)))
    for layer in range(5):
        data = archive(*(entry(f"lib{i}.zip", data) for i in range(16)))
    return data


def overlapped_bomb(count=250, size=8 << 20):
    """All entries share one packed kernel."""
    kernel = zeros("x", size)
    body = header(kernel, False) + kernel["packed"]
    directory = b"".join(header({**kernel, "at": 0}, True) for _ in range(count))
    return body + directory + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count,
                                                      len(directory), len(body), 0)


def cut(data, n):
    return data[:-n]


def damaged():
    data = bytearray(archive(entry("a", random.Random(1).randbytes(2000), method=0)))
    data[500] ^= 1
    return bytes(data)


def many(count):
    return zip64(*(entry(f"f{i:06}", b"", method=0) for i in range(count)))


def no_extra64():
    return archive({**entry("a"), "central": dict(packed_size=0xffffffff, size=0xffffffff)})


def extra64(size, packed, name="a"):
    e = entry(name)
    wide = struct.pack("<HHQQ", 1, 16, size, packed)
    saturated = dict(packed_size=0xffffffff, size=0xffffffff)
    return {**e, "extra": wide, "local": saturated, "central": saturated}


def good64(**wrong):
    e = entry("a")
    said = {"size": e["size"], "packed": len(e["packed"]), **wrong}
    return archive(extra64(said["size"], said["packed"]))


def local_lie64():
    e = extra64(len(SMALL), len(entry("a")["packed"]))
    e["local"] = dict(e["local"])
    e["local"]["extra"] = struct.pack("<HHQQ", 1, 16, 1 << 40, len(e["packed"]))
    return archive(e)


ACCEPT = {
    "stored": lambda: archive(entry("a", method=0)),
    "deflate": lambda: archive(entry("main.py"), folder("pkg/"), entry("pkg/__init__.py")),
    "empty": lambda: archive(),
    "empty-file": lambda: archive(entry("a", b""), entry("b", b"", method=0)),
    "zip64": lambda: zip64(entry("a"), entry("b/c")),
    "zip64-beside-plain": lambda: zip64(entry("a"), saturate=False),
    "zip64-sizes": good64,
    "zip64-python": lambda: by_zipfile(force_zip64=True),
    "python": by_zipfile,
    "descriptor": lambda: archive(described(), described("b")),
    "descriptor-unsigned": lambda: archive(described(form="<III"), entry("b")),
    "descriptor-64": lambda: archive(described(form="<4sIQQ"), entry("b")),
    "descriptor-unsigned-64": lambda: archive(described(form="<IQQ"), entry("b")),
    "descriptor-repeats": lambda: archive(described(zero=False)),
    "descriptor-python": lambda: by_zipfile(stream=True),
    "duplicates": lambda: archive(entry("a", b"first"), entry("b"), entry("a", b"last")),
    "duplicate-folders": lambda: archive(folder("d/"), folder("d/"), entry("d/x")),
    "links": lambda: archive(entry("lib/real.js"), link(".bin/tool", "../lib/real.js"),
                             link("here", "lib/./real.js"), link("loop", "loop"),
                             link("dangling", "not/there")),
    "link-to-top": lambda: archive(link("a/top", "..")),
    "dot-slash": lambda: archive(folder("./"), entry("./a"), folder("./d/"), entry("./d/x")),
    "no-mode": lambda: archive(entry("a", mode=0), entry("d/", b"", 0, 0)),
    "executable": lambda: archive(entry("run", mode=0o100755), entry("closed", mode=0o100000)),
    "comment": lambda: archive(entry("a"), comment=b"made by hand"),
    "gap": lambda: archive(entry("a"), gap=b"something between"),
    "unicode": lambda: archive(entry("d\u00e9j\u00e0/\u4f60\u597d.txt")),
    "deep": lambda: archive(entry("d/" * 64 + "x")),
    "long-part": lambda: archive(entry("n" * 255)),
    "nested-archives": forty_two,
    "ratio-below-16-MiB": lambda: archive(zeros("a", 16 << 20)),
    "names-beside": lambda: archive(entry("a-b"), entry("a.c"), entry("a"), entry("ab/c")),
}

REFUSE = {
    "52-dotdot": lambda: archive(entry("../x")),
    "52-dotdot-inside": lambda: archive(entry("a/../../x")),
    "52-dotdot-harmless": lambda: archive(entry("a/../x")),
    "52-dotdot-end": lambda: archive(folder("a/../")),
    "52-dotdot-alone": lambda: archive(entry("..")),
    "52-dot-slash-dotdot": lambda: archive(entry("./../x")),
    "52-absolute": lambda: archive(entry("/x")),
    "52-dot-slash-absolute": lambda: archive(entry(".//x")),
    "52-two-slashes": lambda: archive(entry("a//x")),
    "52-dot-inside": lambda: archive(entry("a/./x")),
    "52-drive": lambda: archive(entry("C:/x")),
    "52-drive-backslash": lambda: archive(entry("C:\\x")),
    "52-backslash": lambda: archive(entry("a\\..\\b")),
    "52-nul": lambda: archive(entry(b"a\0b")),
    "52-empty": lambda: archive(entry("")),
    "52-not-utf8": lambda: archive(entry(b"\xff\xfe")),
    "52-surrogate": lambda: archive(entry(b"\xed\xa0\x80")),
    "52-long-name": lambda: archive(entry("d/" * 20 + "n" * 4096)),
    "52-long-part": lambda: archive(entry("n" * 256)),
    "52-deep": lambda: archive(entry("d/" * 65 + "x")),
    "52-local-name": lambda: archive({**entry("ok"), "local": dict(name=b"..")}),
    "52-local-name-longer": lambda: archive({**entry("ok"), "local": dict(name=b"../x")}),
    "53-link-out": lambda: archive(link("a", "../x")),
    "53-link-absolute": lambda: archive(link("a", "/etc/passwd")),
    "53-link-out-from-deep": lambda: archive(link("a/b", "../../x")),
    "53-link-through": lambda: archive(link("a", "b/../../x")),
    "53-link-chain": lambda: archive(link("d/up", ".."), link("a", "d/up/../x")),
    "53-link-empty": lambda: archive(link("a", "")),
    "53-link-nul": lambda: archive(link("a", "b\0c")),
    "53-link-long": lambda: archive(link("a", "n" * 4096)),
    "53-write-through": lambda: archive(link("a", "b"), folder("b/"), entry("a/x")),
    "53-write-through-reversed": lambda: archive(entry("a/x"), link("a", "b")),
    "53-write-through-deep": lambda: archive(link("a", "b"), entry("a-"), entry("a/c/d/x")),
    "53-link-twice": lambda: archive(link("a", "b"), link("a", "c")),
    "53-link-then-file": lambda: archive(link("a", "b"), entry("a")),
    "53-link-named-folder": lambda: archive(link("a/", "b")),
    "54-file-then-folder": lambda: archive(entry("a"), folder("a/")),
    "54-folder-then-file": lambda: archive(folder("a/"), entry("a")),
    "54-file-then-below": lambda: archive(entry("a"), entry("a/b")),
    "54-below-then-file": lambda: archive(entry("a/b"), entry("a.c"), entry("a")),
    "54-folder-with-data": lambda: archive(entry("a/", SMALL, FOLDER)),
    "54-folder-mode-file-name": lambda: archive(entry("a", b"", FOLDER, 0)),
    "55-same-header": overlapping,
    "55-inside": nested_overlap,
    "55-overlapped-bomb": overlapped_bomb,
    "55-10-GB-declared": lambda: archive(extra64(10 << 30, len(entry("a")["packed"]))),
    "55-10-GB-in-many": lambda: archive(*(
        {**entry(f"f{i}"), "size": 1 << 30} for i in range(10))),
    "55-3-GB-declared": lambda: archive({**entry("a"), "size": 3 << 30}),
    "55-ratio": lambda: archive(zeros("a", 32 << 20)),
    "55-more-than-declared": lambda: archive(zeros("a", 32 << 20, says=1000)),
    "55-one-more": lambda: archive({**entry("a"), "size": len(SMALL) - 1,
                                    "crc": zlib.crc32(SMALL[:-1])}),
    "55-less-than-declared": lambda: archive({**entry("a"), "size": len(SMALL) + 1}),
    "56-crc": lambda: archive({**entry("a"), "crc": 1}),
    "56-data": damaged,
    "56-not-deflate": lambda: archive({**entry("a"), "packed": b"\xff" * 40}),
    "56-deflate-cut": lambda: archive({**entry("a", SMALL * 50), "packed":
                                       entry("a", SMALL * 50)["packed"][:-3]}),
    "56-deflate-then-more": lambda: archive({**entry("a"), "packed":
                                             entry("a")["packed"] + b"hidden"}),
    "56-stored-sizes-differ": lambda: archive({**entry("a", method=0), "size": 3}),
    "56-local-crc": lambda: archive({**entry("a"), "local": dict(crc=5)}),
    "56-local-size": lambda: archive({**entry("a"), "local": dict(size=5)}),
    "56-local-packed": lambda: archive({**entry("a"), "local": dict(packed_size=5)}),
    "56-local-method": lambda: archive({**entry("a"), "local": dict(method=0)}),
    "56-local-flags": lambda: archive({**entry("a"), "local": dict(flags=8)}),
    "56-local-zero-sizes": lambda: archive({**entry("a"), "local": dict(packed_size=0, size=0)}),
    "56-no-local-header": lambda: archive({**entry("a"), "central": dict(at=7)}),
    "56-offset-behind": lambda: archive({**entry("a"), "at": 0x7fffffff}),
    "56-past-directory": lambda: archive({**entry("a", method=0), "size": 60,
                                          "local": dict(packed_size=60),
                                          "central": dict(packed_size=60)}),
    "56-truncated-end": lambda: cut(archive(entry("a")), 1),
    "56-half-end": lambda: cut(archive(entry("a")), 11),
    "56-no-end": lambda: cut(archive(entry("a")), 22),
    "56-no-directory": lambda: header(entry("a"), False) + entry("a")["packed"],
    "56-nothing": lambda: b"",
    "56-text": lambda: SMALL * 10,
    "56-tail": lambda: archive(entry("a"), tail=b"more"),
    "56-comment-short": lambda: archive(entry("a"), comment=b"abc", end=dict(comment=2)),
    "56-comment-long": lambda: archive(entry("a"), end=dict(comment=9)),
    "56-second-end": lambda: archive(entry("a"), comment=archive(entry("b"))),
    "56-count-high": lambda: archive(entry("a"), end=dict(here=2, all=2)),
    "56-count-low": lambda: archive(entry("a"), entry("b"), end=dict(here=1, all=1)),
    "56-counts-differ": lambda: archive(entry("a"), end=dict(here=2)),
    "56-count-zero": lambda: archive(entry("a"), end=dict(here=0, all=0)),
    "56-directory-offset": lambda: archive(entry("a"), end=dict(start=3)),
    "56-directory-offset-huge": lambda: archive(entry("a"), end=dict(start=0xfffffff0)),
    "56-directory-size": lambda: archive(entry("a"), end=dict(size=9)),
    "56-zip64-locator": lambda: zip64(entry("a"), locator=dict(at=1)),
    "56-zip64-locator-huge": lambda: zip64(entry("a"), locator=dict(at=(1 << 64) - 30)),
    "56-zip64-count": lambda: zip64(entry("a"), lies=dict(here=2, all=2)),
    "56-zip64-count-huge": lambda: zip64(entry("a"), lies=dict(here=1 << 60, all=1 << 60)),
    "56-zip64-counts-differ": lambda: zip64(entry("a"), lies=dict(here=2)),
    "56-zip64-size": lambda: zip64(entry("a"), lies=dict(size=1 << 60)),
    "56-zip64-start": lambda: zip64(entry("a"), lies=dict(start=(1 << 64) - 8)),
    "56-zip64-rest": lambda: zip64(entry("a"), lies=dict(rest=1 << 60)),
    "56-zip64-contradicts": lambda: zip64(entry("a"), entry("b"), saturate=False,
                                          lies=dict(here=1, all=1)),
    "56-zip64-extra-missing": no_extra64,
    "56-zip64-extra-packed": lambda: good64(packed=1 << 50),
    "56-zip64-extra-size": lambda: good64(size=5),
    "56-zip64-extra-wraps": lambda: good64(packed=(1 << 64) - 20),
    "56-zip64-extra-local": local_lie64,
    "56-descriptor-crc": lambda: archive(described(crc=1)),
    "56-descriptor-size": lambda: archive(described(size=5)),
    "56-descriptor-packed": lambda: archive(described(packed=5)),
    "56-descriptor-missing": lambda: archive({**described(), "descriptor": b""}),
    "56-descriptor-local": lambda: archive({**described(), "local":
                                            dict(crc=0, size=0, packed_size=3)}),
    "56-prefix": lambda: archive(entry("a"), prefix=b"#!/bin/sh\n"),
    "56-prefix-uncounted": lambda: b"#!/bin/sh\n" + archive(entry("a")),
    "56-prefix-empty": lambda: b"junk" + archive(),
    "56-method-1": lambda: archive({**entry("a"), "method": 1}),
    "56-method-9": lambda: archive({**entry("a"), "method": 9}),
    "56-method-12": lambda: archive({**entry("a"), "method": 12}),
    "56-method-14": lambda: archive({**entry("a"), "method": 14}),
    "56-method-99": lambda: archive({**entry("a"), "method": 99}),
    "56-encrypted": lambda: archive({**entry("a"), "flags": 1}),
    "56-encrypted-strongly": lambda: archive({**entry("a"), "flags": 0x41}),
    "56-encrypted-local": lambda: archive({**entry("a"), "local": dict(flags=1)}),
    "56-encrypted-directory": lambda: archive({**entry("a"), "flags": 0x2000}),
    "56-patch": lambda: archive({**entry("a"), "flags": 0x20}),
    "57-200001": lambda: many(200001),
    "57-count-only": lambda: archive(end=dict(here=0xfffe, all=0xfffe)),
    "58-setuid": lambda: archive(entry("fine"), entry("a", mode=0o104755)),
    "58-setgid": lambda: archive(entry("fine"), entry("a", mode=0o102755)),
    "58-sticky": lambda: archive(folder("fine/"), entry("a/", b"", 0o041777, 0)),
    "58-setgid-folder": lambda: archive(entry("a/", b"", 0o042755, 0)),
    "58-character-device": lambda: archive(entry("a", b"", 0o020666, 0)),
    "58-block-device": lambda: archive(entry("a", b"", 0o060660, 0)),
    "58-pipe": lambda: archive(entry("a", b"", 0o010644, 0)),
    "58-socket": lambda: archive(entry("a", b"", 0o140755, 0)),
    "58-unknown-type": lambda: archive(entry("a", b"", 0o170000, 0)),
}


def main(words):
    if words == ["list"]:
        for verdict, cases in ("accept", ACCEPT), ("refuse", REFUSE):
            print("".join(f"{verdict} {name}\n" for name in cases), end="")
        return 0
    if len(words) != 1 or words[0] not in {**ACCEPT, **REFUSE}:
        print(__doc__, file=sys.stderr)
        return 2
    sys.stdout.buffer.write({**ACCEPT, **REFUSE}[words[0]]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

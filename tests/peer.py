"""The supervisor's side of the wire, written without the agent's code: Python's msgpack packs
and unpacks, so that a misunderstanding of the format cannot hide on both ends.

As a library, for scripts that need exact bytes:

    peer = Peer("unix:/tmp/x/aleph.sock")       # or the path of a Firecracker-style socket
    peer.configure(code, "main:app")            # -> the reply, a dict
    peer.request("/path", query="a=b")          # -> the reply, a dict
    peer.raw(b"...")                            # -> all bytes until the agent closes
"""
import io
import socket
import zipfile

import msgpack


class Peer:
    def __init__(self, address, port=52, timeout=60):
        self.address, self.port, self.timeout = address, port, timeout

    def connect(self):
        s = socket.socket(socket.AF_UNIX)
        plain = self.address.startswith("unix:")
        s.connect(self.address[5:] if plain else self.address)     # waits while the backlog is full
        s.settimeout(self.timeout)
        if plain:
            return s
        s.sendall(b"CONNECT %d\n" % self.port)
        answer = b""
        while not answer.endswith(b"\n"):
            byte = s.recv(1)
            if not byte:
                raise ConnectionError("nobody listens on port %d in the guest" % self.port)
            answer += byte
        if not answer.startswith(b"OK "):
            raise ConnectionError(repr(answer))
        return s

    @staticmethod
    def read_all(s):
        parts = []
        while True:
            part = s.recv(1 << 20)
            if not part:
                return b"".join(parts)
            parts.append(part)

    def raw(self, *pieces):
        """Sends the pieces in one write each and returns what comes back until the end."""
        with self.connect() as s:
            for piece in pieces:
                s.sendall(piece)
            return self.read_all(s)

    def ask(self, value):
        return msgpack.unpackb(self.raw(msgpack.packb(value, use_bin_type=True)), raw=False)

    @staticmethod
    def scope(path="/", method="GET", query="", headers=(), body=b""):
        return {"scope": {"type": "http", "path": path, "method": method, "query_string": query,
                          "headers": [list(pair) for pair in headers], "body": body}}

    def request(self, path="/", **others):
        return self.ask(self.scope(path, **others))

    def event(self, body):
        return self.ask({"scope": {"type": "aleph.message", "body": body}})

    @staticmethod
    def configuration(code=b"", entrypoint="main:app", encoding="zip", **others):
        """A map with every key that the supervisor sends."""
        values = {"input_data": None, "interface": "asgi", "vm_hash": "cafe" * 16, "encoding": encoding,
                  "entrypoint": entrypoint, "code": code, "ip": None, "route": None, "dns_servers": [],
                  "volumes": [], "variables": {}, "ipv6": None, "ipv6_gateway": None,
                  "authorized_keys": None}
        values.update(others)
        return values

    @staticmethod
    def frame(values):
        packed = values if isinstance(values, bytes) else msgpack.packb(values, use_bin_type=True)
        return b"%d\n" % len(packed) + packed

    def configure(self, code=b"", entrypoint="main:app", encoding="zip", **others):
        answer = self.raw(self.frame(self.configuration(code, entrypoint, encoding, **others)))
        return msgpack.unpackb(answer, raw=False)


def zipped(files):
    """A zip of {name: text or bytes}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()

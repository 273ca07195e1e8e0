"""Plays the agent to shims/node.cjs: a listening socket as fd 3, the agent's socket as fd 4, as
fd 5 the listening one by which the agent comes, and so do the checks.

Usage: node_driver.py NODE SHIM FOLDER [NAME...]
FOLDER holds code/, a copy of apps/node, and node_modules. Prints `ok NAME` or `FAIL NAME: why`
for each check; exits 1 if one failed.
"""
import concurrent.futures
import fcntl
import http.client
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time

NODE, SHIM, FOLDER = sys.argv[1:4]
VERSION = tuple(int(part) for part in subprocess.run(
    [NODE, "--version"], stdout=subprocess.PIPE, check=True).stdout[1:].split(b"."))
READY, START_FAILED = 8, 9
PATIENCE_S = 20                         # Node on a busy machine
AT_ONCE = 3
checks = []


def above(fd):
    """The same file as an fd that is in nobody's way."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 50)


class NearConnection(http.client.HTTPConnection):
    """As the agent connects: by TCP where the Unix socket is not served."""

    def __init__(self, name, port):
        super().__init__("127.0.0.1", port, timeout=PATIENCE_S)
        self.name = name

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self.name)
        except ConnectionRefusedError:
            self.sock.close()
            super().connect()


class Program:
    def __init__(self, name, export="", args=(), folder="code", **env):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        near = socket.socket(socket.AF_UNIX)
        near.bind("")
        near.listen()
        self.near = near.getsockname()
        self.agent, other = socket.socketpair()
        self.out = tempfile.TemporaryFile()
        self.data, self.frame, self.ended = b"", None, False
        self.file = os.path.join(os.path.realpath(FOLDER), folder, name)
        fds = [above(s.fileno()) for s in (self.listener, other, near)]
        other.close(), near.close()
        keep = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        self.process = subprocess.Popen(
            [NODE, SHIM, self.file, export, *args], cwd=os.path.dirname(self.file),
            stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.out, pass_fds=(3, 4, 5),
            env=dict(keep, PORT=str(self.port), HOST="127.0.0.1", **env),
            preexec_fn=lambda: [os.dup2(fd, at) for at, fd in enumerate(fds, 3)])
        for fd in fds:
            os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.process.kill()
        self.process.wait()
        while not self.ended:           # a second frame is an error wherever it comes
            self.read(PATIENCE_S)
        self.agent.close(), self.listener.close(), self.out.close()

    def output(self):
        self.out.seek(0)
        return self.out.read().decode("utf-8", "replace")

    def read(self, seconds):
        """False: nothing came."""
        if self.ended or not select.select([self.agent], [], [], seconds)[0]:
            return False
        try:
            data = self.agent.recv(65536)
        except ConnectionResetError:
            data = b""
        self.data, self.ended = self.data + data, not data
        if len(self.data) >= 12 and not self.frame:
            size, stream, kind, flags, zero = struct.unpack_from("<IIBBH", self.data)
            assert (stream, flags, zero) == (0, 0, 0) and kind in (READY, START_FAILED), self.data[:12]
            if len(self.data) >= 12 + size:
                self.frame, self.data = (kind, self.data[12:12 + size]), self.data[12 + size:]
        assert not self.frame or not self.data, "bytes after the frame: %r" % self.data
        return True

    def await_frame(self):
        deadline = time.monotonic() + PATIENCE_S
        while not self.frame:
            assert not self.ended, "no frame; output: " + self.output()
            assert self.read(max(0, deadline - time.monotonic())), "silent; output: " + self.output()
        return self.frame

    def ready(self):
        kind, payload = self.await_frame()
        assert (kind, payload) == (READY, b""), "%d %s" % (kind, payload.decode())
        return self

    def failed(self, code=1):
        kind, payload = self.await_frame()
        assert kind == START_FAILED, "it became ready"
        assert self.process.wait(PATIENCE_S) == code, "exit code %d" % self.process.returncode
        message, details = payload.decode().split("\0")
        return message, details

    def await_output(self, text):
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.output():
            assert time.monotonic() < deadline, "%r is not in: %s" % (text, self.output())
            time.sleep(0.02)

    def connect(self):
        return NearConnection(self.near, self.port)

    def connect_by_tcp(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def answer(self, target="/", method="GET", body=None, headers={}, conn=None):
        conn = conn or self.connect()
        conn.request(method, target, body, headers)
        response = conn.getresponse()
        text = response.read().decode()
        conn.close()
        return response, text

    def text(self, target="/", **more):
        response, text = self.answer(target, **more)
        assert response.status == 200, "%d %s" % (response.status, text)
        return text

    def json(self, target="/", **more):
        return json.loads(self.text(target, **more))


def check(least=14, most=99):
    def register(test):
        if least <= VERSION[0] <= most:
            checks.append(test)
        return test
    return register


def equal(expected, actual):
    assert expected == actual, "expected %r, got %r" % (expected, actual)


def has(text, *parts):
    for part in parts:
        assert part in text, "%r is not in: %s" % (part, text)


# ---- What serves ---------------------------------------------------------------------------

@check()
def listener():
    with Program("listener.js", args=("one", "two")) as p:
        facts = p.ready().json("/a%2f?b=%26+c", method="POST", body="sent", headers={"Aleph-Event": "aleph.message"})
    equal(("POST", "/a%2f?b=%26+c", "sent", "aleph.message"), tuple(facts[k] for k in ("method", "url", "body", "event")))
    equal(("127.0.0.1", p.port, 0), (facts["remote"], facts["port"], facts["idle"]))
    equal([p.file, "one", "two"], facts["argv"])


@check()
def listener_of_es_module():
    with Program("listener.mjs") as p:
        equal(p.port, p.ready().json()["port"])


@check()
def named_exports():
    for file in "listener.js", "listener.mjs":
        with Program(file, "other") as p:
            equal("other", p.ready().text())


@check()
def es_module_is_the_main_program():
    with Program("listener.mjs", "self") as p:
        seen = p.ready().json()
    equal(("file://" + p.file, p.file), (seen["url"], seen["argv"]))
    equal(True, seen.get("main", VERSION < (24, 2)))    # some older lines have it, too


@check()
def package_of_type_module_that_listens():
    with Program("index.js", folder="code/module") as p:
        equal({"address": "127.0.0.1", "family": "IPv4", "port": p.port}, p.ready().json())


@check()
def main_of_commonjs():
    with Program("main.cjs") as p:
        equal({"main": p.file, "argv": [p.file]}, p.ready().json())


@check()
def connections_that_came_before():
    with Program("later.js") as p:
        conn = p.connect()
        conn.request("GET", "/early")
        p.await_output("waiting")
        assert not p.read(0.2), "it is ready before it listens"
        p.process.send_signal(12)       # SIGUSR2
        p.ready()
        equal("/early", json.loads(conn.getresponse().read())["url"])


@check()
def port_named_in_the_environment_wins():
    pid = os.getpid()                   # an address that no other run uses
    host = "127.%d.%d.%d" % (1 + (pid >> 14 & 127), pid >> 7 & 127, 1 + (pid & 127))
    with Program("metrics.js", METRICS_HOST=host) as p:
        p.await_output("metrics on 9464")
        equal({"main": p.port}, p.ready().json())
        conn = http.client.HTTPConnection(host, 9464, timeout=PATIENCE_S)
        conn.request("GET", "/")
        equal(b"metrics", conn.getresponse().read())


@check()
def other_addresses_of_the_same_port_take_nothing_over():
    with Program("addresses.js") as p:
        p.await_output("all listen")
        equal({"address": "127.0.0.1", "family": "IPv4", "port": p.port}, p.ready().json())


@check()
def listen_wins_over_what_only_looks_like_a_listener():
    with Program("factory.js") as p:
        p.ready()
        deadline = time.monotonic() + PATIENCE_S
        while True:                     # until the program listens, its export answers: never
            conn = http.client.HTTPConnection("127.0.0.1", p.port, timeout=0.2)
            try:
                conn.request("GET", "/")
                equal(p.port, json.loads(conn.getresponse().read())["port"])
                break
            except socket.timeout:
                assert time.monotonic() < deadline, "nothing answers"


@check()
def exported_server_that_listens_later():
    with Program("server.js") as p:
        equal(p.port, p.ready().json()["port"])
        p.await_output("own listen %d" % p.port)
        equal(p.port, p.json()["port"])


@check()
def server_of_net_and_a_look_at_the_port():
    with Program("net.js") as p:
        equal("EADDRINUSE", p.ready().text())


@check()
def cluster():
    with Program("cluster.js") as p:
        p.ready()
        deadline, seen = time.monotonic() + PATIENCE_S, set()
        while seen != {1, 2}:           # workers start one after the other
            seen.add(p.json()["worker"])
            assert time.monotonic() < deadline, seen


@check()
def addresses_by_both_ways():
    with Program("closes.js") as p:
        near, other = p.ready().json(), p.json()
        tcp = p.json(conn=p.connect_by_tcp())
    for address, peer, own in near, other, tcp:
        equal(("127.0.0.1", p.port), (address, own))
    assert len({near[1], other[1]}) == 2 and 0 < near[1] < 65536, (near, other)


@check()
def server_that_closes_ends_what_it_has_begun():
    with Program("closes.js") as p:
        equal("answered", p.ready().text("/close", headers={"Connection": "close"}))
        equal(7, p.process.wait(PATIENCE_S))


@check()
def closed_server():
    with Program("closes.js", STAYS="1") as p:
        equal("answered", p.ready().text("/close", headers={"Connection": "close"}))
        try:
            p.answer()
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            return
        raise AssertionError("it answers")


@check()
def keeps_connections():
    with Program("listener.js") as p:
        conn = p.ready().connect()
        for n in range(3):
            conn.request("GET", "/%d" % n)
            response = conn.getresponse()
            assert not response.will_close and not response.getheader("keep-alive"), response.headers
            equal("/%d" % n, json.loads(response.read())["url"])
            time.sleep(0.1)


@check()
def children_get_none_of_our_descriptors():
    with Program("children.js") as p:
        seen = [line.split(" ", 1) for line in p.ready().text().splitlines() if " " in line]
        own = [os.readlink("/proc/%d/fd/%d" % (p.process.pid, fd)) for fd in (3, 4, 5)]
    assert len(seen) >= 3, seen
    equal([], [(fd, to) for fd, to in seen if to in own])


@check()
def packages_of_node_path():
    for file in ("packages.js", "packages.mjs") if VERSION >= (18, 19) else ("packages.js",):
        with Program(file, NODE_PATH=os.path.join(FOLDER, "none", "node_modules") + ":"
                     + os.path.join(FOLDER, "elsewhere", "node_modules")) as p:
            equal("found" if file == "packages.js" else "found as a module, inner", p.ready().text())


# ---- Frameworks ----------------------------------------------------------------------------

@check()
def express():
    for listen, port in ("", ""), ("1", "3000"):
        with Program("express.js", LISTEN=listen) as p:
            equal({"ip": "127.0.0.1", "query": {"a": "&+ x"}}, p.ready().json("/ip?a=%26%2B+x"))


@check()
def koa():
    for export in "", "handler":
        with Program("koa.js", export) as p:
            equal({"ip": "127.0.0.1", "path": "/a%2Fb", "query": {"c": "1"}}, p.ready().json("/a%2Fb?c=1"))


@check()
def fastify():
    for listen in "", "now", "later":
        with Program("fastify.js", LISTEN=listen) as p:
            facts = p.ready().json("/ip?a=1")
            equal({"ip": "127.0.0.1", "query": {"a": "1"}, "hooks": ["ready"], "port": p.port, "idle": 0}, facts)
            if listen:
                p.await_output("listening")
                assert p.process.poll() is None and "rror" not in p.output(), p.output()
                equal(p.port, p.json("/ip")["port"])


@check()
def fastify_of_es_module():
    with Program("fastify.mjs") as p:
        equal({"ip": "127.0.0.1", "query": {}}, p.ready().json("/ip"))


@check(18)
def hono():
    with Program("hono.mjs") as p:
        equal({"query": {"a": "& b"}}, p.ready().json("/ip?a=%26+b"))


# ---- fetch handlers ------------------------------------------------------------------------

@check(most=17)
def fetch_needs_node_18():
    for file in "fetch.mjs", "fetch.js":
        with Program(file) as p:
            message, _ = p.failed()
            has(message, file, "fetch handler", "Node 18", "v%d." % VERSION[0])


@check(18)
def fetch_handler():
    with Program("fetch.mjs") as p:
        p.ready()
        equal({"url": "http://name.test/a%20b?c=%26", "method": "GET", "greeting": "hello"},
              p.json("/a%20b?c=%26", headers={"Host": "name.test"}))
        equal("https://name.test//other/x",
              p.json("//other/x", headers={"Host": "name.test", "X-Forwarded-Proto": "https"})["url"])
        equal(204, p.answer("/empty")[0].status)
        equal("http://name.test/*", p.json("*", method="OPTIONS", headers={"Host": "name.test"})["url"])


@check(18)
def fetch_bodies_and_fields():
    with Program("fetch.mjs") as p:
        p.ready()
        response, text = p.answer("/echo", method="POST", body="x" * 300000)
        equal((201, "Echoed", "x" * 300000), (response.status, response.reason, text))
        equal("300000", response.getheader("x-length"))
        equal(["a=1", "b=2, 3"], response.headers.get_all("set-cookie"))
        response, text = p.answer("/echo", method="PUT", body=iter([b"in ", b"chunks"]))
        equal("in chunks", text)
        equal("", p.answer("/stream", method="HEAD")[1])


@check(18)
def fetch_streams():
    with Program("fetch.mjs") as p:
        conn = p.ready().connect()
        conn.request("GET", "/stream")
        response = conn.getresponse()
        start = time.monotonic()
        equal(b"part 1\n", response.read1(100))
        assert time.monotonic() - start < 0.14, "the first part waited for the others"
        equal(b"part 2\npart 3\n", response.read())


@check(18)
def fetch_client_that_leaves():
    with Program("fetch.mjs") as p:
        conn = p.ready().connect()
        conn.request("GET", "/forever")
        equal(b"begin", conn.getresponse().read1(100))
        conn.sock.close()
        conn.close()
        p.await_output("aborted")
        p.await_output("cancelled")
        equal("hello", p.json()["greeting"])


@check(18)
def fetch_body_that_nobody_reads():
    with Program("fetch.mjs") as p:
        conn = p.ready().connect()
        for n in range(3):
            for target, status in ("/throws", 500), ("/", 200):
                conn.request("POST", target, b"x" * 3000000)
                response = conn.getresponse()
                response.read()
                equal((status, False), (response.status, response.will_close))


@check(18)
def fetch_client_that_leaves_amid_its_body():
    with Program("fetch.mjs") as p:
        p.ready()
        for target in "/echo", "/throws", "/forever":
            conn = p.connect()
            conn.putrequest("POST", target)
            conn.putheader("Content-Length", "1000000")
            conn.endheaders(b"x" * 1000)
            time.sleep(0.1)
            conn.close()
        p.await_output("aborted")
        equal("hello", p.json()["greeting"])
        equal(None, p.process.poll())


@check(18)
def fetch_handler_that_throws():
    with Program("fetch.mjs") as p:
        p.ready()
        for target in "/throws", "/nothing":
            equal(500, p.answer(target)[0].status)
        has(p.output(), "Error: inside the handler", "fetch.mjs")
        equal("hello", p.json()["greeting"])


@check(18)
def fetch_of_commonjs():
    with Program("fetch.js") as p:
        equal("fetched GET", p.ready().text())


# ---- What does not start -------------------------------------------------------------------

def starts_not(file, message, *details, export="", code=1, output=True):
    with Program(file, export) as p:
        got, trace = p.failed(code)
        has(got, message)
        has(trace, *details)
        assert "node.cjs" not in trace, trace
        if output:
            has(p.output(), message.split(": ")[-1])


@check()
def exception_while_loading():
    starts_not("throws.js", "TypeError: on purpose", "second line", "throws.js:2:", "at inner")


@check()
def text_thrown():
    starts_not("throws_text.js", "Uncaught 'only text", output=False)


@check()
def syntax_errors():
    starts_not("syntax.js", "SyntaxError: ", "syntax.js:")
    with Program("syntax.mjs") as p:    # only Node can say where, and does so at its end
        equal(1, p.process.wait(PATIENCE_S))
        while not p.ended:
            p.read(PATIENCE_S)
        equal(None, p.frame)
        has(p.output(), "/code/syntax.mjs:1\n", "SyntaxError: ")
    starts_not("names.mjs", "SyntaxError: ", "does not provide an export named", "names.mjs:2")


@check()
def file_or_package_that_is_not_there():
    starts_not("missing.js", "Error: Cannot find module", "missing.js")
    starts_not("missing.mjs", "Error", "missing.mjs", output=False)
    starts_not("imports.mjs", "Cannot find package 'not-there-at-all'", "imports.mjs")


@check()
def rejections_that_nobody_handles():
    starts_not("rejects.js", "RangeError: nobody handles it", "rejects.js:1:")
    starts_not("rejects.mjs", "RangeError: nobody handles it", "rejects.mjs:1:")


@check()
def port_that_is_taken():
    starts_not("busy.js", "EADDRINUSE", "code: 'EADDRINUSE'")


@check()
def callback_of_listen_that_throws():
    starts_not("callback.js", "Error: in the callback", "callback.js:2:")


@check()
def exit_before_listening():
    starts_not("exits.js", "exits.js exited with code 3 before it listened", code=3, output=False)


@check()
def await_without_end():
    starts_not("endless.mjs", "endless.mjs ended while it loaded: a top-level await never ends", code=13, output=False)


@check()
def nothing_to_serve():
    starts_not("nothing.js", "nothing.js neither listens nor exports what can serve requests; it exports a, b", output=False)
    starts_not("nothing.js", "nothing.js has no export c; it exports a, b", export="c")
    starts_not("listener.js", "listener.js: the export number can serve no requests", export="number")
    starts_not("listener.mjs", "listener.mjs has no export c", export="c")


@check()
def handlers_of_the_program_come_first():
    with Program("handles.js") as p:
        p.ready().json()
        has(p.output(), "handled rejection", "handled exception")


@check()
def errors_after_readiness():
    for target in ("/throw", "/reject") if VERSION[0] >= 15 else ("/throw",):
        with Program("crashes.js") as p:
            p.ready()
            try:
                p.answer(target)
            except (ConnectionError, http.client.HTTPException):
                pass
            equal(1, p.process.wait(PATIENCE_S))
            has(p.output(), "RangeError: after readiness", "crashes.js:")


# ---- All -----------------------------------------------------------------------------------

def packages():
    """Two packages that only NODE_PATH leads to: one in CommonJS and as a module."""
    folder = os.path.join(FOLDER, "elsewhere", "node_modules", "only-in-node-path")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for name, text in (
            ("package.json", json.dumps({"exports": {".": {"import": "./index.mjs", "require": "./index.js"},
                                                     "./inner": "./inner.mjs"}})),
            ("index.js", "module.exports = 'found'"), ("index.mjs", "export default 'found as a module'"),
            ("inner.mjs", "export const inner = ', inner'")):
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)


def run(test):
    name = "node %d: %s" % (VERSION[0], test.__name__.replace("_", " "))
    try:
        test()
    except Exception as error:
        return "FAIL %s: %s %s" % (name, type(error).__name__, str(error).replace("\n", " | "))
    return "ok " + name


def main():
    for fd in 3, 4, 5:                  # so that nothing of ours is there
        os.dup2(os.open("/dev/null", os.O_RDONLY), fd)
    packages()
    wanted = [test for test in checks if len(sys.argv) < 5 or test.__name__ in sys.argv[4:]]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        lines = list(pool.map(run, wanted))
    print("\n".join(lines))
    sys.exit(not lines or any(line.startswith("FAIL") for line in lines))


main()

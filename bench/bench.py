"""Side by side: the agent and what people use today, with the same programs, the same load
generator, on the same machine, in one run. build.sh bench calls it.

    bench.py [--quick] [--rounds N] [ROW...]

All subjects of a row run at once and are measured in turn, round after round; the median
counts. CPU is what the server's own processes used, in nanoseconds of the scheduler where the
kernel tells, so other work on the machine disturbs it less than it disturbs rates. Writes
out/bench/report.md and out/bench/report.svg. Everything listens on 127.0.0.1, or runs in a
guest.
"""
import argparse
import collections
import contextlib
import functools
import glob
import http.client
import os
import platform
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import msgpack

import clients

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = os.path.join(ROOT, "bench", "programs")
OUT = os.path.join(ROOT, "out", "bench")
VENV = os.path.join(OUT, "venv", "bin")
AGENT = os.path.join(ROOT, "out", "agent")
TWO_SCRIPT_INIT = os.environ.get("TWO_SCRIPT_INIT")      # a folder with init0.sh and init1.py
START_S, STOP_S, BOOT_S = 30, 10, 300
SETTLE_S = 1
UPLOAD_BYTES = 100_000
BEST = "uvicorn, httptools + uvloop"
VSOCK_ECHO = "vsock echo"

UPLOAD_LUA = """wrk.method = "POST"
wrk.body = string.rep("x", %d)
wrk.headers["Content-Type"] = "application/octet-stream"
""" % UPLOAD_BYTES

NGINX = """daemon off; worker_processes 1; pid {tmp}/nginx.pid; error_log {tmp}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {tmp}/b; proxy_temp_path {tmp}/p; fastcgi_temp_path {tmp}/f;
    scgi_temp_path {tmp}/s; uwsgi_temp_path {tmp}/u;
    keepalive_requests 1000000000;
    upstream program {{ server 127.0.0.1:{behind}; keepalive 256; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://program;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Forwarded-Host $http_host;
        }}
    }}
}}
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- Processes --------------------------------------------------------------------------

def tree(pid):
    """pid and all below it."""
    found = [pid]
    for at in found:
        for path in glob.glob("/proc/%d/task/*/children" % at):
            with contextlib.suppress(OSError), open(path) as f:
                found += map(int, f.read().split())
    return found


def cpu_seconds(pids):
    total = 0.0
    for pid in pids:
        try:
            for path in glob.glob("/proc/%d/task/*/schedstat" % pid):
                with open(path) as f:
                    total += int(f.read().split()[0]) / 1e9
        except (OSError, IndexError):
            with contextlib.suppress(OSError), open("/proc/%d/stat" % pid) as f:
                fields = f.read().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def memory_kib(pids):
    """Proportional share, so that what forked processes have in common counts once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError), open("/proc/%d/smaps_rollup" % pid) as f:
            total += int(re.search(r"^Pss:\s+(\d+)", f.read(), re.M).group(1))
    return total


class Server:
    """One subject of a row, running: its processes, and the port that the load goes to."""

    def __init__(self, name, commands):
        """commands: functions from a temporary folder and two ports to (argv, environment)."""
        self.name = name
        self.samples = []
        self.tmp = tempfile.TemporaryDirectory(prefix="bench.")
        self.port, self.behind = free_port(), free_port()
        self.log = open(os.path.join(self.tmp.name, "log"), "w+")
        self.processes = []
        for command in commands:
            argv, env = command(self.tmp.name, self.port, self.behind)
            env = dict(os.environ, PATH=VENV + ":" + os.environ["PATH"], PYTHONDONTWRITEBYTECODE="1", **env)
            self.processes.append(subprocess.Popen(argv, env=env, cwd=PROGRAMS, stdin=subprocess.DEVNULL,
                                                   stdout=self.log, stderr=self.log, start_new_session=True))

    def await_ready(self):
        deadline = time.monotonic() + START_S
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/")
                answer = connection.getresponse()
                if answer.status == 200 and answer.read() == b"hello, world\n":
                    return
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes):
                self.log.seek(0)
                raise SystemExit("%s does not start:\n%s" % (self.name, self.log.read()[-2000:]))
            time.sleep(0.05)

    def pids(self):
        return [pid for p in self.processes for pid in tree(p.pid)]

    def stop(self):
        pids = self.pids()
        for p in self.processes:
            p.terminate()
        for p in self.processes:
            try:
                p.wait(STOP_S)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        for pid in pids:                # a worker that outlived its master
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.log.close()
        self.tmp.cleanup()


# ---- Load ---------------------------------------------------------------------------------

Sample = collections.namedtuple("Sample", "rate p50 p99 cpu_us memory_mib errors")
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


def wrk(port, connections, seconds, path="/", script=None):
    """(requests, requests per second, p50 ms, p99 ms, errors)"""
    argv = ["wrk", "-t1", "-c%d" % connections, "-d%ds" % seconds, "--latency"]
    argv += ["-s", script] if script else []
    text = subprocess.run(argv + ["http://127.0.0.1:%d%s" % (port, path)], check=True,
                          capture_output=True, text=True).stdout
    requests = int(re.search(r"(\d+) requests in", text).group(1))
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))
    percentiles = [float(n) * UNITS[unit] for n, unit in re.findall(r"(?:50|99)%\s+([\d.]+)(us|ms|s|m)\b", text)]
    errors = sum(map(int, re.findall(r"(?:connect|read|write|timeout|Non-2xx or 3xx responses:?) (\d+)", text)))
    return requests, rate, percentiles[0], percentiles[1], errors


def at_rate(port, connections, seconds, rate):
    """p99 in ms of requests that leave at a steady pace."""
    with tempfile.NamedTemporaryFile("r") as log:
        subprocess.run(["h2load", "--h1", "-t1", "-c%d" % connections, "--rps=%g" % (rate / connections),
                        "-D%d" % seconds, "--log-file=" + log.name, "http://127.0.0.1:%d/" % port],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times = sorted(int(line.split("\t")[2]) / 1e3 for line in log)
    return times[int(len(times) * 0.5)], times[int(len(times) * 0.99)], len(times) / seconds


def requests(load):
    """What measures a load: memory is that after it."""
    def measure(server, seconds):
        before = cpu_seconds(server.pids())
        count, rate, p50, p99, errors = load(server, seconds)
        pids = server.pids()
        cpu = cpu_seconds(pids) - before
        return Sample(rate, p50, p99, 1e6 * cpu / max(count, 1), memory_kib(pids) / 1024, errors)
    return measure


def hello(connections, path="/", script=None):
    return requests(lambda server, seconds: wrk(server.port, connections, seconds, path, script))


def websockets(connections):
    """Memory is that while all are open and silent."""
    def measure(server, seconds):
        with contextlib.ExitStack() as open_ones:
            sockets = [clients.websocket(server.port) for _ in range(connections)]
            for s in sockets:
                open_ones.callback(clients.websocket_close, s)
            time.sleep(SETTLE_S)
            pids = server.pids()
            memory, before, start = memory_kib(pids) / 1024, cpu_seconds(pids), time.perf_counter()
            times = clients.echoes(sockets, seconds)
            took, cpu = time.perf_counter() - start, cpu_seconds(pids) - before
        return Sample(len(times) / took, *clients.percentiles(times), 1e6 * cpu / len(times), memory, 0)
    return measure


# ---- A CPU for each ------------------------------------------------------------------------

SHARE, SHARE_PERIOD_US = 0.5, 10_000


def cpu_groups():
    """cgroups(7): the top of the hierarchy with the controller cpu, our own group in it, and what
    limits a group to SHARE of a CPU."""
    quota = int(SHARE * SHARE_PERIOD_US)
    with open("/proc/self/cgroup") as f:
        groups = {controllers: path for _, controllers, path in (line.rstrip("\n").split(":", 2) for line in f)}
    for controllers, path in groups.items():
        if "cpu" in controllers.split(","):
            return ("/sys/fs/cgroup/" + controllers, path,
                    {"cpu.cfs_period_us": str(SHARE_PERIOD_US), "cpu.cfs_quota_us": str(quota)})
    return "/sys/fs/cgroup", groups.get("", "/"), {"cpu.max": "%d %d" % (quota, SHARE_PERIOD_US)}


@contextlib.contextmanager
def shares(pids):
    """Each of the processes, and all of the load together, has SHARE of a CPU that nobody else
    takes: what they would find on a machine with more CPUs, if slower ones."""
    top, home, limit = cpu_groups()

    def write(path, text):
        with open(top + path, "w") as f:
            f.write(text)
    groups = {pid: "/agent-bench.%d" % pid for pid in [os.getpid(), *pids]}
    if "cpu.max" in limit:
        write("/cgroup.subtree_control", "+cpu")
    try:
        for pid, group in groups.items():
            os.mkdir(top + group)
            for name, text in limit.items():
                write(group + "/" + name, text)
            write(group + "/cgroup.procs", str(pid))
        yield
    finally:
        for pid, group in groups.items():
            with contextlib.suppress(OSError):      # it has ended, or there is no such group
                write(home + "/cgroup.procs", str(pid))
            with contextlib.suppress(OSError):
                os.rmdir(top + group)


def shared(measure):
    def measure_shared(server, seconds):
        with shares(server.pids()):
            return measure(server, seconds)
    return measure_shared


def can_share():
    try:
        with shares([]):
            return True
    except OSError as e:
        print("== share: left out, it takes root and a cgroup of its own: %s" % e, file=sys.stderr)
        return False


def median(samples):
    return type(samples[0])(*(statistics.median(column) for column in zip(*samples)))


# ---- Subjects and rows --------------------------------------------------------------------

def agent(*program):
    return lambda tmp, port, behind: (
        [AGENT, "run", "--listen", "tcp:127.0.0.1:%d" % port, PROGRAMS, *program], {})


def python(*argv):
    return lambda tmp, port, behind: (
        [os.path.join(VENV, argv[0]), *(arg.format(port=port) for arg in argv[1:])], {})


def nginx(tmp, port, behind):
    path = os.path.join(tmp, "nginx.conf")
    with open(path, "w") as f:
        f.write(NGINX.format(tmp=tmp, port=port, behind=behind))
    return ["/usr/sbin/nginx", "-p", tmp, "-c", path], {}


def node(tmp, port, behind):
    return ["node", "server.cjs"], {"PORT": str(port)}


def node_behind(tmp, port, behind):
    return ["node", "server.cjs"], {"PORT": str(behind)}


def executable(tmp, port, behind):
    return [os.path.join(OUT, "server")], {"PORT": str(port)}


def executable_behind(tmp, port, behind):
    return [os.path.join(OUT, "server")], {"PORT": str(behind)}


UVICORN = ("uvicorn", "asgi:app", "--host=127.0.0.1", "--port={port}", "--no-access-log", "--log-level=warning")
ASGI = [
    ("agent", [agent("asgi:app")]),
    (BEST, [python(*UVICORN, "--http=httptools", "--loop=uvloop")]),
    ("uvicorn, plain", [python(*UVICORN, "--http=h11", "--loop=asyncio")]),
    ("hypercorn", [python("hypercorn", "--bind=127.0.0.1:{port}", "--workers=1", "--log-level=warning", "asgi:app")]),
    ("gunicorn, uvicorn worker", [python("gunicorn", "--bind=127.0.0.1:{port}", "--workers=1", "--log-level=warning",
                                         "--worker-class=uvicorn.workers.UvicornWorker", "asgi:app")]),
]
WEBSOCKET = [subject for subject in ASGI if subject[0] != "uvicorn, plain"]
WSGI = [
    ("agent", [agent("wsgi:app")]),
    ("gunicorn, sync", [python("gunicorn", "--bind=127.0.0.1:{port}", "--workers=1", "--log-level=warning", "wsgi:app")]),
]
NODE = [
    ("agent", [agent("server.cjs")]),
    ("bare Node", [node]),
    ("nginx to Node", [node_behind, nginx]),
]
EXECUTABLE = [
    ("agent", [agent(os.path.join(OUT, "server"))]),
    ("nginx to executable", [executable_behind, nginx]),
    ("the executable alone", [executable]),
]
UPLOAD = os.path.join(OUT, "upload.lua")

# name, what it is, subjects, what measures one
ROWS = [
    ("hello1", "hello, 1 connection", ASGI, hello(1)),
    ("hello8", "hello, 8 connections", ASGI, hello(8)),
    ("hello64", "hello, 64 connections", ASGI, hello(64)),
    ("large", "100 kB response, 16 connections", ASGI, hello(16, "/large")),
    ("share", "100 kB response, 16 connections, half a CPU for each process", ASGI[:2], shared(hello(16, "/large"))),
    ("upload", "100 kB upload, 16 connections", ASGI, hello(16, "/", UPLOAD)),
    ("wsgi", "WSGI hello, 16 connections", WSGI, hello(16)),
    ("node", "Node hello, 64 connections", NODE, hello(64)),
    ("proxy", "executable behind a proxy, 64 connections", EXECUTABLE, hello(64)),
    ("websocket", "64 WebSockets, idle for the memory, then an echo under way on each", WEBSOCKET, websockets(64)),
]

# row, column, whom we are compared with (None: the figure itself), the least (or greatest) ratio
GOALS = [
    ("hello64", "cpu_us", BEST, 1 / 1.4), ("hello64", "rate", BEST, 1.2),
    ("hello1", "rate", BEST, 0.9), ("hello8", "rate", BEST, 0.9),
    ("large", "rate", BEST, 1.2), ("share", "rate", BEST, 1.2), ("upload", "rate", BEST, 1.2),
    ("wsgi", "rate", "gunicorn, sync", 2.0),
    ("node", "rate", "bare Node", 0.85),
    ("proxy", "rate", "nginx to executable", 1.2),
    ("latency", "p99", BEST, 1.0),
    ("guest", "p50", VSOCK_ECHO, 4.0), ("guest16", "rate", None, 450),
]


def run_row(title, subjects, measure, rounds, seconds):
    """{subject: Samples, one of each round}. Before, each runs until what compiles it is done (V8)."""
    print("== " + title, file=sys.stderr)
    servers = []
    try:
        for name, commands in subjects:
            servers.append(Server(name, commands))
            servers[-1].await_ready()
            measure(servers[-1], 2 * seconds)
        for _ in range(rounds):
            for server in servers:
                server.samples.append(measure(server, seconds))
        return {server.name: server.samples for server in servers}
    finally:
        for server in servers:
            server.stop()


def paced(rate):
    def load(server, seconds):
        p50, p99, got = at_rate(server.port, 8, max(1, round(seconds)), rate)
        return int(got * max(1, round(seconds))), got, p50, p99, 0
    return requests(load)


def run_latency(rounds, seconds):
    """Both at half of what the slower of the two can do."""
    full = run_row("the most that each does, 8 connections", ASGI[:2], hello(8), 1, seconds)
    rate = min(median(samples).rate for samples in full.values()) / 2
    title = "hello at %d requests a second, 8 connections" % rate
    return title, run_row(title, ASGI[:2], paced(rate), rounds, seconds)


# ---- Guests ---------------------------------------------------------------------------------

Boot = collections.namedtuple("Boot", "init_ms all_ms")
RuntimeBoot = collections.namedtuple("RuntimeBoot", "ready_ms ready_from_power_ms hello_ms")
ECHO_PORT, ECHO = 7000, b"x" * 100
GUEST_REQUESTS = 200
GUEST_CPUS = os.environ.setdefault("GUEST_CPUS", "2")   # for guest.sh: the agent and its worker have one each
HASH = "cafe" * 16                      # of the program: it names the guest
WIRE = msgpack.packb({"scope": {"type": "http", "path": "/", "method": "GET", "query_string": "",
                                "headers": [[b"host", b"guest"]], "body": b""}})
HTTP = b"GET / HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n"


class Guest:
    """One that runs the file `init` as its init. As a server it has pids: its emulator's."""

    def __init__(self, init, *image):
        self.tmp = tempfile.TemporaryDirectory(prefix="bench.")
        self.vsock = os.path.join(self.tmp.name, "v.sock")
        self.log = open(os.path.join(self.tmp.name, "log"), "w+")
        self.host = socket.socket(socket.AF_UNIX)
        self.host.bind(self.vsock + "_52")
        self.host.listen()
        self.process = subprocess.Popen(["bash", os.path.join(ROOT, "bench", "guest.sh"), init, self.tmp.name, *image],
                                        stdin=subprocess.PIPE, stdout=self.log, stderr=self.log)

    def pids(self):
        return tree(self.process.pid)

    def fail(self, what):
        self.log.seek(0)
        with contextlib.suppress(OSError), open(self.tmp.name + "/console", errors="replace") as console:
            what += "\n" + console.read()[-2000:]
        raise SystemExit("guest: %s\n%s" % (what, self.log.read()[-2000:]))

    def await_ready(self):
        """From the kernel having loaded its modules and from power on to the ready message, both
        by this machine's clock. A boot that is tried again gets another console."""
        console, inode, on, up = self.tmp.name + "/console", None, None, None
        deadline = time.monotonic() + BOOT_S
        while not select.select([self.host], [], [], 0.001)[0]:
            now = time.monotonic()
            with contextlib.suppress(OSError):
                if os.stat(console).st_ino != inode:
                    inode, on, up = os.stat(console).st_ino, now, None
                if not up:
                    with open(console, "rb") as f:
                        up = now if b"modules loaded" in f.read() else None
            if now > deadline or self.process.poll() is not None:
                self.fail("not ready")
        now = time.monotonic()
        with self.host.accept()[0] as s:
            message = msgpack.unpackb(b"".join(iter(lambda: s.recv(4096), b"")))
        if message["version"] != "2.0.0" or not up:
            self.fail("%r" % message)
        return Boot(1e3 * (now - up), 1e3 * (now - on))

    def call(self, *words):
        if subprocess.run([AGENT, "call", self.vsock, *words], stdout=self.log, stderr=self.log).returncode:
            self.fail("%s fails" % words[0])

    def stop(self):
        self.process.stdin.close()
        self.process.wait()
        self.host.close()
        self.log.close()
        self.tmp.cleanup()


def boot_once(init):
    guest = Guest(init)
    try:
        return guest.await_ready()
    finally:
        guest.stop()


def runtime_once(image, init=""):
    """Of a runtime's image as it is, up to a program's first answer too; or with another init, up to
    its ready message."""
    guest = Guest(init, image)
    try:
        up, on = guest.await_ready()
        hello = float("nan")
        if not init:
            start = time.monotonic()
            entry = "asgi:app" if "python" in os.path.basename(image) else "server.cjs"
            guest.call("configure", PROGRAMS, entry)
            guest.call("request", "/")
            hello = on + 1e3 * (time.monotonic() - start)
        return RuntimeBoot(up, on, hello)
    finally:
        guest.stop()


def run_runtimes(rounds):
    """{runtime: RuntimeBoots} of the images in out/, each beside itself with an init that says ready."""
    inits = {"agent": "", "an init that says ready": os.path.join(OUT, "vsock")}
    images = sorted(glob.glob(os.path.join(ROOT, "out", "*.squashfs")))
    if not images:
        raise SystemExit("boot: no out/*.squashfs: ./build.sh image NAME makes one")
    print("== boot", file=sys.stderr)
    boots = {}
    for _ in range(rounds):
        for image in images:
            for name, init in inits.items():
                subject = "%s: %s" % (os.path.splitext(os.path.basename(image))[0], name)
                boots.setdefault(subject, []).append(runtime_once(image, init))
    return boots


def guest_sample(guest, load, ask, expected):
    """The answers are as long as the first one, which was looked at: dates differ."""
    before, start = cpu_seconds(guest.pids()), time.perf_counter()
    first = ask()
    if expected not in first:
        guest.fail("it answers %r" % first)
    errors = 0

    def checked():
        nonlocal errors
        errors += len(ask()) != len(first)
    times = load(checked)
    took, cpu = time.perf_counter() - start, cpu_seconds(guest.pids()) - before
    return Sample(len(times) / took, *clients.percentiles(times), 1e6 * cpu / len(times),
                  memory_kib(guest.pids()) / 1024, errors)


def guest_requests(init, rounds, seconds):
    """{subject: Samples} of requests in turn and of 16 at once, in one guest."""
    is_agent = init == AGENT
    guest = Guest(init)
    try:
        guest.await_ready()
        with tempfile.TemporaryDirectory(prefix="bench.") as code:
            for file in [os.path.join(PROGRAMS, "asgi.py"), os.path.join(OUT, "vsock")]:
                shutil.copy(file, code)
            guest.call("configure", "--hash", HASH, code, "asgi:app")
        ask = functools.partial(clients.exchange, guest.vsock)
        subjects = {"agent" if is_agent else "two-script init": (lambda: ask(52, WIRE), b"hello, world\n")}
        if is_agent:
            guest.call("shell", "chmod +x /opt/vsock; setsid -w /opt/vsock </dev/null >/dev/null 2>&1")
            subjects["agent, port 80"] = (lambda: ask(80, HTTP), b"hello, world\n")
            subjects[VSOCK_ECHO] = (lambda: ask(ECHO_PORT, ECHO, len(ECHO)), ECHO)
        loads = (functools.partial(clients.in_turn, GUEST_REQUESTS), functools.partial(clients.at_once, 16, seconds))
        samples = [{name: [] for name in subjects} for _ in loads]
        for turn in range(rounds + 1):
            for load, table in zip(loads, samples):
                for name, subject in subjects.items():
                    sample = guest_sample(guest, load, *subject)
                    if turn > 0:        # the first is for warming up
                        table[name].append(sample)
        return samples
    finally:
        guest.stop()


def run_guest(rounds, seconds):
    """The rows of guests: (name, title, results)."""
    inits = {"agent": AGENT, "an init that says ready": os.path.join(OUT, "vsock")}
    if TWO_SCRIPT_INIT:
        inits["two-script init"] = os.path.join(TWO_SCRIPT_INIT, "init0.sh")
    print("== guests", file=sys.stderr)
    boots = {name: [] for name in inits}
    for _ in range(rounds):
        for name, init in inits.items():
            boots[name].append(boot_once(init))
    yield "ready", "boot of a guest to its ready message", boots
    tables = guest_requests(AGENT, rounds, seconds)
    if TWO_SCRIPT_INIT:
        for table, more in zip(tables, guest_requests(inits["two-script init"], rounds, seconds)):
            table.update(more)
    yield "guest", "in a guest: hello, in turn, each on a connection of its own", tables[0]
    yield "guest16", "in a guest: hello, 16 at once, each on a connection of its own", tables[1]


# ---- Reports --------------------------------------------------------------------------------

FORMATS = {
    Sample: (["requests/s", "p50 ms", "p99 ms", "CPU µs/request", "memory MiB", "errors"],
             ["%.0f", "%.2f", "%.2f", "%.1f", "%.1f", "%d"]),
    Boot: (["ms from a kernel with its modules", "ms from power on"], ["%.0f", "%.0f"]),
    RuntimeBoot: (["ready, ms from a kernel with its modules", "ready, ms from power on", "first hello, ms from power on"],
                  ["%.0f", "%.0f", "%.0f"]),
}


def formats(subjects):
    return FORMATS[type(next(iter(subjects.values()))[0])]


def cell(form, value):
    return form % value if value == value else ""      # what was not measured is no number


def tell(subjects):
    heads, forms = formats(subjects)
    for name, samples in subjects.items():
        print("   %-28s " % name + "  ".join((form + " " + head) % value
                                             for head, form, value in zip(heads, forms, median(samples))), file=sys.stderr)


def goals(results):
    """Rows of the table of goals, for what was measured. A round's figures are compared with each
    other, as the machine differs from one to the next; the median of that counts."""
    for row, column, other, goal in GOALS:
        title, subjects = results.get(row, ("", {}))
        if "agent" not in subjects or (other and other not in subjects):
            continue
        ours, theirs = ([getattr(s, column) for s in subjects[name]] if name else [1] * len(subjects["agent"])
                        for name in ("agent", other))
        got = statistics.median(a / b for a, b in zip(ours, theirs))
        at_least = column == "rate"
        good = got >= goal if at_least else got <= goal
        digits = "%.2f" if other else "%.0f"
        yield "| %s | %s | %s | %s | %s %s | %s |" % (title, column, other or "", digits % got, ">=" if at_least else "<=",
                                                      digits % goal, "met" if good else "missed")


def markdown(results, args):
    cpu = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read())
    lines = ["# Benchmarks", "", "%s, %d CPUs%s, %s. Each figure is the median of %d runs of %g s." % (
        time.strftime("%Y-%m-%d", time.gmtime()), os.cpu_count(), " (%s)" % cpu.group(1) if cpu else "",
        platform.system() + " " + platform.release(), args.rounds, args.seconds),
        "CPU is that of the server's processes, per request; memory is their proportional share after the load.",
        "Of a guest both are the emulator's; a run of its requests in turn has %d." % GUEST_REQUESTS]
    for title, subjects in results.values():
        heads, forms = formats(subjects)
        lines += ["", "## " + title[0].upper() + title[1:], "", "| | " + " | ".join(heads) + " |",
                  "|---|" + "---:|" * len(heads)]
        lines += ["| " + " | ".join([name] + [cell(form, value) for form, value in zip(forms, median(samples))]) + " |"
                  for name, samples in subjects.items()]
    lines += ["", "## Goals", "", "| | | compared with | ratio or figure | goal | |", "|---|---|---|---:|---:|---|"]
    return "\n".join(lines + list(goals(results))) + "\n"


def svg(results):
    """A bar for each subject of each row: its first column, longest in its row."""
    y, parts = 10, []
    for title, subjects in results.values():
        bars = {name: median(samples)[0] for name, samples in subjects.items()}
        most = max(bars.values())
        parts.append('<text x="10" y="%d" font-weight="bold">%s (%s)</text>' % (y + 14, title, formats(subjects)[0][0]))
        y += 22
        for name, bar in bars.items():
            parts.append('<text x="200" y="%d" text-anchor="end">%s</text>'
                         '<rect x="208" y="%d" width="%.1f" height="13" fill="%s"/>'
                         '<text x="%.1f" y="%d">%.0f</text>' % (
                             y + 11, name, y, 420 * bar / most, "#2563eb" if name.startswith("agent") else "#9ca3af",
                             214 + 420 * bar / most, y + 11, bar))
            y += 17
        y += 12
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="700" height="%d" font-family="sans-serif" '
            'font-size="12"><rect width="100%%" height="100%%" fill="white"/>\n%s\n</svg>\n' % (y, "\n".join(parts)))


def rows(chosen, rounds, seconds):
    """(name, title, {subject: figures}), measured one after the other."""
    for name, title, subjects, measure in ROWS:
        if name in chosen and (name != "share" or can_share()):
            yield name, title, run_row(title, subjects, measure, rounds, seconds)
    if "latency" in chosen:
        yield ("latency", *run_latency(rounds, seconds))
    if "boot" in chosen:
        yield "boot", "boots of the runtimes in out/", run_runtimes(rounds)
    if "guest" in chosen:
        yield from run_guest(rounds, seconds)


def main():
    known = [row[0] for row in ROWS] + ["latency", "guest", "boot"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="runs of 1 s instead of 3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="of: " + ", ".join(known))
    args = parser.parse_args()
    args.seconds = 1 if args.quick else 3
    unknown = set(args.rows) - set(known)
    if unknown:
        parser.error("no such row: " + ", ".join(sorted(unknown)))
    with open(UPLOAD, "w") as f:
        f.write(UPLOAD_LUA)
    results = {}
    for name, title, subjects in rows(args.rows or known[:-1], args.rounds, args.seconds):
        tell(subjects)
        results[name] = title, subjects
        # After every row: one that fails does not take the others with it.
        report = markdown(results, args)
        with open(os.path.join(OUT, "report.md"), "w") as f:
            f.write(report)
        with open(os.path.join(OUT, "report.svg"), "w") as f:
            f.write(svg(results))
    print(report)


if __name__ == "__main__":
    main()

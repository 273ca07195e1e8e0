"""Side by side: the agent and what people use today, with the same programs, the same load
generator, on the same machine, in one run. build.sh bench calls it.

    bench.py [--quick] [--rounds N] [ROW...]

All subjects of a row run at once and are measured in turn, round after round; the median
counts. CPU is what the server's own processes used, in nanoseconds of the scheduler where the
kernel tells, so other work on the machine disturbs it less than it disturbs rates. Writes
out/bench/report.md and out/bench/report.svg. Everything listens on 127.0.0.1.
"""
import argparse
import collections
import contextlib
import glob
import http.client
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = os.path.join(ROOT, "bench", "programs")
OUT = os.path.join(ROOT, "out", "bench")
VENV = os.path.join(OUT, "venv", "bin")
AGENT = os.path.join(ROOT, "out", "agent")
START_S, STOP_S = 30, 10
UPLOAD_BYTES = 100_000
BEST = "uvicorn, httptools + uvloop"

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


def measure(server, load, seconds):
    before = cpu_seconds(server.pids())
    requests, rate, p50, p99, errors = load(server, seconds)
    pids = server.pids()
    cpu = cpu_seconds(pids) - before
    return Sample(rate, p50, p99, 1e6 * cpu / max(requests, 1), memory_kib(pids) / 1024, errors)


def hello(connections, path="/", script=None):
    return lambda server, seconds: wrk(server.port, connections, seconds, path, script)


def median(samples):
    return Sample(*(statistics.median(column) for column in zip(*samples)))


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

# name, what it is, subjects, load
ROWS = [
    ("hello1", "hello, 1 connection", ASGI, hello(1)),
    ("hello8", "hello, 8 connections", ASGI, hello(8)),
    ("hello64", "hello, 64 connections", ASGI, hello(64)),
    ("large", "100 kB response, 16 connections", ASGI, hello(16, "/large")),
    ("upload", "100 kB upload, 16 connections", ASGI, hello(16, "/", UPLOAD)),
    ("wsgi", "WSGI hello, 16 connections", WSGI, hello(16)),
    ("node", "Node hello, 64 connections", NODE, hello(64)),
    ("proxy", "executable behind a proxy, 64 connections", EXECUTABLE, hello(64)),
]

# row, column, whom we are compared with, the least (or greatest) ratio
GOALS = [
    ("hello64", "cpu_us", BEST, 1 / 1.4), ("hello64", "rate", BEST, 1.2),
    ("hello1", "rate", BEST, 0.9), ("hello8", "rate", BEST, 0.9),
    ("large", "rate", BEST, 1.2), ("upload", "rate", BEST, 1.2),
    ("wsgi", "rate", "gunicorn, sync", 2.0),
    ("node", "rate", "bare Node", 0.85),
    ("proxy", "rate", "nginx to executable", 1.2),
    ("latency", "p99", BEST, 1.0),
]


def run_row(title, subjects, load, rounds, seconds):
    """{subject: Sample}"""
    print("== " + title, file=sys.stderr)
    servers = []
    try:
        for name, commands in subjects:
            servers.append(Server(name, commands))
            servers[-1].await_ready()
            load(servers[-1], 1)
        for _ in range(rounds):
            for server in servers:
                server.samples.append(measure(server, load, seconds))
        results = {server.name: median(server.samples) for server in servers}
    finally:
        for server in servers:
            server.stop()
    for name, s in results.items():
        print("   %-28s %8.0f/s  p50 %6.2f  p99 %6.2f ms  %6.1f us CPU  %6.1f MiB%s" % (
            name, s.rate, s.p50, s.p99, s.cpu_us, s.memory_mib, "  %d errors" % s.errors if s.errors else ""),
            file=sys.stderr)
    return results


def paced(rate):
    def load(server, seconds):
        p50, p99, got = at_rate(server.port, 8, max(1, round(seconds)), rate)
        return int(got * max(1, round(seconds))), got, p50, p99, 0
    return load


def run_latency(rounds, seconds):
    """Both at half of what the slower of the two can do."""
    full = run_row("the most that each does, 8 connections", ASGI[:2], hello(8), 1, seconds)
    rate = min(s.rate for s in full.values()) / 2
    title = "hello at %d requests a second, 8 connections" % rate
    return title, run_row(title, ASGI[:2], paced(rate), rounds, seconds)


# ---- Reports --------------------------------------------------------------------------------

def markdown(results, args):
    cpu = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read())
    lines = ["# Benchmarks", "", "%s, %d CPUs%s, %s. Each figure is the median of %d runs of %g s." % (
        time.strftime("%Y-%m-%d", time.gmtime()), os.cpu_count(), " (%s)" % cpu.group(1) if cpu else "",
        platform.system() + " " + platform.release(), args.rounds, args.seconds),
        "CPU is that of the server's processes, per request; memory is their proportional share after the load."]
    for name, (title, subjects) in results.items():
        lines += ["", "## " + title[0].upper() + title[1:], "",
                  "| | requests/s | p50 ms | p99 ms | CPU µs/request | memory MiB | errors |",
                  "|---|---:|---:|---:|---:|---:|---:|"]
        for subject, s in subjects.items():
            lines.append("| %s | %.0f | %.2f | %.2f | %.1f | %.1f | %d |" % ((subject,) + s))
    lines += ["", "## Goals", "", "| | | compared with | ratio | goal | |", "|---|---|---|---:|---:|---|"]
    for row, column, other, goal in GOALS:
        if row not in results or other not in results[row][1]:
            continue
        title, subjects = results[row]
        ratio = getattr(subjects["agent"], column) / getattr(subjects[other], column)
        good = ratio >= goal if column == "rate" else ratio <= goal
        lines.append("| %s | %s | %s | %.2f | %s %.2f | %s |" % (
            title, column, other, ratio, ">=" if column == "rate" else "<=", goal, "met" if good else "missed"))
    return "\n".join(lines) + "\n"


def svg(results):
    """A bar for each subject of each row: requests per second, longest in its row."""
    y, parts = 10, []
    for title, subjects in results.values():
        most = max(s.rate for s in subjects.values())
        parts.append('<text x="10" y="%d" font-weight="bold">%s (requests/s)</text>' % (y + 14, title))
        y += 22
        for name, s in subjects.items():
            parts.append('<text x="200" y="%d" text-anchor="end">%s</text>'
                         '<rect x="208" y="%d" width="%.1f" height="13" fill="%s"/>'
                         '<text x="%.1f" y="%d">%.0f</text>' % (
                             y + 11, name, y, 420 * s.rate / most, "#2563eb" if name == "agent" else "#9ca3af",
                             214 + 420 * s.rate / most, y + 11, s.rate))
            y += 17
        y += 12
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="700" height="%d" font-family="sans-serif" '
            'font-size="12"><rect width="100%%" height="100%%" fill="white"/>\n%s\n</svg>\n' % (y, "\n".join(parts)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="runs of 1 s instead of 3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="of: " + ", ".join([r[0] for r in ROWS] + ["latency"]))
    args = parser.parse_args()
    args.seconds = 1 if args.quick else 3
    unknown = set(args.rows) - {row[0] for row in ROWS} - {"latency"}
    if unknown:
        parser.error("no such row: " + ", ".join(sorted(unknown)))
    with open(UPLOAD, "w") as f:
        f.write(UPLOAD_LUA)
    results = {}
    for name, title, subjects, load in ROWS:
        if not args.rows or name in args.rows:
            results[name] = title, run_row(title, subjects, load, args.rounds, args.seconds)
    if not args.rows or "latency" in args.rows:
        results["latency"] = run_latency(args.rounds, args.seconds)
    report = markdown(results, args)
    with open(os.path.join(OUT, "report.md"), "w") as f:
        f.write(report)
    with open(os.path.join(OUT, "report.svg"), "w") as f:
        f.write(svg(results))
    print(report)


if __name__ == "__main__":
    main()

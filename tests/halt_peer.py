"""The host at the moment of a halt: halt_peer.py SOCKET CLAUSE

Opens what the clause says, halts, and checks that STOP and STOPZ come within the host's 5 s. One
line for each check, `ok NAME` or `FAIL NAME: why`.
"""
import socket
import sys
import threading
import time

import msgpack

from peer import Peer

LIMIT_S = 5.0
REQUESTS = 50


def check(name, right, why=""):
    print("ok " + name if right else "FAIL %s: %s" % (name, why), flush=True)


def get(peer, path):
    return peer.request(path).get("body", {}).get("body", b"").decode()


def start_request(address, port, path):
    """A request that nobody has answered yet; its socket."""
    peer = Peer(address, port)
    s = peer.connect()
    if port == 52:
        s.sendall(msgpack.packb(peer.scope(path)))
    else:
        s.sendall(b"GET %s HTTP/1.1\r\nHost: guest\r\n\r\n" % path.encode())
    return s


def start_upload(address, port):
    """Half of a request's body."""
    peer = Peer(address, port)
    s = peer.connect()
    if port == 52:
        whole = msgpack.packb(peer.scope("/", method="POST", body=bytes(1 << 20)))
        s.sendall(whole[:len(whole) // 2])
    else:
        s.sendall(b"POST / HTTP/1.1\r\nHost: guest\r\nContent-Length: 1048576\r\n\r\n" + bytes(1 << 19))
    return s


def wait_until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.1)


class Guest:
    def __init__(self, address, clause):
        self.address, self.clause = address, clause
        self.peer = Peer(address)
        self.opened = []                # (port, socket) of what is in flight

    def load(self):
        """50 requests in flight on both ports, 100 children, a token that was not synced."""
        get(self.peer, "/fork")
        for i in range(REQUESTS):
            port = 80 if i % 2 else 52
            self.opened.append((port, start_request(self.address, port, "/wait")))
        wait_until(lambda: get(self.peer, "/inflight") == str(REQUESTS), 60, "50 requests in flight")
        check(self.clause + ": token is written", get(self.peer, "/write/" + self.clause.replace(" ", "-")) == "written")

    def upload(self):
        self.uploads = [start_upload(self.address, 52), start_upload(self.address, 80)]
        time.sleep(0.3)

    def halt(self, times=1):
        """Halts on so many connections and reads what comes back."""
        answers = [None] * times

        def one(i):
            answers[i] = self.peer.raw(b"halt")

        start = time.monotonic()
        threads = [threading.Thread(target=one, args=(i,)) for i in range(times)]
        for thread in threads:
            thread.start()
            time.sleep(0.2 if times > 1 else 0)
        for thread in threads:
            thread.join()
        took = time.monotonic() - start
        check(self.clause + ": STOP, STOPZ", set(answers) == {b"STOP\nSTOPZ\n"}, answers)
        check("%s: within 5 s (%.1f)" % (self.clause, took), took < LIMIT_S, "it took %.1f s" % took)

    def hang_up(self):
        """74: asks and goes away."""
        with self.peer.connect() as s:
            s.sendall(b"halt")
            time.sleep(0.05)

    def check_answers(self):
        """Whoever asked on port 52 hears something, as the host kills a machine that says nothing."""
        silent = 0
        for port, s in self.opened:
            s.settimeout(5)
            try:
                answer = s.recv(65536)
            except OSError:
                answer = b""
            silent += port == 52 and not answer
        check(self.clause + ": every request in flight is answered", silent == 0, "%d of 25 are not" % silent)


def main():
    guest = Guest(sys.argv[1], sys.argv[2])
    clause = guest.clause
    if clause.startswith("load"):
        guest.load()
    if "upload" in clause:
        guest.upload()
    if "bridge" in clause:
        check(clause + ": the guest API is open", get(guest.peer, "/bridge") == "open")
    if "stuck" in clause:
        guest.opened.append((52, start_request(guest.address, 52, "/block")))
        time.sleep(0.5)
    if "command" in clause:
        command = guest.peer.connect()
        command.sendall(b"!cd /data; while :; do date >command; sleep 0.01; done\n")
        time.sleep(0.3)
    if "hangs up" in clause:
        guest.hang_up()
    else:
        guest.halt(2 if "twice" in clause else 1)
        guest.check_answers()


main()

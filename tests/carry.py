#!/usr/bin/env python3
"""Carries requests to the program tests/apps/echo over port 52 or port 80 of a guest, and
checks every byte of the answers.

    carry.py SOCKET PORT upload BYTES         a request body
    carry.py SOCKET PORT single BYTES         a response in one message
    carry.py SOCKET PORT parts COUNT BYTES    a response in COUNT messages of BYTES each
    carry.py SOCKET PORT at_once COUNT        COUNT requests that all take two seconds
    carry.py SOCKET PORT beside COUNT         COUNT requests while one takes two seconds
    carry.py SOCKET 80 in_turn COUNT          COUNT requests on one connection

Prints what it measured; ends with status 1 and a reason when something is not as it must be.
"""
import hashlib
import http.client
import json
import random
import sys
import threading
import time

from peer import Peer


def fetch_52(peer, path, method="GET", body=b""):
    answer = peer.request(path, method=method, body=body)
    if "error" in answer:
        sys.exit("error reply: %s\n%s" % (answer["error"], answer["traceback"]))
    return answer["headers"]["status"], answer["body"]["body"]


def connection_80(peer):
    """Without a way to connect again by itself: one connection is what is tested."""
    connection = http.client.HTTPConnection("guest")
    connection.auto_open = 0
    connection.sock = peer.connect()
    return connection


def ask_80(connection, path, method="GET", body=b""):
    connection.request(method, path, body or None)
    answer = connection.getresponse()
    return answer.status, answer.read()


def fetch_80(peer, path, method="GET", body=b""):
    connection = connection_80(peer)
    try:
        return ask_80(connection, path, method, body)
    finally:
        connection.close()


def must(answer, expected, what):
    status, body = answer
    if status != 200:
        sys.exit("%s: status %d: %r" % (what, status, body[:200]))
    if expected is not None and body != expected:
        sys.exit("%s: %d bytes that differ from the expected %d" % (what, len(body), len(expected)))
    return body


def upload(fetch, size):
    body = random.Random(size).randbytes(size)
    seen = json.loads(must(fetch("/", "POST", body), None, "upload"))
    if (seen["body_bytes"], seen["body_sha256"]) != (size, hashlib.sha256(body).hexdigest()):
        sys.exit("the program saw %d of %d bytes, or others" % (seen["body_bytes"], size))


def single(fetch, size):
    must(fetch("/bytes/%d" % size), b"x" * size, "single")


def parts(fetch, count, size):
    must(fetch("/stream/%d/%d" % (count, size)),
         b"".join(bytes([97 + i % 26]) * size for i in range(count)), "parts")


def all_at_once(jobs):
    """Runs the functions in threads of their own; what one raises ends the program."""
    wrong = []

    def run(job):
        try:
            job()
        except BaseException as e:
            wrong.append(repr(e))
    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        sys.exit("%d of %d failed: %s" % (len(wrong), len(jobs), wrong[0]))


SLEPT = b'{"slept": 2.0}\n'


def at_once(fetch, count):
    start = time.monotonic()
    all_at_once([lambda: must(fetch("/sleep/2"), SLEPT, "at once")] * count)
    took = time.monotonic() - start
    print("%.1f s" % took)
    if took > 2 * count / 4:
        sys.exit("%d requests of 2 s took %.1f s: they wait for each other" % (count, took))


def beside(fetch, count):
    slow = threading.Thread(target=lambda: must(fetch("/sleep/2"), SLEPT, "the slow one"))
    slow.start()
    worst = 0
    for _ in range(count):
        start = time.monotonic()
        must(fetch("/bytes/3"), b"xxx", "a fast one")
        worst = max(worst, time.monotonic() - start)
    if not slow.is_alive():
        sys.exit("the slow request was answered before the fast ones")
    slow.join()
    print("slowest %.0f ms" % (worst * 1000))


def in_turn(peer, count):
    connection = connection_80(peer)
    start = time.monotonic()
    for number in range(count):
        must(ask_80(connection, "/bytes/%d" % (number % 7)), b"x" * (number % 7), "request %d" % number)
    took = time.monotonic() - start
    print("%.1f ms each" % (took * 1000 / count))


def main():
    socket, port, word, *numbers = sys.argv[1:]
    numbers = [int(number) for number in numbers]
    peer = Peer(socket, port=int(port))
    fetch = {"52": fetch_52, "80": fetch_80}[port]
    if word == "in_turn":
        return in_turn(peer, *numbers)
    action = {"upload": upload, "single": single, "parts": parts, "at_once": at_once, "beside": beside}[word]
    action(lambda *request: fetch(peer, *request), *numbers)


main()

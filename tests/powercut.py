"""Cuts the power of a guest whose program counts (tests/apps/load, /count), and looks what is left.

    powercut.py cut SOCKET PID DISK FOLDER CUTS SEED    FOLDER/N and FOLDER/N.acknowledged
    powercut.py compare SOCKET FOLDER N...              the guest has them as /cuts/N

One line for each check, `ok NAME` or `FAIL NAME: why`.
"""
import os
import random
import shutil
import signal
import sys
import threading
import time

from peer import Peer

CUT_S = (0.01, 0.4)                     # between two cuts


def check(name, right, why=""):
    print("ok " + name if right else "FAIL %s: %s" % (name, why), flush=True)


class Counter(threading.Thread):
    """Asks for the next number, again and again."""

    def __init__(self, peer):
        super().__init__(daemon=True)
        self.peer, self.acknowledged, self.error = peer, 0, ""

    def run(self):
        try:
            while True:
                self.acknowledged = int(self.peer.request("/count")["body"]["body"])
        except Exception as error:      # the last cut ends it
            self.error = repr(error)


def state(pid):
    """One letter for each thread, proc(5): T is stopped."""
    letters = set()
    for task in os.listdir("/proc/%d/task" % pid):
        with open("/proc/%d/task/%s/stat" % (pid, task)) as file:
            letters.add(file.read().rpartition(")")[2].split()[0])
    return letters


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    while state(pid) != {"T"}:
        time.sleep(0.001)


def cut(address, pid, disk, folder, cuts, seed):
    random.seed(seed)
    counter = Counter(Peer(address))
    counter.start()
    while counter.acknowledged < 3 and counter.is_alive():
        time.sleep(0.01)
    for n in range(1, cuts + 1):
        time.sleep(random.uniform(*CUT_S))
        if n < cuts:
            stop(pid)
        else:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)                # an answer that is on its way arrives
        shutil.copyfile(disk, "%s/%d" % (folder, n))
        with open("%s/%d.acknowledged" % (folder, n), "w") as file:
            file.write(str(counter.acknowledged))
        if n < cuts:
            os.kill(pid, signal.SIGCONT)
    counter.join(10)
    check("75: the program counted until the last cut (%d)" % counter.acknowledged,
          counter.acknowledged > cuts and not counter.is_alive(), counter.error)


def compare(address, folder, names):
    peer = Peer(address)
    for n in names:
        with open("%s/%s.acknowledged" % (folder, n)) as file:
            acknowledged = int(file.read())
        reply = peer.request("/cuts/%s/counter" % n)
        found = reply.get("body", {}).get("body", b"").decode()
        # One more may have been written, and its acknowledgement lost.
        check("75: cut %s: %d was acknowledged" % (n, acknowledged),
              found in (str(acknowledged), str(acknowledged + 1)), "there is %r" % (found or reply))


if sys.argv[1] == "cut":
    cut(sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5], int(sys.argv[6]), int(sys.argv[7]))
else:
    compare(sys.argv[2], sys.argv[3], sys.argv[4:])

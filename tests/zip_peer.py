"""Sends every archive of tests/zip_make.py that must be refused to an agent that is not
configured yet, as the code or as the input data; a line per case says what came of it.

    zip_peer.py SOCKET NUMBER        the cases of one item: 52, 53, ...
    zip_peer.py SOCKET accept NAME   a good program with that archive as its input data
"""
import sys

from peer import Peer, zipped
from zip_make import ACCEPT, REFUSE

PROGRAM = zipped({"main.py": """
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"good"})
"""})

# What is where archives are unpacked, links and modes too.
LIST = b"!find /opt /data -printf '%p %y %m %l\\n' 2>/dev/null | sort\n"


def refuse(peer, case, before):
    archive = REFUSE[case]()
    places = {"code": {"code": archive}}
    if archive:                         # no bytes are no input data, which is fine
        places["input data"] = {"code": PROGRAM, "input_data": archive}
    for place, files in places.items():
        reply = peer.configure(**files)
        after = peer.raw(LIST)
        why = ("it says %r" % reply if set(reply) != {"success", "error", "traceback"} or reply["success"]
               else "its error is empty" if not reply["error"].strip()
               else "it was not looked at: " + reply["error"] if "configured already" in reply["error"]
               else "it leaves %r" % (after[-300:],) if after != before else "")
        print("FAIL %s as %s: %s" % (case, place, why) if why
              else "ok %s as %s: %s" % (case, place, reply["error"].replace("\n", " ")[:100]))


def accept(peer, case):
    reply = peer.configure(PROGRAM, input_data=ACCEPT[case]())
    print("ok %s: unpacked" % case if reply == {"success": True} else "FAIL %s: %r" % (case, reply))


def main(socket, word, *names):
    peer = Peer(socket)
    if word == "accept":
        return accept(peer, *names)
    before = peer.raw(LIST)
    cases = [case for case in REFUSE if case.startswith(word + "-")]
    for case in cases:
        refuse(peer, case, before)
    if not cases:
        print("FAIL %s: no such case" % word)


main(*sys.argv[1:])

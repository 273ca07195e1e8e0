"""A Flask program: WSGI, found by looking at the object."""
import time

from flask import Flask, Response, request

app = Flask(__name__)


@app.route("/")
def index():
    return {"flask": True, "path": request.path, "url": request.url}


@app.route("/item/<int:number>")
def item(number):
    return {"item": number, "q": request.args.get("q", "")}


@app.route("/body", methods=["POST", "PUT"])
def body():
    return {"method": request.method, "body_bytes": len(request.get_data())}


@app.route("/stream")
def stream():
    return Response((b"%05d" % number for number in range(1000)), mimetype="text/plain")


@app.route("/sleep/<float:seconds>")
def sleep(seconds):
    time.sleep(seconds)
    return {"slept": seconds}


@app.route("/", methods=["POST"])
def event():
    return "event %s: %s" % (request.headers.get("Aleph-Event"), request.get_data(as_text=True))

"""As main.py, as a program that listens on $PORT itself."""
import http.server
import json
import os
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/exit":
            os._exit(7)
        body = json.dumps({"args": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}) \
            if self.path == "/facts" else "hello"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


http.server.ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()

"""Firecracker's end of a vsock: a Unix socket where CONNECT PORT leads to another socket.

    hybrid.py SOCKET TARGET PORT

Any other port is closed without an answer, as Firecracker does where nobody listens.
"""
import socket
import sys
import threading


def pump(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def serve(near):
    line = b""
    while not line.endswith(b"\n") and len(line) < 64:
        byte = near.recv(1)
        if not byte:
            return near.close()
        line += byte
    if line != b"CONNECT %s\n" % sys.argv[3].encode():
        return near.close()
    far = socket.socket(socket.AF_UNIX)
    far.connect(sys.argv[2])
    near.sendall(b"OK 1073741824\n")
    back = threading.Thread(target=pump, args=(far, near))
    back.start()
    pump(near, far)
    back.join()
    near.close()
    far.close()


listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(128)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

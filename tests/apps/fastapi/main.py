"""What FastAPI programs commonly do: parameters, streams, files, background work, lifespan."""
import os
import tempfile
import time

from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import FileResponse, StreamingResponse

app = FastAPI()
counts = {"lifespans": 0, "background": 0}
file_path = os.path.join(tempfile.gettempdir(), "fastapi-file-%d" % os.getpid())


@app.on_event("startup")
async def startup():
    counts["lifespans"] += 1
    with open(file_path, "wb") as file:
        file.write(b"0123456789" * 20000)


@app.on_event("shutdown")
async def shutdown():
    os.unlink(file_path)


@app.get("/")
async def index():
    return counts


@app.get("/item/{number}")
async def item(number: int, q: str = ""):
    return {"item": number, "q": q}


@app.post("/body")
async def body(request: Request):
    return {"body_bytes": len(await request.body())}


@app.get("/stream")
async def stream():
    async def parts():
        for number in range(1000):
            yield b"%05d" % number
    return StreamingResponse(parts(), media_type="text/plain")


@app.get("/file")
async def file():
    return FileResponse(file_path, media_type="application/octet-stream")


def work(seconds):
    time.sleep(seconds)
    counts["background"] += 1


@app.get("/background/{seconds}")
async def background(seconds: float, tasks: BackgroundTasks):
    tasks.add_task(work, seconds)
    return {"accepted": seconds}

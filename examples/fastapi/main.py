"""A FastAPI program that shows what a microVM serves: parameters, streams, files, work after
the response, and a lifespan. Its entrypoint is main:app.
"""
import asyncio
import time

from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import FileResponse, StreamingResponse

app = FastAPI()
started_at = None                       # set once, before the first request
notes = []


@app.on_event("startup")
async def startup():
    global started_at
    started_at = time.time()


@app.get("/")
async def index():
    return {"started_at": started_at, "notes": len(notes)}


@app.get("/items/{item_id}")
async def item(item_id: int, q: str = ""):
    """A path parameter with a type, and an optional query parameter: /items/7?q=red"""
    return {"item": item_id, "q": q}


@app.get("/count")
async def count(to: int = 5):
    """A response that is made while it is sent: curl -N shows each line as it comes."""
    async def lines():
        for number in range(1, to + 1):
            yield "%d\n" % number
            await asyncio.sleep(0.2)
    return StreamingResponse(lines(), media_type="text/plain")


@app.get("/source")
async def source():
    return FileResponse(__file__, media_type="text/plain")


def write_note(text):
    time.sleep(3)                       # slow work in a thread; nobody waits for it
    notes.append(text)


@app.post("/notes/{text}", status_code=202)
async def note(text: str, background: BackgroundTasks):
    """Answers at once; the note is there three seconds later."""
    background.add_task(write_note, text)
    return {"accepted": text}

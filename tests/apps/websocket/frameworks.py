"""What main.py does at /echo and /bye, by frameworks."""


def starlette_app():
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute

    async def echo(ws):
        await ws.accept(subprotocol=(ws.scope["subprotocols"] or [None])[0])
        async for event in events(ws):
            await ws.send({**event, "type": "websocket.send"})

    async def bye(ws):
        await ws.accept()
        await ws.close(code=int(ws.url.query))

    return Starlette(routes=[WebSocketRoute("/echo", echo), WebSocketRoute("/bye", bye)])


async def events(ws):
    while True:
        event = await ws.receive()
        if event["type"] == "websocket.disconnect":
            return
        yield event


def fastapi_app():
    from fastapi import FastAPI, WebSocket, WebSocketDisconnect
    app = FastAPI()

    @app.websocket("/echo")
    async def echo(ws: WebSocket):
        await ws.accept(subprotocol=(ws.scope["subprotocols"] or [None])[0])
        try:
            while True:
                event = await ws.receive()
                ws._raise_on_disconnect(event)
                if event.get("text") is not None:
                    await ws.send_text(event["text"])
                else:
                    await ws.send_bytes(event["bytes"])
        except WebSocketDisconnect:
            pass

    @app.websocket("/bye")
    async def bye(ws: WebSocket):
        await ws.accept()
        await ws.close(code=int(ws.url.query))

    return app


def quart_app():
    from quart import Quart, websocket
    app = Quart(__name__)

    @app.websocket("/echo")
    async def echo():
        await websocket.accept(subprotocol=next(iter(websocket.requested_subprotocols), None))
        while True:
            await websocket.send(await websocket.receive())

    @app.websocket("/bye")
    async def bye():
        await websocket.accept()
        await websocket.close(int(websocket.query_string))

    return app


def __getattr__(name):                  # frameworks:starlette imports no other
    makers = {"starlette": starlette_app, "fastapi": fastapi_app, "quart": quart_app}
    if name not in makers:
        raise AttributeError(name)
    return makers[name]()

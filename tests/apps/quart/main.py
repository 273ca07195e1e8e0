"""A Quart program: ASGI, with its own lifespan."""
from quart import Quart, request

app = Quart(__name__)
served = 0


@app.before_serving
async def startup():
    global served
    served += 1


@app.route("/")
async def index():
    return {"quart": True, "path": request.path, "lifespans": served}


@app.route("/item/<int:number>")
async def item(number):
    return {"item": number, "q": request.args.get("q", "")}


@app.route("/body", methods=["POST"])
async def body():
    return {"method": request.method, "body_bytes": len(await request.get_data())}

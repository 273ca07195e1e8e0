"""Holds a WebSocket open and prints the code that it is closed with: websocket_halt.py SOCKET"""
import asyncio
import sys

import websockets


async def main():
    async with websockets.unix_connect(sys.argv[1], "ws://guest/echo") as ws:
        print("open", flush=True)
        await ws.wait_closed()
        print(ws.close_code, flush=True)


asyncio.run(main())

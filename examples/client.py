import asyncio
import json

from websockets.asyncio.client import connect


async def main():
    async with connect("ws://127.0.0.1:8000/ws", subprotocols=["agentcast.v1"], max_size=None) as socket:
        await socket.send(json.dumps({"op": "start", "id": 1, "agent": "countdown", "input": {"start": 3}}))
        async for message in socket:
            frame = json.loads(message)
            if frame["type"] == "event":
                print(frame["seq"], frame["event"], frame.get("message") or frame.get("result") or "")
                if frame["event"] in ("run_end", "run_error", "run_cancelled"):
                    break


asyncio.run(main())

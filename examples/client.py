import asyncio

import agentcast


async def main():
    hub = agentcast.connect("http://127.0.0.1:8000")
    async with hub.start("countdown", {"start": 3}) as run:
        async for event in run:
            print(event["seq"], event["event"], event.get("message", ""))
        print(await run.result())


asyncio.run(main())

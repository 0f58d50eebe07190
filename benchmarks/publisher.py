"""A peer: publishes its own clock through redis-py, at a given pace. Arguments: URL, messages a second, how many."""

import sys
import time

import anyio
from redis.asyncio import Redis

from benchmarks.serving import Go


async def main(url: str, rate: float, count: int) -> None:
    go = Go()
    async with Redis.from_url(url) as redis:
        await redis.ping()
        go.listen()
        print(0, flush=True)
        await go()
        start = anyio.current_time()
        for number in range(count):
            await anyio.sleep_until(start + number / rate)
            await redis.publish("peer", f"{time.time()} ".ljust(200, "x"))
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), backend_options={"use_uvloop": True})

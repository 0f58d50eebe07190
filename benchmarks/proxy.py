"""A TCP proxy that brings what it is given a while later: puts the Redis of a benchmark on a distant machine.

Run as a process: `python -m benchmarks.proxy PORT SECONDS`; prints its port. Each direction takes as many seconds.
"""

import asyncio
import sys
from contextlib import suppress

import anyio


async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, delay: float) -> None:
    """Write to `target` what `source` receives, `delay` seconds later; close it after the end."""
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        while data := await source.read(65_536):
            loop.call_later(delay, target.write, data)
    loop.call_later(delay, target.close)


async def main(port: int, delay: float) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(carry, reader, far_writer, delay)
            tasks.start_soon(carry, far_reader, writer, delay)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]), float(sys.argv[2]), backend_options={"use_uvloop": True})

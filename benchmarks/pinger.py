"""A client that only pings: how long replies take while others keep the hub busy.

Run as a process, so that the others' work is not in it: `python -m benchmarks.pinger PORT`. At each byte on stdin it
prints the slowest reply since the last one, in seconds.
"""

import os
import select
import sys
import time

from benchmarks.sockets import Socket

INTERVAL = 0.01


def main(port: int) -> None:
    socket = Socket(port)
    socket.ask(op="ping")
    print(port, flush=True)
    slowest = 0.0
    while True:
        start = time.perf_counter()
        socket.ask(op="ping")
        slowest = max(slowest, time.perf_counter() - start)
        if select.select([0], [], [], INTERVAL)[0]:
            if not os.read(0, 1):
                return
            print(slowest, flush=True)
            slowest = 0.0


if __name__ == "__main__":
    main(int(sys.argv[1]))

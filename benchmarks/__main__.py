"""`python -m benchmarks`: measure, and print what was measured."""

import argparse
import sys
import time

from benchmarks import (
    attacks,
    channel,
    crowd,
    dashboard,
    fanout,
    far,
    graphs,
    large,
    latency,
    memory,
    pace,
    react,
    redis,
    rules,
    stall,
    startup,
    streaming,
    tokens,
)
from benchmarks.processes import set_up_watcher
from benchmarks.report import Report

BENCHMARKS = {
    "latency": latency.measure,
    "stall": stall.measure,
    "memory": memory.measure,
    "fanout": fanout.measure,
    "pace": pace.measure,
    "tokens": tokens.measure,
    "far": far.measure,
    "crowd": crowd.measure,
    "large": large.measure,
    "rules": rules.measure,
    "dashboard": dashboard.measure,
    "channel": channel.measure,
    "streaming": streaming.measure,
    "react": react.measure,
    "redis": redis.measure,
    "graphs": graphs.measure,
    "startup": startup.measure,
    "attacks": attacks.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the hub on this machine. Everything takes about eight minutes; leave the machine alone "
        "meanwhile. Each number is the median of its rounds.",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=BENCHMARKS,
        metavar="NAME",
        help=f"one of {', '.join(BENCHMARKS)}; repeatable",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there, with all rounds")
    args = parser.parse_args()
    if not set_up_watcher():
        print("one core only: servers and watchers share it, so most numbers are too low", file=sys.stderr)
    report = Report()
    if report.load > 0.5:
        print(f"the machine is busy (load {report.load:.1f}): times will be too long", file=sys.stderr)
    for name in args.only or BENCHMARKS:
        start = time.perf_counter()
        print(f"{name} … ", end="", file=sys.stderr, flush=True)
        report.rows.extend(BENCHMARKS[name]())
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    report.print()
    if args.json:
        report.write(args.json)


if __name__ == "__main__":
    main()

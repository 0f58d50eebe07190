"""Random sequences of faults at full size: `python -m tests.faults.chaos --seeds 10`.

Prints the seed of each; one that fails is repeated with `--first SEED --seeds 1`.
"""

import argparse
import sys
import time

import anyio

from tests.faults.chaos.story import Story


def main() -> None:
    parser = argparse.ArgumentParser(description="Play random sequences of faults, one per seed, until one fails.")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--faults", type=int, default=6)
    options = parser.parse_args()
    for seed in range(options.first, options.first + options.seeds):
        story, began = Story(seed, options.runs, options.clients, options.faults), time.monotonic()
        try:
            anyio.run(story.play, backend_options={"use_uvloop": True})
        except BaseException:
            sys.stdout.write(f"seed {seed} FAILED after {', '.join(story.happened)}\n")
            raise
        outcomes = ", ".join(f"{count} {name}" for name, count in sorted(story.outcomes.items()))
        happened = ", ".join(story.happened)
        sys.stdout.write(f"seed {seed} passed in {time.monotonic() - began:.0f} s: {happened}; runs: {outcomes}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""What speed is to be reached, and what was measured before the hub's core was rebuilt. Rows refer to these."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on one measured value: at most `bound`, or at least where `at_least` is set.

    `before` is None for what there was not.
    """

    what: str
    unit: str
    before: float | None
    bound: float
    at_least: bool = False

    def is_met(self, measured: float) -> bool:
        return measured >= self.bound if self.at_least else measured <= self.bound


SINGLY = Goal("one event at a time, deliveries per CPU second against websockets", "×", 0.62, 1.1, at_least=True)
BURSTS = Goal("bursts of 32, deliveries per CPU second against websockets", "×", 9.6, 12.0, at_least=True)
PACE_P50 = Goal("20 events/s, latency p50 against websockets", "×", 1.40, 1.0)
PACE_P99 = Goal("20 events/s, latency p99 against websockets", "×", 1.25, 1.0)
IDLE = Goal("an idle subscribed connection", "KiB", 33.2, 15.0)
TOKENS = Goal("CPU of one delivery, a run of tokens to 200 clients", "µs", 23.0, 8.0)
FAR = Goal("1,001 runs, 2 ms from the bus: all shown", "s", 17.2, 1.5)
CROWD = Goal("2,000 clients reconnect: slowest reply to another client", "ms", 307.0, 250.0)
LARGE = Goal("30 clients join the largest state: longest stall", "ms", 647.0, 50.0)
RULES = Goal("1,000 subscriptions that do not match: extra time of a new run", "µs", 1_695.0, 50.0)
ACTIVE = Goal("10,000 active runs, no client: longest stall", "ms", 114.0, 50.0)
ATTACKED = Goal("the slowest reply to an innocent client, under the worst attack", "ms", None, 250.0)
DASHBOARD = Goal("10,000 active runs, one client on summaries: longest stall", "ms", None, 50.0)

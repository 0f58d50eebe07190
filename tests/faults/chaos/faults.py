"""The faults of the random sequences: each does its harm, lets it work for a while, and undoes it."""

import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import anyio
from anyio import to_thread

from tests.faults.chaos.world import World

HELD = 2 * 64 + 8
"""Events that an agent which takes its time can emit while nothing is taken: what its recorder has just taken, and what
its channel holds."""

Fault = Callable[[World, random.Random], Awaitable[None]]


@contextmanager
def agents_held(world: World) -> Iterator[None]:
    """No agent goes on for long, while Redis is away (G5)."""
    before = world.all_emissions()
    yield
    for run, count in world.all_emissions().items():
        assert count - before.get(run, 0) <= HELD, f"run {run} was not held: {count - before.get(run, 0)} events"


async def redis_restarts(world: World, rng: random.Random) -> None:
    """Killed, and back with its data."""
    world.redis.kill()
    with agents_held(world):
        await anyio.sleep(rng.uniform(0.2, 4.0))
    await to_thread.run_sync(world.redis.start)


async def redis_is_emptied(world: World, rng: random.Random) -> None:
    world.redis.kill()
    world.redis.empty()
    world.history += 1
    await anyio.sleep(rng.uniform(0.0, 2.0))
    await to_thread.run_sync(world.redis.start)


async def redis_stands_still(world: World, rng: random.Random) -> None:
    world.redis.pause()
    with agents_held(world):
        await anyio.sleep(rng.uniform(0.5, 10.0))
    world.redis.resume()


async def subscriptions_are_killed(world: World, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        world.redis.do("CLIENT", "KILL", "TYPE", "pubsub")
        await anyio.sleep(rng.uniform(0.0, 0.5))


async def redis_pauses_its_clients(world: World, rng: random.Random) -> None:
    seconds = rng.uniform(0.5, 6.0)
    world.redis.do("CLIENT", "PAUSE", int(seconds * 1000))
    await anyio.sleep(seconds)


async def redis_is_full(world: World, rng: random.Random) -> None:
    world.redis.do("CONFIG", "SET", "maxmemory", 1)
    await anyio.sleep(rng.uniform(0.5, 4.0))
    world.redis.do("CONFIG", "SET", "maxmemory", 0)


async def replica_is_promoted(world: World, rng: random.Random) -> None:
    await world.promote(missing=rng.uniform(0.0, 1.0))
    await world.add_replica()


async def hub_is_killed(world: World, rng: random.Random) -> None:
    await world.kill_hub(rng.choice(world.hubs))
    await anyio.sleep(rng.uniform(0.0, 2.0))
    await world.add_hub()


async def hub_stands_still(world: World, rng: random.Random) -> None:
    hub = rng.choice(world.hubs)
    hub.signal(signal.SIGSTOP)
    await anyio.sleep(rng.uniform(0.5, 12.0))
    hub.signal(signal.SIGCONT)


HISTORY_KEPT: tuple[Fault, ...] = (
    redis_restarts,
    redis_stands_still,
    subscriptions_are_killed,
    redis_pauses_its_clients,
    redis_is_full,
)
HISTORY_LOST: tuple[Fault, ...] = (redis_is_emptied, replica_is_promoted)
OF_HUBS: tuple[Fault, ...] = (hub_is_killed, hub_stands_still)
ALL = (*HISTORY_KEPT, *HISTORY_LOST, *OF_HUBS)

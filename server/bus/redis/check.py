"""Whether a Redis will do: asked once, before a hub starts, so that a wrong one is refused with the reason."""

import logging
from urllib.parse import urlsplit

import anyio
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError, RedisError

from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.pipelined import connections, reason
from agentcast.server.errors import BusError

OLDEST = (6, 2)
LOADING_PATIENCE = 30.0
_TIMEOUT = 5.0

logger = logging.getLogger(__name__)


async def check(url: str, prefix: str) -> str:
    """What answers at `url`, for people ("Redis 7.0.15 at localhost:6379, database 0").

    A Redis that is still loading its data is waited for.

    :raises BusError: it cannot be reached or will not do; says why and what to do. Never tells user or password.
    """
    where = place(url)
    try:
        connection = connections(url)()
    except ValueError:  # its text may hold what is secret
        form = "redis://user:password@host:6379/0 (with special characters in user and password as %XX)"
        raise BusError(f"{where} is no URL of a Redis; give it as {form}") from None
    try:
        with anyio.fail_after(LOADING_PATIENCE):
            checked = _checked(await _info(connection), where)
            await _use(connection, Keys(prefix, connection.db))
    except AuthenticationError:
        raise BusError(f"Redis at {where} refuses user and password; give them as redis://user:password@host") from None
    except NoPermissionError:
        needed = f"~{prefix}:* &{prefix}@* +@all -@admin -@dangerous +info"
        raise BusError(f"the user may not do all that is needed of Redis at {where}; enough is {needed}") from None
    except (RedisError, OSError, TimeoutError) as error:
        raise BusError(f"cannot reach Redis at {where}: {reason(error)}; does it run, and is the URL right?") from None
    finally:
        with anyio.CancelScope(shield=True):
            await connection.disconnect(nowait=True)
    return f"{checked} at {where}, database {connection.db}"


def place(url: str) -> str:
    """Host and port of a URL: what may be shown of it."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return parts.path
        return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    except ValueError:
        return "what was given"


async def _info(connection: AbstractConnection) -> dict[str, str]:
    while True:
        try:
            with anyio.fail_after(_TIMEOUT):
                await connection.send_command("INFO", check_health=False)
                text = (await connection.read_response(timeout=float("inf"))).decode()
            break
        except BusyLoadingError:
            await connection.disconnect(nowait=True)
            await anyio.sleep(0.5)
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


async def _use(connection: AbstractConnection, keys: Keys) -> None:
    """Run a script on a key and subscribe to a channel of the deployment: what a user may not be allowed to."""
    for command in (("EVAL", "return 1", 1, keys.feed), ("SUBSCRIBE", keys.probe("check"))):
        with anyio.fail_after(_TIMEOUT):
            await connection.send_command(*command, check_health=False)
            await connection.read_response(timeout=float("inf"))


def _checked(info: dict[str, str], where: str) -> str:
    """Name and version of the server.

    :raises BusError: it is a cluster, a Sentinel, a replica or too old.
    """
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = info.get("valkey_version") or info.get("redis_version", "0")
    compatible = info.get("redis_version", version)
    if info.get("redis_mode") == "cluster" or info.get("cluster_enabled") == "1":
        raise BusError(f"{where} is a Redis Cluster, which agentcast does not support yet; give it a single primary")
    if info.get("redis_mode") == "sentinel":
        raise BusError(f"{where} is a Sentinel, which holds no data; give the address of the primary that it watches")
    if tuple(int(part) for part in compatible.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BusError(f"{where} is {name} {version}, which is too old: use Redis {oldest} or newer, or Valkey")
    if info.get("role") == "slave":
        raise BusError(f"{where} is a replica, which takes no writes; give the address of its primary")
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory", "0") != "0" and policy != "noeviction":
        logger.warning("when %s is full it will drop runs (%s); set maxmemory-policy noeviction", where, policy)
    return f"{name} {version}"

"""The bus of several hubs over one Redis. The only place that knows redis-py.

`pipelined` is a connection for calls, `listener` the subscription, `scripts` what happens inside Redis. `heads`,
`summaries`, `queries`, `feed`, `pieces`, `commands` and `workers` build on them; `bus` puts all together.
`check` refuses unsuitable servers.
"""

from agentcast.server.bus.redis.bus import RedisBus
from agentcast.server.bus.redis.check import check

__all__ = ["RedisBus", "check"]

"""The Python client of a hub: starts runs and follows them to their end, over any number of connections.

    hub = connect("http://127.0.0.1:8000")
    async with hub.start("researcher", {"question": "What is G4?"}) as run:
        async for event in run:
            print(event)
        print(await run.result())

It is also the protocol's worked example; the rules are in docs/protocol.md. What a client has to keep is little: one
position per run, (epoch, seq), and an idempotency key per start. With these it can drop its connection at any moment
and come back without missing or repeating an event (G1, G2).
"""

from agentcast.server.client.client import Client, connect
from agentcast.server.client.connection import BadUrl, ClientError, Closed, Refused, TooBig, Unreachable
from agentcast.server.client.run import Run, RunFailed

__all__ = [
    "BadUrl",
    "Client",
    "ClientError",
    "Closed",
    "Refused",
    "Run",
    "RunFailed",
    "TooBig",
    "Unreachable",
    "connect",
]

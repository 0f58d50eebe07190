"""A hub, as a client sees it."""

from collections.abc import Mapping
from typing import Any

import anyio

from agentcast.server.client.connection import HubUrl, describe_agents
from agentcast.server.client.run import PATIENCE, OnDrop, Run
from agentcast.server.protocol import Detail


class Client:
    """A hub at some URL. Nothing is connected before a run is started."""

    def __init__(self, url: str, patience: float, on_drop: OnDrop) -> None:
        self.url = HubUrl(url)
        self._patience = patience
        self._on_drop = on_drop

    async def describe(self) -> dict[str, Any]:
        """The hub's `agents`, each with `name`, `description`, `input` and `output` (JSON Schemas), and its `model`.

        :raises Unreachable: no hub answers.
        """
        return await anyio.to_thread.run_sync(describe_agents, self.url)

    def start(
        self,
        agent: str,
        input: Mapping[str, Any],
        *,
        thread: str | None = None,
        key: str | None = None,
        detail: Detail = "full",
    ) -> Run:
        """A run of `agent`, which starts when it is entered with `async with`.

        `thread` is the id of the conversation that it is a turn of; `key` its idempotency key: for a day, the same key,
        agent and input give the same run. Detail `progress` leaves out the streaming of texts.
        """
        return Run(
            self.url,
            agent,
            input,
            thread=thread,
            key=key,
            detail=detail,
            patience=self._patience,
            on_drop=self._on_drop,
        )


def connect(url: str, *, patience: float = PATIENCE, on_drop: OnDrop = lambda reason, attempt: None) -> Client:
    """A client of the hub at `url`, such as "http://127.0.0.1:8000".

    When a connection is lost it tries for `patience` seconds to get another. `on_drop` is called with the reason and
    the number of each attempt that failed.

    :raises BadUrl: `url` cannot be the address of a hub.
    """
    return Client(url, patience, on_drop)

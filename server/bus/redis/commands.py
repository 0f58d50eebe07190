"""Commands from any process to the owner of a run, and the answers back (G6)."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio
import orjson
from anyio.abc import TaskGroup, TaskStatus

from agentcast.server.bus.base import CommandHandler, Registration, Subscription
from agentcast.server.bus.redis.keys import Keys
from agentcast.server.bus.redis.pipelined import PATIENCE
from agentcast.server.errors import CommandError, Unavailable, command_error

MAX_HANDLED = 256
"""Commands of other processes that are handled at once; more are refused."""

logger = logging.getLogger(__name__)

_NO_OWNER = "no process runs this run at the moment; try again"


class Commands:
    """Sends and handles commands. `run` must be running meanwhile.

    Each process has one channel, for commands to it and for answers to its own.
    """

    def __init__(self, publish: Callable[[str, bytes], Awaitable[int]], keys: Keys, worker: str) -> None:
        self._publish = publish
        self._keys = keys
        self._worker = worker
        self._handler: CommandHandler | None = None
        self._tasks: TaskGroup | None = None
        self._handled = 0
        self._sent = 0
        self._waiting: dict[int, list[Any]] = {}
        self._answered = anyio.Event()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with anyio.create_task_group() as self._tasks:
            task_status.started()
            await anyio.sleep_forever()

    async def register(self, handler: CommandHandler) -> Subscription:
        self._handler = handler

        def remove() -> None:
            if self._handler is handler:
                self._handler = None

        return Registration(remove)

    async def send(self, owner: str, run: str, command: Mapping[str, Any]) -> None:
        """Have `owner` handle a command.

        :raises Unavailable: it does not answer in time.
        :raises CommandError: it refuses.
        """
        if owner == self._worker:
            with anyio.move_on_after(PATIENCE):
                await self._handle_here(run, command)
                return
            raise Unavailable("the run does not get to it, as when Redis takes nothing at the moment; try again")
        self._sent += 1
        number = self._sent
        answer: list[Any] = []
        self._waiting[number] = answer
        request = {"from": self._worker, "number": number, "run": run, "command": command}
        try:
            with anyio.move_on_after(PATIENCE):
                if not await self._publish(self._keys.commands(owner), orjson.dumps(request)):
                    raise Unavailable(_NO_OWNER)
                while not answer:
                    await self._answered.wait()
                if answer[0] is not None:
                    raise command_error(answer[0])
                return
        finally:
            del self._waiting[number]
        raise Unavailable("the process that runs this run does not answer; try again")

    def verify(self, run: str) -> None:
        """Have the owner in this process compare a run with what Redis holds, soon."""
        if self._tasks is not None:
            self._tasks.start_soon(self._verify, run)

    async def _verify(self, run: str) -> None:
        try:
            await self._handle_here(run, {"op": "verify"})
        except CommandError as error:
            logger.info("run %s was not verified: %s", run, error)
        except Exception:  # of this run; the others go on
            logger.exception("run %s was not verified", run)

    async def _handle_here(self, run: str, command: Mapping[str, Any]) -> None:
        if self._handler is None:
            raise Unavailable(_NO_OWNER)
        await self._handler(run, command)

    def take(self, message: bytes) -> None:
        """What was published on this process's channel."""
        document = orjson.loads(message)
        if "answer" in document:
            if (waiting := self._waiting.get(document["number"])) is not None:
                waiting.append(document["answer"])
                self._answered.set()
                self._answered = anyio.Event()
        elif self._tasks is not None:
            sender, number, run, command = (document[name] for name in ("from", "number", "run", "command"))
            self._tasks.start_soon(self._serve, sender, number, run, command)

    async def _serve(self, sender: str, number: int, run: str, command: Mapping[str, Any]) -> None:
        """Handle a command of another process and answer it."""
        answer = None
        self._handled += 1
        try:
            if self._handled > MAX_HANDLED:
                raise Unavailable("the process that runs this run has too much to do; try again")
            await self._handle_here(run, command)
        except CommandError as error:
            answer = error.wire()
        except Exception:
            logger.exception("a command to run %s failed", run)
            answer = CommandError("something went wrong in the hub").wire()
        finally:
            self._handled -= 1
        try:
            message = {"number": number, "answer": answer}
            await self._publish(self._keys.commands(sender), orjson.dumps(message))
        except Unavailable as error:
            logger.warning("a command to run %s was handled, but not answered: %s", run, error)

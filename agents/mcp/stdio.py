"""The stdio transport: a server's process, its lines as messages, and its end.

Unlike the SDK's own it bounds what it holds (see `oversize`) and reads leniently (see `messages`). What is no message
is dropped and counted, stderr goes to the log at debug, and the whole process group is ended with the connection. This
module must not know what the messages mean.
"""

import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import anyio
from anyio.abc import ByteReceiveStream, Process
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client.stdio import get_default_environment
from mcp.os.posix.utilities import terminate_posix_process_tree
from mcp.shared.dispatcher import coerce_request_id
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCMessage, JSONRPCNotification, JSONRPCRequest, RequestId, jsonrpc_message_adapter

from agentcast.agents.mcp.messages import is_answer, read
from agentcast.agents.mcp.oversize import BLANK, Lines, Oversize
from agentcast.agents.mcp.words import last_error_line

EXIT_PATIENCE = 2.0
"""Seconds that a server gets to exit after its stdin was closed, and again after SIGTERM."""
STDERR_LINES = 20
STDERR_CHARS = 500

Outgoing = tuple[MemoryObjectReceiveStream[SessionMessage | Exception], MemoryObjectSendStream[SessionMessage]]

_log = logging.getLogger(__name__)
_BROKEN = (anyio.ClosedResourceError, anyio.BrokenResourceError, OSError)


class StdioLog:
    """What is known of one connection beside its messages, to say why it ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rubbish = 0
        """Lines on stdout that were no messages."""
        self.ending = False
        """Whether it is we who end the connection."""
        self.exit_code: int | None = None
        """Of a process that has ended by itself."""
        self.http_status: int | None = None
        """Of the newest HTTP response, if it was an error."""
        self.heard = anyio.Event()
        """Set when all of stderr was read."""
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)

    def note(self, line: str) -> None:
        """A line of stderr."""
        if line.strip():
            self._stderr.append(line[:STDERR_CHARS])
            _log.debug("MCP server %s: %s", self.name, line[:STDERR_CHARS])

    def drop(self, line: bytes) -> None:
        """A line of stdout that is no message."""
        self.rubbish += 1
        if self.rubbish == 1:
            _log.warning("MCP server %s writes to stdout what is no message; it belongs on stderr", self.name)
        _log.debug("MCP server %s, stdout: %r", self.name, line[:200])

    def last_words(self) -> str | None:
        """How the process ended, if it did, and the end of what it wrote to stderr, fit for clients."""
        if self.exit_code is None:
            return None
        code = self.exit_code
        how = f"it exited with code {code}" if code >= 0 else f"it was ended by signal {-code}"
        words = last_error_line(self._stderr)
        return f"{how}: {words}" if words else how


@asynccontextmanager
async def stdio_transport(
    command: Sequence[str], env: Mapping[str, str], cwd: str | None, ended: Callable[[], None], log: StdioLog
) -> AsyncIterator[Outgoing]:
    """Run `command` and exchange messages with it, as `mcp.Client` wants a transport. `ended` is called when the
    process has closed its stdout.

    :raises OSError: it cannot be run.
    """
    process = await anyio.open_process(
        command, env=get_default_environment() | dict(env), cwd=cwd, start_new_session=True
    )
    arrived, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    outgoing, leaving = anyio.create_memory_object_stream[SessionMessage](0)
    requests: dict[RequestId, str] = {}
    with arrived, incoming, outgoing, leaving:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, process, arrived, requests, ended, log)
            tasks.start_soon(_write, process, leaving, arrived, requests)
            tasks.start_soon(_listen, process, log)
            try:
                yield incoming, outgoing
            finally:
                # However the caller was cancelled: no process stays behind. Every wait in here is bounded.
                with anyio.CancelScope(shield=True):
                    incoming.close()  # the reader goes on, so that a server that is stuck writing can exit
                    log.ending = True
                    await _end(process)
                    with anyio.move_on_after(EXIT_PATIENCE):
                        await log.heard.wait()
                tasks.cancel_scope.cancel()


async def _read(
    process: Process,
    arrived: MemoryObjectSendStream[SessionMessage | Exception],
    requests: dict[RequestId, str],
    ended: Callable[[], None],
    log: StdioLog,
) -> None:
    """Hand on what the server says. `requests` are those that wait for an answer, with their methods."""
    lines = Lines()
    with arrived:
        async for data in _chunks(process.stdout):
            for line in lines.feed(data):
                for message in _messages(line, requests, log):
                    with suppress(*_BROKEN):  # nobody listens any more; read on all the same
                        await arrived.send(SessionMessage(message))
    if not log.ending:
        ended()
        with anyio.move_on_after(EXIT_PATIENCE, shield=True):
            log.exit_code = await _exit_code(process)


def _messages(line: bytes | Oversize, requests: dict[RequestId, str], log: StdioLog) -> list[JSONRPCMessage]:
    found = read(line, requests)
    if not found and isinstance(line, bytes) and line.strip(BLANK) and b'"jsonrpc"' not in line:
        log.drop(line)
    for message in found:
        if is_answer(message):
            requests.pop(message["id"], None)
    return [jsonrpc_message_adapter.validate_python(message, by_name=False) for message in found]


async def _write(
    process: Process,
    leaving: MemoryObjectReceiveStream[SessionMessage],
    arrived: MemoryObjectSendStream[SessionMessage | Exception],
    requests: dict[RequestId, str],
) -> None:
    assert process.stdin is not None  # noqa: S101 -- it was opened with pipes
    try:
        async for item in leaving:
            message = item.message
            match message:
                case JSONRPCRequest():
                    requests[coerce_request_id(message.id)] = message.method
                case JSONRPCNotification(method="notifications/cancelled", params={"requestId": id}):
                    requests.pop(coerce_request_id(id), None)
            text = message.model_dump_json(by_alias=True, exclude_unset=True)
            await process.stdin.send(text.encode() + b"\n")
    except _BROKEN:
        arrived.close()  # calls that wait for an answer learn that there is none


async def _listen(process: Process, log: StdioLog) -> None:
    lines = Lines(STDERR_CHARS)

    def note(data: bytes) -> None:
        for line in lines.feed(data):
            log.note((line.head if isinstance(line, Oversize) else line).decode(errors="replace"))

    try:
        async for data in _chunks(process.stderr):
            note(data)
    finally:
        note(b"\n")  # the last words of many are no whole line
        log.heard.set()


async def _chunks(stream: ByteReceiveStream | None) -> AsyncIterator[bytes]:
    assert stream is not None  # noqa: S101 -- as above
    with suppress(anyio.EndOfStream, *_BROKEN):
        while True:
            yield await stream.receive()
            await checkpoint()  # a flood must not keep the others from the loop


async def _end(process: Process) -> None:
    """Close its stdin, wait for its exit, then end what is left of its process group."""
    assert process.stdin is not None  # noqa: S101 -- as above
    with suppress(*_BROKEN):
        await process.stdin.aclose()
    with anyio.move_on_after(EXIT_PATIENCE):
        await _exit_code(process)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 0)
        await terminate_posix_process_tree(process, EXIT_PATIENCE)
    with anyio.move_on_after(EXIT_PATIENCE):
        await _exit_code(process)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            with suppress(*_BROKEN):
                await stream.aclose()
    with anyio.move_on_after(EXIT_PATIENCE):
        await process.wait()


async def _exit_code(process: Process) -> int:
    """Not `process.wait()`: that waits for the pipes as well, which a grandchild may hold open."""
    while process.returncode is None:  # noqa: ASYNC110
        await anyio.sleep(0.01)
    return process.returncode

"""`agentcast` processes that start at once: forked off a process that has already imported what they need.

Each is a process of its own, with its own arguments, environment, folder, streams, signals and exit code. Some of
README's tests start the installed command instead, which takes one or two seconds of CPU time.
"""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess
from tempfile import TemporaryFile
from typing import Any

import anyio
from anyio.abc import ByteReceiveStream, ByteSendStream, Process

ROOT = Path(__file__).parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "agentcast.server.cli.main",
        "agentcast.server.cli.serving",
        "agentcast.server.cli.doctor",
        "agentcast.agents.demo",
    ]
)


@dataclass
class Forked:
    """A new process, and the ends of its pipes; -1 for none. The caller closes them."""

    process: Any
    stdout: int
    stderr: int


def fork(
    call: Callable[..., None],
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    stdin: int = DEVNULL,
    stdout: int = PIPE,
    stderr: int = PIPE,
) -> Forked:
    """Start a process that does `call(*arguments)`. A stream is a descriptor, `DEVNULL` or (not stdin) `PIPE`."""
    ours, theirs, opened = [-1, -1, -1], [stdin, stdout, stderr], []
    for number, wanted in enumerate(theirs):
        if wanted == PIPE:
            ours[number], theirs[number] = os.pipe()
        elif wanted == DEVNULL:
            theirs[number] = os.open(os.devnull, os.O_RDWR)
        if wanted < 0:
            opened.append(theirs[number])
    streams = [_Inherited(descriptor) for descriptor in theirs]
    environment = dict(os.environ if env is None else env)
    process = _context.Process(target=_become, args=(streams, str(cwd), environment, call, arguments), daemon=True)
    process.start()
    for descriptor in opened:
        os.close(descriptor)
    return Forked(process, *ours[1:])


def agentcast(*arguments: str) -> None:
    """What the command does."""
    from agentcast.server.cli.main import main

    sys.argv = ["agentcast", *arguments]
    main()


async def open_agentcast(*arguments: str, descriptors: int | None = None, **options: Any) -> "ForkedProcess":
    """Start `agentcast ARGUMENTS`, which may open so many descriptors; `options` as `fork` has them."""
    await _warm_up()
    if descriptors is not None:
        return ForkedProcess(fork(_confined, str(descriptors), *arguments, **options))
    return ForkedProcess(fork(agentcast, *arguments, **options))


def _confined(descriptors: str, *arguments: str) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(descriptors), int(descriptors)))
    agentcast(*arguments)


async def run_agentcast(
    *arguments: str, env: Mapping[str, str], cwd: Path = ROOT, input: str = ""
) -> CompletedProcess[str]:
    """Run `agentcast ARGUMENTS` to its end."""
    with TemporaryFile() as stdin:
        stdin.write(input.encode())
        stdin.seek(0)
        async with await open_agentcast(*arguments, env=env, cwd=cwd, stdin=stdin.fileno()) as process:
            texts = ["", ""]
            async with anyio.create_task_group() as tasks:
                for number, stream in enumerate((process.stdout, process.stderr)):
                    tasks.start_soon(_read, stream, texts, number)
            return CompletedProcess(arguments, await process.wait(), *texts)


async def _read(stream: "_Output", texts: list[str], number: int) -> None:
    texts[number] = b"".join([part async for part in stream]).decode()


class ForkedProcess(Process):
    """The process, as `anyio.open_process` would give it."""

    stdin: ByteSendStream | None = None
    stdout: Any = None
    stderr: Any = None

    def __init__(self, forked: Forked) -> None:
        self._process = forked.process
        self._waiting = anyio.Lock()
        self.stdout, self.stderr = (
            None if descriptor < 0 else _Output(descriptor) for descriptor in (forked.stdout, forked.stderr)
        )

    async def aclose(self) -> None:
        """Stop reading from it, and wait for its end; kill it if that is cancelled."""
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                await stream.aclose()
        try:
            await self.wait()
        finally:
            self.kill()
            with anyio.CancelScope(shield=True):
                await self.wait()

    async def wait(self) -> int:
        async with self._waiting:
            if self.returncode is None:
                await anyio.wait_readable(self._process.sentinel)
                self._process.join()
        assert self.returncode is not None
        return self.returncode

    @property
    def pid(self) -> int:
        pid: int = self._process.pid
        return pid

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def send_signal(self, signal: signal.Signals) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Output(ByteReceiveStream):
    """What a process writes into a pipe."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        if self._descriptor < 0:
            raise anyio.ClosedResourceError
        await anyio.wait_readable(self._descriptor)
        if data := os.read(self._descriptor, max_bytes):
            return data
        raise anyio.EndOfStream

    async def aclose(self) -> None:
        if self._descriptor >= 0:
            anyio.notify_closing(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


# -- The fork server ---------------------------------------------------------------------------------------------------

_warm = False


async def _warm_up() -> None:
    """Wait for the imports at the first time, on a thread: a hub may run on this one."""
    global _warm
    if not _warm:
        first = _context.Process(target=_nothing)
        await anyio.to_thread.run_sync(first.start)
        await anyio.to_thread.run_sync(first.join)
        _warm = True


def _nothing() -> None:
    pass


class _Inherited:
    """A descriptor on its way into a new process, where it arrives as a number."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> Any:
        return _arrived, (DupFd(self._descriptor),)


def _arrived(duplicate: Any) -> int:
    descriptor: int = duplicate.detach()
    return descriptor


def _become(
    streams: Sequence[int], folder: str, environment: Mapping[str, str], call: Callable[..., None], arguments: list[str]
) -> None:
    """The new process."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, folder)
    call(*arguments)

"""Real redis-server processes that a test starts, kills, pauses and empties."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PATIENCE = 20.0
KEEPING = ("--appendonly", "yes")


class Refused(Exception):
    """The server's answer is an error."""


class Redis:
    """One redis-server on a free port. Commands go by `redis-cli`-like `do`, on a connection of their own.

    With `KEEPING` among the options it keeps its data when it is killed; else it comes back empty.
    """

    def __init__(
        self, folder: Path, *options: str, port: int = 0, password: str | None = None, replica_of: int | None = None
    ) -> None:
        self.folder = folder
        self._replica_of = replica_of
        self._password = password
        self.port = port or free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, with the data that its folder holds, and wait until it answers."""
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        assert program is not None, "the tests need redis-server: make test installs it"
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        command += [] if self._replica_of is None else ["--replicaof", "127.0.0.1", str(self._replica_of)]
        self._process = subprocess.Popen([*command, *self._options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if self.do("PING") == b"+PONG":
                    return
            except (OSError, Refused):  # not there yet, or loading its data
                assert self._process.poll() is None, "redis-server does not start"
            assert time.monotonic() < deadline, "redis-server does not answer"

    def kill(self) -> None:
        """Kill it at once: what is not on disk is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def promote(self) -> None:
        """Be a primary from now on, with what was received so far."""
        self.do("REPLICAOF", "NO", "ONE")
        self._replica_of = None

    def empty(self) -> None:
        """Remove what a killed one left on disk."""
        assert self._process is None
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def stop(self) -> None:
        """End it, in whatever state it is."""
        if self._process is not None:
            self.signal(signal.SIGCONT)
            self.kill()

    def do(self, *command: str | int) -> bytes:
        """Send one command; gives the first line of the reply, or the whole of a bulk reply."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5.0) as connection:
            with connection.makefile("rb") as reply:
                if self._password is not None:
                    connection.sendall(_encoded("AUTH", self._password))
                    reply.readline()
                connection.sendall(_encoded(*command))
                line = reply.readline().rstrip()
                if line.startswith(b"$") and line != b"$-1":
                    return reply.read(int(line[1:]))
                if line.startswith(b"-"):
                    raise Refused(line.decode())
                return line

    def info(self, section: str = "") -> dict[str, str]:
        lines = self.do("INFO", *([section] if section else [])).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)


def _encoded(*command: str | int) -> bytes:
    parts = [str(part).encode() for part in command]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running_redis(*options: str, **settings: Any) -> Iterator[Redis]:
    """A redis-server for the time of the context; `options` as on its command line."""
    with TemporaryDirectory(prefix="redis-") as folder:
        redis = Redis(Path(folder) / "data", *options, **settings)
        redis.folder.mkdir()
        try:
            redis.start()
            yield redis
        finally:
            redis.stop()

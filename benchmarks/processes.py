"""The servers that are measured, each a process of its own."""

import http.client
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import orjson
from redis import Redis


class Server:
    """A running server. What it is to do next, it is told through its stdin, byte by byte."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.port = port
        self._process = process

    def go(self, much: int = 1) -> None:
        """Let it do what it waits to do, once; `much`, below 256, says how much."""
        assert self._process.stdin is not None
        self._process.stdin.write(bytes((much,)))
        self._process.stdin.flush()

    def get(self, path: str) -> Any:
        """The JSON document at `path`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            return orjson.loads(connection.getresponse().read())
        finally:
            connection.close()

    def line(self) -> bytes:
        """The next line that it writes to stdout."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    @property
    def cpu(self) -> float:
        """Seconds of CPU time that the process has used, in user and kernel mode."""
        return time.clock_gettime(~self._process.pid << 3 | 2)  # the clock of clock_getcpuclockid(3)

    @property
    def rss(self) -> int:
        """Bytes of memory that the process holds."""
        with open(f"/proc/{self._process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running(*args: str, with_servers: bool = True, **variables: str) -> Iterator[Server]:
    """`python -m args…`, with `variables` in its environment; it has said on stdout which port it listens on.

    It runs on the first core, that of all servers, or, unless `with_servers`, on the core of this process.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **variables},
        preexec_fn=set_up_child if with_servers else raise_file_limit,
    )
    assert process.stdout is not None
    try:
        yield Server(process, int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


class RedisServer:
    """A running redis-server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"

    def info(self) -> dict[str, Any]:
        """What `INFO` says."""
        with Redis.from_url(self.url) as redis:
            info: dict[str, Any] = redis.info()
            return info


@contextmanager
def running_redis() -> Iterator[RedisServer]:
    """A redis-server on the first core, without persistence."""
    port = free_port()
    process = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.PIPE,
        preexec_fn=set_up_child,
    )
    assert process.stdout is not None
    try:
        assert any(b"Ready to accept connections" in line for line in iter(process.stdout.readline, b""))
        yield RedisServer(port)
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def set_up_watcher() -> bool:
    """Prepare this process for many sockets, on a core that is not the servers'. Tells whether that core is its own."""
    raise_file_limit()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[1:])
    return len(cores) > 1


def raise_file_limit() -> None:
    """As many sockets as the system lets one process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if most == resource.RLIM_INFINITY else most
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def use_all_cores() -> None:
    """For a child process: undo what `set_up_watcher` did."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):
            os.sched_setaffinity(0, range(os.cpu_count() or 1))


def set_up_child() -> None:
    """In a child process, before it begins: many sockets, and the first core."""
    raise_file_limit()
    use_all_cores()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])

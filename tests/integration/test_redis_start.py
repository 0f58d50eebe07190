"""Which Redis a hub works with, and which it refuses, with the reason and without its secrets (G9)."""

import shutil
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import httpx
import pytest
from anyio.abc import ByteStream, SocketAttribute

from agentcast.server.bus.redis import check
from agentcast.server.errors import BusError
from tests.support.log import Log
from tests.support.process import refused, serve
from tests.support.redis import PATIENCE, free_port, running_redis

SECRET = "hunter2-and-more"


async def refusal(url: str) -> str:
    code, text = await refused("--port", "0", redis=url)
    assert code == 2, text
    assert "Traceback" not in text
    assert SECRET not in text
    return text


async def works(url: str) -> None:
    """A hub starts with it, is ready, and says nothing that is secret."""
    async with serve(redis=url) as hub, httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"{hub.url}/readyz")).status_code == 200
        async with hub.client() as client:
            await client.view(await client.start("counter", {"n": 1}))
        assert SECRET not in "".join(hub.log)
        assert "Traceback" not in "".join(hub.log)


async def test_one_that_cannot_be_reached_is_refused() -> None:
    text = await refusal(f"redis://:{SECRET}@127.0.0.1:{free_port()}/0")
    assert "cannot reach Redis at 127.0.0.1:" in text
    assert "does it run" in text


async def test_a_url_that_is_none_is_refused() -> None:
    for url in (
        f"http://:{SECRET}@127.0.0.1/0",
        f"redis://:{SECRET}/x@127.0.0.1/0",
        f"redis://me:{SECRET}#@127.0.0.1/0",
    ):
        assert "no URL of a Redis" in await refusal(url)


async def test_a_wrong_password_or_none_is_refused_and_the_right_one_works() -> None:
    with running_redis("--requirepass", "right", password="right") as redis:
        at = f"127.0.0.1:{redis.port}/0"
        for url in (f"redis://:{SECRET}@{at}", f"redis://somebody:{SECRET}@{at}", f"redis://{at}"):
            assert "refuses user and password" in await refusal(url)
        await works(f"redis://:right@{at}")


async def test_a_user_that_may_use_only_the_keys_of_the_deployment_is_enough() -> None:
    with running_redis() as redis:
        rules = ("on", f">{SECRET}", "~agentcast:*", "&agentcast@*", "+@all", "-@admin", "-@dangerous", "+info")
        redis.do("ACL", "SETUSER", "cast", *rules)
        await works(f"redis://cast:{SECRET}@127.0.0.1:{redis.port}/0")


@pytest.mark.parametrize("lacks", ["&agentcast@*", "~agentcast:*", "+info"])
async def test_a_user_that_may_not_do_all_is_refused(lacks: str) -> None:
    with running_redis() as redis:
        rules = ["~agentcast:*", "&agentcast@*", "+@all", "-@admin", "-@dangerous", "+info"]
        rules.remove(lacks)
        redis.do("ACL", "SETUSER", "cast", "on", f">{SECRET}", *rules)
        text = await refusal(f"redis://cast:{SECRET}@127.0.0.1:{redis.port}/0")
        assert "may not do all" in text
        assert "&agentcast@*" in text


async def test_options_in_the_url_do_not_change_how_the_hub_speaks_with_redis() -> None:
    with running_redis() as redis:
        await works(f"{redis.url}?protocol=3&decode_responses=true&socket_timeout=0.1&health_check_interval=1")


async def test_hubs_of_different_databases_do_not_see_each_other() -> None:
    with running_redis() as redis:
        urls = [f"redis://127.0.0.1:{redis.port}/{database}" for database in (0, 1)]
        async with serve(redis=urls[0]) as one, serve(redis=urls[1]) as other:
            async with one.client() as client, other.client() as stranger:
                await stranger.follow_all()
                run = await client.start("counter", {"n": 1})
                await client.end(run)
                assert (await stranger.refused("subscribe", to={"run": run}))["code"] == "not_found"
                await stranger.quiet()
                assert not stranger.memory.views


async def test_a_cluster_is_refused() -> None:
    with running_redis("--cluster-enabled", "yes") as redis:
        assert "is a Redis Cluster, which agentcast does not support yet" in await refusal(redis.url)


async def test_a_replica_is_refused() -> None:
    with running_redis() as primary, running_redis(replica_of=primary.port) as replica:
        assert "is a replica" in await refusal(replica.url)


Exchange = Callable[[str], Awaitable[None]]


async def _answering(info: str, then: Exchange) -> None:
    """A server that takes every command and answers INFO with `info`, while `then` uses its URL."""
    answer = "\r\n".join(info.split()).encode()

    async def converse(stream: ByteStream) -> None:
        async with stream:
            async for request in stream:
                bulk = b"$%d\r\n%s\r\n" % (len(answer), answer)
                for command in request.split(b"*")[1:]:
                    await stream.send(bulk if b"INFO\r\n" in command and b"SETINFO" not in command else b"+OK\r\n")

    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1", family=socket.AF_INET) as listener,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, converse)
        port = listener.extra(SocketAttribute.local_port)  # noqa: S610 -- not of Django
        await then(f"redis://127.0.0.1:{port}/0")
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("version", ["6.0.16", "5.0.7"])
async def test_one_that_is_too_old_is_refused(version: str) -> None:
    async def then(url: str) -> None:
        assert f"is Redis {version}, which is too old: use Redis 6.2 or newer" in await refusal(url)

    await _answering(f"redis_version:{version} redis_mode:standalone role:master", then)


async def test_a_sentinel_is_refused() -> None:
    async def then(url: str) -> None:
        assert "is a Sentinel, which holds no data" in await refusal(url)

    await _answering("redis_version:7.0.15 redis_mode:sentinel", then)


async def test_valkey_is_called_by_its_name() -> None:
    async def then(url: str) -> None:
        with anyio.fail_after(PATIENCE):
            assert (await check(url, "agentcast")).startswith("Valkey 8.1.0 at 127.0.0.1:")

    await _answering("redis_version:7.2.4 valkey_version:8.1.0 redis_mode:standalone role:master", then)


@contextmanager
def _certificates(folder: Path) -> Iterator[tuple[str, str]]:
    """Certificate and key of 127.0.0.1, made by itself."""
    openssl = shutil.which("openssl")
    assert openssl is not None, "the tests need openssl"
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    yield certificate, key


async def test_tls_works_and_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    tls_port = free_port()
    with _certificates(tmp_path) as (certificate, key):
        files = ["--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate]
        with running_redis("--tls-port", str(tls_port), *files, "--tls-auth-clients", "no"):
            url = f"rediss://127.0.0.1:{tls_port}/0"
            await works(f"{url}?ssl_ca_certs={certificate}")
            assert "cannot reach Redis" in await refusal(url)


async def test_check_gives_the_reason_without_the_secret() -> None:
    with pytest.raises(BusError) as caught:
        await check(f"redis://me:{SECRET}@127.0.0.1:{free_port()}/0", "agentcast")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("policy", "warned"), [("allkeys-lru", True), ("volatile-ttl", True), ("noeviction", False)])
async def test_a_redis_that_would_drop_runs_is_warned_of(policy: str, warned: bool, log: Log) -> None:
    with running_redis("--maxmemory", "100mb", "--maxmemory-policy", policy) as redis:
        await check(redis.url, "agentcast")
    assert any(policy in line and "noeviction" in line for line in log.lines) is warned

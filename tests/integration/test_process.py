"""The real process: how it starts, refuses to start, and stops (G6, G7)."""

import signal
import socket
import time
from typing import Any

import anyio
import pytest

from tests.support.client import Client
from tests.support.process import REGISTRY, ServedHub, refused, serve


async def _follow_to_the_close(client: Client, code: list[tuple[int, str]]) -> None:
    code.append(await client.closed())


async def test_serve_prints_its_url_and_runs_agents() -> None:
    async with serve() as hub, hub.client() as client:
        view = await client.view(await client.start("counter", {"n": 3}))
        assert view.document["result"] == "0 1 2 "
        hub.signal(signal.SIGTERM)
        assert await client.closed() == (4001, "shutting_down")
        assert await hub.exit_code(within=5) == 0
        assert "Traceback" not in "".join(hub.log)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_signal_ends_running_runs_notifies_the_clients_and_exits_with_0(number: signal.Signals) -> None:
    async with serve(grace="0.3", cancel_grace="0.3") as hub, hub.client() as client, hub.client() as watcher:
        await watcher.follow_all()
        runs = [await client.start("holder") for _ in range(5)]
        for run in runs:
            await client.event("status", run)
        hub.signal(number)
        assert await client.closed() == (4001, "shutting_down")
        assert await watcher.closed() == (4001, "shutting_down")
        for seen in (client, watcher):
            for run in runs:
                view = seen.memory.view(run)
                assert view.names[-1] == "run_error"
                assert view.document["error"]["code"] == "shutting_down"
                assert view.document["error"]["retryable"] is True
        assert await hub.exit_code(within=5) == 0
        assert "Traceback" not in "".join(hub.log)


async def test_runs_that_finish_within_the_grace_do_so() -> None:
    async with serve(grace="10") as hub, hub.client() as client:
        run = await client.start("counter", {"n": 50, "pause": 0.01})
        await client.event("token", run)
        hub.signal(signal.SIGTERM)
        assert (await client.closed())[0] == 4001
        assert client.memory.view(run).document["status"] == "done"
        assert await hub.exit_code(within=5) == 0


async def test_while_it_stops_it_takes_no_new_runs_and_is_not_ready() -> None:
    async with serve(grace="10") as hub, hub.client() as client:
        run = await client.start("counter", {"n": 60, "pause": 0.01})
        await client.event("token", run)
        hub.signal(signal.SIGTERM)
        error: dict[str, Any] = {}
        with anyio.fail_after(5):
            while (reply := await client.call("start", agent="counter", input={"n": 0}, subscribe=False))["ok"]:
                pass
            error = reply["error"]
        assert (error["code"], error["retryable"]) == ("unavailable", True)
        assert (await client.closed())[0] == 4001
        assert client.memory.view(run).document["status"] == "done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_second_signal_hurries_and_still_ends_the_runs_in_order(number: signal.Signals) -> None:
    async with serve(grace="60") as hub, hub.client() as client:
        run = await client.start("holder")
        await client.event("status", run)
        hub.signal(number)
        await _stopping(client)
        hub.signal(number)
        started = time.monotonic()
        assert (await client.closed())[0] == 4001
        assert client.memory.view(run).document["error"]["code"] == "shutting_down"
        assert await hub.exit_code(within=5) == 0
        assert time.monotonic() - started < 5


async def _stopping(client: Client) -> None:
    """Wait until the hub takes no more runs."""
    with anyio.fail_after(5):
        while (await client.call("start", agent="counter", input={"n": 0}, subscribe=False))["ok"]:
            pass


@pytest.mark.parametrize("agent", ["stubborn", "careless"])
async def test_an_agent_stuck_in_a_thread_does_not_keep_the_process(agent: str) -> None:
    async with serve(grace="0.1", cancel_grace="0.1") as hub, hub.client() as client:
        run = await client.start(agent)
        await client.event("status", run)
        hub.signal(signal.SIGTERM)
        assert (await client.closed())[0] == 4001
        assert client.memory.view(run).document["error"]["code"] == "shutting_down"
        assert await hub.exit_code(within=5) == 0


async def test_a_task_of_an_agent_that_ignores_its_cancellation_does_not_keep_the_process() -> None:
    async with serve(grace="0.2", cancel_grace="0.2") as hub, hub.client() as client:
        assert (await client.view(await client.start("deaf"))).document["result"] == "done"
        hub.signal(signal.SIGTERM)
        assert await hub.exit_code(within=8) == 0


async def test_what_a_task_of_an_agent_raises_ends_the_run_and_not_the_process() -> None:
    """asyncio lets SystemExit and KeyboardInterrupt out of the event loop."""
    async with serve() as hub, hub.client() as client, hub.client() as other:
        beside = await other.start("counter", {"n": 20})
        await other.event("token", beside)
        for interrupt in (False, True):
            view = await client.view(await client.start("exiting", {"interrupt": interrupt}))
            assert view.names == ["run_queued", "run_start", "status", "run_error"]
            assert view.document["error"]["code"] == "agent_error"
        assert (await other.view(beside)).document["status"] == "done"
        assert (await client.view(await client.start("counter", {"n": 3}))).document["result"] == "0 1 2 "
        hub.signal(signal.SIGTERM)
        assert await hub.exit_code(within=5) == 0
    assert "a task raised SystemExit; the hub goes on" in "".join(hub.log)


async def test_a_client_that_does_not_read_does_not_keep_the_process() -> None:
    async with serve(grace="0.1") as hub, hub.client() as client:
        client.ws.transport.pause_reading()
        hub.signal(signal.SIGTERM)
        assert await hub.exit_code(within=9) == 0


async def test_a_client_that_pauses_in_a_flood_is_caught_up() -> None:
    async with serve() as hub, hub.client() as client, hub.client() as other:
        run = await client.start("flooder")
        client.ws.transport.pause_reading()
        await other.ask("subscribe", to={"run": run})
        assert (await other.view(run)).document["status"] == "done"
        client.ws.transport.resume_reading()
        assert (await client.view(run)).document["status"] == "done"
        assert hub.log == []


async def test_settings_come_from_the_environment() -> None:
    async with serve(heartbeat="3.5") as hub, hub.client() as client:
        assert client.hello["heartbeat"] == 3.5


# -- Refusing to start ---------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, errors = await refused("--port", str(port), "--agents", REGISTRY)
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in errors
    assert "--port" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "settings", "named"),
    [
        (["--agents", "no.such.module:registry"], {}, "no.such.module"),
        (["--agents", "tests.support.served:nothing"], {}, "nothing"),
        (["--agents", "tests/support/served.py"], {}, "tests/support/served.py"),
        (["--agents", "os:path"], {}, "os:path"),
        (["--port", "99999"], {}, "port"),
        (["--port", "many"], {}, "port"),
        (["--log-level", "loud"], {}, "loud"),
        (["--host", "no.such.host.invalid"], {}, "no.such.host.invalid"),
        (["--colour", "red"], {}, "--colour"),
        ([], {"grace": "-1"}, "grace"),
        ([], {"heartbeat": "often"}, "heartbeat"),
        ([], {"max_active": "0"}, "max_active"),
    ],
    ids=str,
)
async def test_what_is_wrong_at_the_start_is_reported_in_a_line(
    arguments: list[str], settings: dict[str, str], named: str
) -> None:
    code, errors = await refused("--port", "0", *arguments, **{"agents": REGISTRY} | settings)
    assert code == 2
    assert named in errors
    assert "Traceback" not in errors


async def test_several_registries_are_served_together() -> None:
    async with serve(agents=f"{REGISTRY},agents.demo:registry") as hub, hub.client() as client:
        assert (await client.refused("start", agent="nobody", input={}))["message"].count(",") >= 3
        assert isinstance(hub, ServedHub)

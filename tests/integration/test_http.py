"""The HTTP interface beside the socket: routes, statuses, the shape of errors, and the guard at the door."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest
from pydantic import BaseModel
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from agentcast.agents.base import Emitter
from agentcast.agents.events import Status
from tests.support.agents import Anything, agent
from tests.support.hub import RunningHub, open_hub
from tests.support.raw import exchange


class Sum(BaseModel):
    a: int
    b: int = 2


@agent("adder", input=Sum, timeout=7, max_concurrent=3)
async def adder(input: Sum, emit: Emitter) -> dict[str, int]:
    await emit.send(Status(message="adding"))
    return {"sum": input.a + input.b}


@agent("sleeper")
async def sleeper(input: Anything, emit: Emitter) -> None:
    await anyio.sleep_forever()


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error in `response`, which must have the one shape that errors have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() >= {"code", "message", "retryable"}
    assert error["code"] == code
    return error


async def ended(hub: RunningHub, *runs: str) -> None:
    """Wait for the end of runs."""
    async with hub.client() as client:
        for run in runs:
            await client.ask("subscribe", to={"run": run})
            await client.end(run)


@pytest.fixture(scope="module")
async def hub() -> AsyncIterator[RunningHub]:
    """A hub that tests share which only ask."""
    async with open_hub(adder, hosts="hub.example") as hub:
        yield hub


async def test_health_and_readiness_are_reported() -> None:
    async with open_hub(sleeper) as hub, hub.http() as http:
        assert (await http.get("/healthz")).json() == {"status": "ok"}
        assert (await http.get("/readyz")).json() == {"status": "ok", "runs": 0, "bus": {}}
        await http.post("/v1/runs", json={"agent": "sleeper", "input": {}})
        assert (await http.get("/readyz")).json() == {"status": "ok", "runs": 1, "bus": {}}


async def test_a_hub_that_is_stopping_is_alive_but_not_ready_and_takes_no_runs() -> None:
    stopping = anyio.Event()

    @agent("lingering")
    async def lingering(input: Anything, emit: Emitter) -> None:
        await stopping.wait()

    async with open_hub(lingering, grace=5.0) as hub, hub.http() as http, anyio.create_task_group() as tasks:
        await http.post("/v1/runs", json={"agent": "lingering", "input": {}})
        tasks.start_soon(hub.core.stop)
        await anyio.wait_all_tasks_blocked()
        assert (await http.get("/healthz")).status_code == 200
        assert error_of(await http.get("/readyz"), 503, "unavailable")["retryable"] is True
        refused = await http.post("/v1/runs", json={"agent": "lingering", "input": {}})
        assert error_of(refused, 503, "unavailable")["retryable"] is True
        stopping.set()


async def test_the_page_is_served() -> None:
    async with open_hub() as hub, hub.http() as http:
        page = await http.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "<title>agentcast</title>" in page.text


async def test_agents_are_described_with_their_schemas() -> None:
    async with open_hub(adder, sleeper) as hub, hub.http() as http:
        body = (await http.get("/v1/agents")).json()
        assert body["model"] == {"name": "none", "offline": True}
        described = {item["name"]: item for item in body["agents"]}
        assert described.keys() == {"adder", "sleeper"}
        assert described["adder"]["input"] == Sum.model_json_schema()
        assert described["adder"]["available"] is True
        assert (described["adder"]["timeout"], described["adder"]["max_concurrent"]) == (7, 3)


async def test_a_run_is_started_and_shown_over_http() -> None:
    async with open_hub(adder) as hub, hub.http() as http:
        response = await http.post("/v1/runs", json={"agent": "adder", "input": {"a": 1}})
        assert response.status_code == 200
        created = response.json()
        assert created.keys() == {"run", "epoch"}
        await ended(hub, created["run"])
        shown = (await http.get(f"/v1/runs/{created['run']}")).json()
        assert shown.keys() == {"type", "run", "epoch", "seq", "state"}
        assert (shown["type"], shown["epoch"], shown["seq"]) == ("snapshot", created["epoch"], 4)
        assert shown["state"]["result"] == {"sum": 3}
        assert shown["state"]["status"] == "done"


async def test_keys_hold_across_http_and_the_socket() -> None:
    async with open_hub(adder) as hub, hub.http() as http, hub.client() as client:
        run = await client.start("adder", {"a": 1}, key="k")
        again = await http.post("/v1/runs", json={"agent": "adder", "input": {"a": 1}, "key": "k"})
        assert again.json()["run"] == run
        other = await http.post("/v1/runs", json={"agent": "adder", "input": {"a": 2}, "key": "k"})
        error_of(other, 409, "conflict")
        await client.end(run)


async def test_a_run_is_cancelled_over_http() -> None:
    async with open_hub(sleeper) as hub, hub.http() as http, hub.client() as client:
        one, two = await client.start("sleeper"), await client.start("sleeper")
        response = await http.post(f"/v1/runs/{one}/cancel", json={"reason": "enough"})
        assert (response.status_code, response.json()) == (200, {})
        assert (await client.view(one)).events[-1]["reason"] == "enough"
        assert (await http.post(f"/v1/runs/{two}/cancel")).json() == {}
        await client.end(two)
        error_of(await http.post(f"/v1/runs/{two}/cancel"), 409, "already_finished")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/runs/nope", None, 404, "not_found"),
        ("POST", "/v1/runs/nope/cancel", {}, 404, "not_found"),
        ("POST", "/v1/runs", {"agent": "nobody", "input": {}}, 404, "unknown_agent"),
        ("POST", "/v1/runs", {"agent": "adder"}, 400, "bad_request"),
        ("POST", "/v1/runs", {"agent": "adder", "input": []}, 400, "bad_request"),
        ("POST", "/v1/runs", [], 400, "bad_request"),
        ("POST", "/v1/runs", {"agent": "adder", "input": {"a": "x"}}, 422, "invalid_input"),
        ("POST", "/v1/runs/nope/cancel", {"reason": 1}, 400, "bad_request"),
        ("GET", "/v1/runs?limit=0", None, 400, "bad_request"),
        ("GET", "/v1/runs?limit=1001", None, 400, "bad_request"),
        ("GET", "/v1/runs?limit=ten", None, 400, "bad_request"),
        ("GET", "/v1/runs?limit=-1", None, 400, "bad_request"),
        ("GET", "/v1/runs?status=dead", None, 400, "bad_request"),
        ("GET", "/v1/runs?colour=red", None, 400, "bad_request"),
        ("GET", "/nowhere", None, 404, "not_found"),
        ("GET", "/v1/runs/a/b/c", None, 404, "not_found"),
        ("GET", "/ws", None, 404, "not_found"),
        ("DELETE", "/v1/runs", None, 405, "bad_request"),
        ("POST", "/healthz", {}, 405, "bad_request"),
    ],
)
async def test_every_error_has_one_shape(
    hub: RunningHub, method: str, path: str, body: Any, status: int, code: str
) -> None:
    async with hub.http() as http:
        error_of(await http.request(method, path, **({} if body is None else {"json": body})), status, code)


async def test_the_field_that_is_wrong_is_named(hub: RunningHub) -> None:
    async with hub.http() as http:
        error = error_of(
            await http.post("/v1/runs", json={"agent": "adder", "input": {"a": "x"}}), 422, "invalid_input"
        )
        assert error["details"][0]["loc"] == ["a"]
        assert error["details"][0].keys() == {"loc", "msg", "type"}
        error = error_of(await http.post("/v1/runs", json={"agent": 1, "input": {}}), 400, "bad_request")
        assert error["details"][0]["loc"] == ["agent"]
        error = error_of(await http.get("/v1/runs?colour=red"), 400, "bad_request")
        assert "colour" in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
async def test_a_body_that_is_not_declared_as_json_is_refused(hub: RunningHub, kind: str) -> None:
    async with hub.http() as http:
        body = json.dumps({"agent": "adder", "input": {"a": 1}})
        response = await http.post("/v1/runs", content=body, headers={"Content-Type": kind})
        error_of(response, 415, "bad_request")
        response = await http.post("/v1/runs/x/cancel", content="{}", headers={"Content-Type": kind})
        error_of(response, 415, "bad_request")
        assert hub.core.runs.active == 0


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json ; x=y"])
async def test_json_may_be_declared_in_any_spelling(hub: RunningHub, kind: str) -> None:
    async with hub.http() as http:
        body = json.dumps({"agent": "adder", "input": {"a": 1}})
        response = await http.post("/v1/runs", content=body, headers={"Content-Type": kind})
        assert response.status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b'{"agent": "\xff"}', b"[" * 10_000, b'{"a": NaN}'])
async def test_a_body_that_is_no_json_is_a_bad_request(hub: RunningHub, body: bytes) -> None:
    async with hub.http() as http:
        headers = {"Content-Type": "application/json"}
        error_of(await http.post("/v1/runs", content=body, headers=headers), 400, "bad_request")


async def test_a_body_over_the_limit_is_refused(hub: RunningHub) -> None:
    async with hub.http() as http:
        headers = {"Content-Type": "application/json"}
        error_of(await http.post("/v1/runs", content=b" " * 300_000, headers=headers), 413, "bad_request")


# -- The list ------------------------------------------------------------------------------------------------------


async def test_runs_are_listed_newest_first_and_filtered() -> None:
    async with open_hub(adder, sleeper) as hub, hub.http() as http, hub.client() as client:
        done = [await client.start("adder", {"a": n}, thread="t") for n in range(2)]
        await client.end(*done)
        running = await client.start("sleeper")
        await client.event("run_start", running)

        async def listed(**query: str) -> list[str]:
            return [item["run"] for item in (await http.get("/v1/runs", params=query)).json()["runs"]]

        assert await listed() == [running, *reversed(done)]
        assert await listed(agent="sleeper") == [running]
        assert await listed(agent="nobody") == []
        assert await listed(thread="t") == [*reversed(done)]
        assert await listed(status="running") == [running]
        assert await listed(status="done,running") == [running, *reversed(done)]
        assert await listed(status="failed") == []
        assert await listed(limit="2") == [running, done[1]]
        assert await listed(after=running) == [*reversed(done)]
        assert await listed(after=done[0]) == []
        items = (await http.get("/v1/runs")).json()["runs"]
        assert items[0].keys() == {"run", "agent", "epoch", "status", "created", "seq", "active", "summary"}
        assert items[1].keys() == items[0].keys() | {"thread", "ended"}
        assert (items[0]["active"], items[1]["active"]) == (True, False)
        assert items[1]["seq"] == 4


async def test_paging_shows_every_run_once_however_fast_they_were_started() -> None:
    async with open_hub(adder) as hub, hub.http() as http, hub.client() as client:
        ids = [await client.send(op="start", agent="adder", input={"a": n}) for n in range(60)]
        runs = [(await client.reply(id))["result"]["run"] for id in ids]
        assert runs == sorted(runs), "run ids sort by creation"
        await client.end(*runs)
        seen: list[str] = []
        query = {"limit": "7"}
        while page := (await http.get("/v1/runs", params=query)).json()["runs"]:
            seen += [item["run"] for item in page]
            query["after"] = seen[-1]
        assert seen == runs[::-1]


# -- Host and Origin -----------------------------------------------------------------------------------------------

LOCAL = [
    "localhost",
    "LOCALHOST",
    "localhost:{port}",
    "127.0.0.1:{port}",
    "[::1]:{port}",
    "[::1]",
    "localhost.",
    "hub.example:1",
]
FOREIGN = [
    "evil.example",
    "evil.example:{port}",
    "localhost.evil.example",
    "127.0.0.2",
    "[::2]",
    "",
    "null",
    "[::1",
    "@",
]


async def _statuses(hub: RunningHub, headers: list[str]) -> tuple[int, int]:
    """The statuses of a plain request and of a WebSocket handshake under these headers."""
    lines = [header.format(port=hub.port) for header in headers]
    plain = await exchange(hub.port, "GET /healthz HTTP/1.1", *lines, "Connection: close")
    upgrade = await exchange(
        hub.port,
        "GET /ws HTTP/1.1",
        *lines,
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    return plain.status, upgrade.status


@pytest.mark.parametrize("host", LOCAL)
async def test_the_hub_answers_under_its_own_names(hub: RunningHub, host: str) -> None:
    assert await _statuses(hub, [f"Host: {host}"]) == (200, 101)


@pytest.mark.parametrize("host", FOREIGN)
async def test_a_foreign_host_is_refused(hub: RunningHub, host: str) -> None:
    assert await _statuses(hub, [f"Host: {host}"]) == (403, 403)


@pytest.mark.parametrize(
    "origin",
    ["http://localhost", "http://LocalHost:{port}", "https://127.0.0.1", "http://[::1]:{port}", "https://hub.example"],
)
async def test_pages_of_the_hubs_names_may_use_it(hub: RunningHub, origin: str) -> None:
    assert await _statuses(hub, ["Host: localhost", f"Origin: {origin}"]) == (200, 101)


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost.evil.example",
        "http://evil.example:{port}",
        "file://",
        "",
        "localhost",
    ],
)
async def test_foreign_pages_are_refused(hub: RunningHub, origin: str) -> None:
    assert await _statuses(hub, ["Host: localhost", f"Origin: {origin}"]) == (403, 403)


async def test_a_request_without_host_is_refused(hub: RunningHub) -> None:
    assert (await exchange(hub.port, "GET /healthz HTTP/1.0")).status in (400, 403)
    assert set(await _statuses(hub, [])) <= {400, 403}


async def test_the_refusal_says_why_and_how_to_allow_it(hub: RunningHub) -> None:
    async with hub.http() as http:
        error = error_of(await http.get("/v1/agents", headers={"Host": "evil.example"}), 403, "forbidden")
        assert "evil.example" in error["message"]
        assert "AGENTCAST_HOSTS" in error["message"]
        with pytest.raises(InvalidStatus) as refused:
            await connect(hub.ws_url, additional_headers={"Origin": "http://evil.example"}, proxy=None)
        assert refused.value.response.status_code == 403
        assert json.loads(refused.value.response.body)["error"]["code"] == "forbidden"


async def test_a_star_lets_everybody_in() -> None:
    async with open_hub(hosts="*") as hub:
        assert await _statuses(hub, ["Host: evil.example", "Origin: http://other.example"]) == (200, 101)

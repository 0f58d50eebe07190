"""The page, as a user has it: started, watched, cancelled by keyboard; and its reducer is the hub's (G10)."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Literal

import anyio
import pytest
from hypothesis import given, settings
from playwright.async_api import Browser, Page, expect
from pydantic import BaseModel, Field

from agentcast.agents.base import Emitter
from agentcast.agents.events import MessageEnd, MessageStart, Status, Token, ToolEnd, ToolStart
from agentcast.agents.graph import END
from agentcast.agents.registry import Registry
from agentcast.agents.transpiler import AgentTranspiler
from agentcast.server.bus.redis import RedisBus
from agentcast.server.state import RunState
from tests.support.agents import Anything, FunctionAgent, agent
from tests.support.graphs import Empty, Topic, graph_of, node
from tests.support.hub import RunningHub, open_hub
from tests.support.log import Log
from tests.support.process import ServedHub
from tests.support.redis import running_redis
from tests.support.trimmed import logs, trimmed_log
from tests.support.work import Seed, Work

expect.set_options(timeout=30_000)


class Question(BaseModel):
    question: str = Field(min_length=3, description="What is to be found out.")
    depth: int = Field(default=2, ge=1, le=5)
    tone: Literal["plain", "formal"] = "plain"


@agent("asker", input=Question)
async def asker(input: Question, emit: Emitter) -> dict[str, str]:
    await emit.send(Status(message="reading"))
    await emit.send(ToolStart(span="t", tool="search", args={"q": input.question}))
    await emit.send(ToolEnd(span="t", tool="search", duration=0.1, result=["one", "two"]))
    answer = f"{input.question}, {input.depth}, {input.tone}."
    await emit.send(MessageStart(message="m", span="t", field="answer"))
    for word in answer.split(" "):
        await emit.send(Token(message="m", delta=f"{word} "))
        await anyio.sleep(0.005)
    await emit.send(MessageEnd(message="m", text=f"{answer} "))
    return {"answer": answer}


@agent("worker", input=Seed)
async def worker(input: Seed, emit: Emitter) -> dict[str, int]:
    work = Work(input.seed, emit)
    for number in range(4):
        await work.node(number)
    return {"seed": input.seed}


class Needy(FunctionAgent):
    """An agent that depends on something; `missing` is what it lacks."""

    missing: ClassVar[str | None] = None

    @property
    def unavailable(self) -> str | None:
        return self.missing


class Stepping:
    """An agent that says a word for each call of `say`."""

    def __init__(self) -> None:
        self.agent = agent("stepping")(self._run)
        self._words: list[str] = []
        self._changed = anyio.Event()

    def say(self, word: str, *, last: bool = False) -> None:
        self._words += [word, ""] if last else [word]
        self._changed.set()

    async def _run(self, input: Anything, emit: Emitter) -> dict[str, str]:
        await emit.send(MessageStart(message="m", span="s", field="answer"))
        said = 0
        while "" not in self._words or said < len(self._words) - 1:
            while said == len(self._words):
                self._changed = anyio.Event()
                await self._changed.wait()
            await emit.send(Token(message="m", delta=self._words[said]))
            said += 1
        text = "".join(self._words)
        await emit.send(MessageEnd(message="m", text=text))
        return {"answer": text}


@asynccontextmanager
async def open_page(browser: Browser, hub: RunningHub | ServedHub) -> AsyncIterator[Page]:
    """The page, connected. Whatever it writes to its console fails the test."""
    context = await browser.new_context(viewport={"width": 1200, "height": 900})
    page = await context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    try:
        await page.goto(hub.url)
        await expect(page.locator("#connection")).to_have_attribute("data-state", "connected")
        yield page
    finally:
        await context.close()
    assert said == []


async def states(page: Page) -> dict[str, Any]:
    """What the page holds: run → state."""
    found: dict[str, Any] = await page.evaluate(
        "Object.fromEntries([...agentcast.runs.values()].map((run) => [run.id, run.state]))"
    )
    return found


async def compare(page: Page, hub: RunningHub) -> int:
    """Each run's state on the page equals the hub's; gives how many runs there are."""
    held = await states(page)
    async with hub.http() as http:
        for run, state in held.items():
            assert state == (await http.get(f"/v1/runs/{run}")).json()["state"], run
    return len(held)


async def test_the_page_loads_and_offers_the_agents(browser: Browser) -> None:
    async with open_hub(asker, worker) as hub, open_page(browser, hub) as page:
        assert await page.title() == "agentcast"
        assert await page.locator("#agent option").all_text_contents() == ["asker", "worker"]
        await expect(page.locator("#agent-help")).to_have_text("asker of a test")
        await expect(page.locator("#model")).to_contain_text("Offline model")
        await expect(page.locator("#empty")).to_be_visible()


async def test_the_form_follows_the_schema_of_the_agent_that_is_picked(browser: Browser) -> None:
    async with open_hub(asker, worker) as hub, open_page(browser, hub) as page:
        fields = page.locator("#fields [data-field]")
        assert await fields.evaluate_all("all => all.map((x) => x.dataset.field)") == ["question", "depth", "tone"]
        await expect(page.locator("#field-depth")).to_have_value("2")
        await page.select_option("#agent", "worker")
        assert await fields.evaluate_all("all => all.map((x) => x.dataset.field)") == ["seed"]


async def test_several_runs_are_started_by_keyboard_and_stream_to_their_end(browser: Browser) -> None:
    async with open_hub(asker) as hub, open_page(browser, hub) as page:
        await page.focus("#agent")
        await page.keyboard.press("Tab")
        await page.keyboard.type("Who wrote this")
        await page.keyboard.press("Tab")
        await page.keyboard.press("ArrowUp")
        await page.keyboard.press("Tab")
        await page.keyboard.type("f")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Tab")
        await page.keyboard.type("3")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator('.card[data-status="done"]')).to_have_count(
            await page.locator("#count").evaluate("x => Number(x.value)")
        )
        first = page.locator(".card").first
        await expect(first.locator(".answer")).to_contain_text("Who wrote this, 3, formal.")
        await expect(first.locator(".steps summary").first).to_contain_text("1 tool call")
        assert await compare(page, hub) >= 3


async def test_tokens_appear_as_they_come(browser: Browser) -> None:
    stepping = Stepping()
    async with open_hub(stepping.agent) as hub, open_page(browser, hub) as page, hub.client() as client:
        run = await client.start("stepping")
        card = page.locator(f'.card[data-run="{run}"]')
        await expect(card).to_have_attribute("data-status", "running")
        for number in range(3):
            stepping.say(f"word{number} ", last=number == 2)
            await expect(card.locator(".says")).to_have_text("".join(f"word{n} " for n in range(number + 1)))
        await expect(card).to_have_attribute("data-status", "done")


async def test_the_result_comes_into_view_below_a_long_answer(browser: Browser) -> None:
    gate = anyio.Event()

    @agent("writer")
    async def writer(input: Anything, emit: Emitter) -> dict[str, Any]:
        await emit.send(MessageStart(message="m", span="s", field="answer"))
        await emit.send(Token(message="m", delta="line\n" * 200))
        await gate.wait()
        await emit.send(MessageEnd(message="m", text="line\n" * 200))
        return {"answer": "line\n" * 200, "severity": "high"}

    async with open_hub(writer) as hub, open_page(browser, hub) as page, hub.client() as client:
        run = await client.start("writer")
        card = page.locator(f'.card[data-run="{run}"]')
        await expect(card.locator(".says")).to_contain_text("line")
        gate.set()
        await expect(card).to_have_attribute("data-status", "done")
        last = card.locator('[data-result][data-output="severity"]')
        await expect(last).to_be_visible()
        below = "(box) => box.scrollHeight - box.scrollTop - box.clientHeight"
        assert await card.locator(".answer").evaluate(below) < 24


async def test_graph_is_drawn_and_its_nodes_light_up(browser: Browser) -> None:
    gates = {name: anyio.Event() for name in ("plan", "left", "right", "write")}

    def waiting(name: str) -> Callable[[Topic], Awaitable[dict[str, Any]]]:
        async def run(given: Topic) -> dict[str, Any]:
            await gates[name].wait()
            return {}

        return run

    turns = iter((True, False))
    graph = graph_of(
        *(node(name, Topic, Empty, waiting(name)) for name in gates),
        edges=[("plan", "left"), ("plan", "right"), ("left", "write"), ("right", "write")],
    )
    graph.add_conditional_edges("write", lambda _: next(turns), {True: "plan", False: END})
    program = Registry().add("report", AgentTranspiler.compile(graph))
    async with open_hub(program) as hub, open_page(browser, hub) as page, hub.client() as client:  # type: ignore[arg-type]
        run = await client.start("report", {"topic": "x"})
        drawing = page.locator(f'.card[data-run="{run}"] .graph')
        await expect(drawing.locator("[data-node]")).to_have_count(4)
        labels = drawing.locator("svg")
        await expect(labels).to_have_attribute(
            "aria-label", re.compile("write to plan if True, write to the end if False")
        )

        async def shows(name: str, status: str | None) -> None:
            box = drawing.locator(f'[data-node="{name}"]')
            if status is None:
                assert await box.get_attribute("data-status") is None
            else:
                await expect(box).to_have_attribute("data-status", status)

        await shows("plan", "running")
        await shows("left", None)
        gates["plan"].set()
        await shows("plan", "done")
        await shows("left", "running")
        await shows("right", "running")
        await shows("write", None)
        gates["left"].set()
        await shows("left", "done")
        gates["right"].set()
        await shows("write", "running")
        gates["write"].set()
        await expect(page.locator(f'.card[data-run="{run}"]')).to_have_attribute("data-status", "done")
        await expect(drawing.locator('[data-node="plan"] title')).to_have_text("plan (function): done, 2 times")
        assert await compare(page, hub) == 1
        await drawing.focus()


async def test_long_graph_scrolls_inside_of_its_card(browser: Browser) -> None:
    names = [f"step_{number}" for number in range(40)]
    graph = graph_of(*(node(name, Topic, Empty, lambda _: {}) for name in names), max_steps=40)
    program = Registry().add("long", AgentTranspiler.compile(graph))
    async with open_hub(program) as hub, open_page(browser, hub) as page, hub.client() as client:  # type: ignore[arg-type]
        run = await client.start("long", {"topic": "x"})
        drawing = page.locator(f'.card[data-run="{run}"] .graph')
        await expect(drawing.locator("[data-node]")).to_have_count(40)
        height, whole = await drawing.evaluate("(box) => [box.clientHeight, box.scrollHeight]")
        assert height < 500 < whole


async def test_cancel_stops_the_run_and_says_so(browser: Browser) -> None:
    stepping = Stepping()
    async with open_hub(stepping.agent) as hub, open_page(browser, hub) as page:
        await page.click('[data-action="start"]')
        card = page.locator(".card")
        await expect(card).to_have_attribute("data-status", "running")
        await card.locator('[data-action="cancel"]').click()
        await expect(card).to_have_attribute("data-status", "cancelled")
        await expect(card.locator('[data-action="cancel"]')).to_be_hidden()
        assert await compare(page, hub) == 1


async def test_input_that_the_hub_refuses_is_shown_at_its_field(browser: Browser) -> None:
    async with open_hub(asker) as hub, open_page(browser, hub) as page:
        await page.fill("#field-question", "x")
        await page.click('[data-action="start"]')
        await expect(page.locator('[data-error="question"]')).to_contain_text("at least 3 characters")
        await expect(page.locator("#field-question")).to_have_attribute("aria-invalid", "true")
        await expect(page.locator("#field-question")).to_be_focused()
        await expect(page.locator(".card")).to_have_count(0)
        await page.fill("#field-question", "long enough")
        await expect(page.locator('[data-error="question"]')).to_be_hidden()
        await page.click('[data-action="start"]')
        await expect(page.locator('.card[data-status="done"]')).to_have_count(1)


async def test_a_field_that_is_needed_is_asked_for(browser: Browser) -> None:
    async with open_hub(asker) as hub, open_page(browser, hub) as page:
        await page.click('[data-action="start"]')
        await expect(page.locator('[data-error="question"]')).to_be_visible()
        await expect(page.locator(".card")).to_have_count(0)


async def test_an_agent_that_is_unavailable_says_why_and_comes_back(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    needy = Needy(asker.spec, asker.function)
    async with open_hub(needy) as hub, open_page(browser, hub) as page:
        button = page.locator('[data-action="start"]')
        await expect(button).to_have_attribute("aria-disabled", "false")
        await page.fill("#field-question", "Is it there?")
        monkeypatch.setattr(Needy, "missing", "MCP server files: nobody answers at its address")
        await button.click()
        await expect(page.locator("#agent-error")).to_have_text(
            "Not available: MCP server files: nobody answers at its address"
        )
        await expect(button).to_have_attribute("aria-disabled", "true")
        monkeypatch.setattr(Needy, "missing", None)
        await expect(button).to_have_attribute("aria-disabled", "false", timeout=30_000)
        await expect(page.locator("#field-question")).to_have_value("Is it there?")
        await button.click()
        await expect(page.locator('.card[data-status="done"]')).to_have_count(1)


async def test_a_run_that_failed_shows_its_error(browser: Browser, log: Log) -> None:
    @agent("failing")
    async def failing(input: Anything, emit: Emitter) -> None:
        raise ValueError("the date lies in the past")

    log.expect("of agent failing failed")
    async with open_hub(failing) as hub, open_page(browser, hub) as page:
        await page.click('[data-action="start"]')
        await expect(page.locator('.card[data-status="failed"] .failure')).to_contain_text("the date lies in the past")


async def test_html_in_what_an_agent_says_stays_text(browser: Browser) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

    @agent("evil")
    async def saying(input: Anything, emit: Emitter) -> dict[str, str]:
        await emit.send(Status(message=evil))
        await emit.send(ToolStart(span="t", tool=evil, args={evil: evil}))
        await emit.send(MessageStart(message="m", span="t", field=evil))
        await emit.send(Token(message="m", delta=evil))
        await emit.send(MessageEnd(message="m", text=evil))
        return {evil: evil}

    async with open_hub(saying) as hub, open_page(browser, hub) as page:
        await page.click('[data-action="start"]')
        await expect(page.locator('.card[data-status="done"]')).to_have_count(1)
        assert await page.title() == "agentcast"
        assert await page.locator(".card img, .card script").count() == 0


@pytest.mark.parametrize("before", ["", "a"])
async def test_no_text_is_cut_inside_of_an_emoji(browser: Browser, before: str) -> None:
    text = before + "😀" * 200
    async with open_hub(asker) as hub, open_page(browser, hub) as page, hub.client() as client:
        await client.start("asker", {"question": text}, thread=text[:100])
        await expect(page.locator('.card[data-status="done"]')).to_have_count(1)
        await expect(page.locator(".card")).to_contain_text(f"thread {before}😀")
        assert await page.evaluate("document.body.textContent.isWellFormed()")


async def test_a_lost_connection_is_resumed_without_losing_or_repeating(browser: Browser) -> None:
    stepping = Stepping()
    async with open_hub(stepping.agent, worker) as hub, open_page(browser, hub) as page, hub.client() as client:
        run = await client.start("stepping", subscribe=False)
        says = page.locator(f'.card[data-run="{run}"] .says')
        stepping.say("one ")
        await expect(says).to_have_text("one ")
        for connection in list(hub.core.connections._open):
            if connection._session.id != client.hello["session"]:
                connection._writer.abort()
        await expect(page.locator("#connection")).not_to_have_attribute("data-state", "connected")
        stepping.say("two ")
        ended = [await client.start("worker", {"seed": seed}) for seed in range(3)]
        await client.end(*ended)
        await expect(page.locator("#connection")).to_have_attribute("data-state", "connected")
        await expect(says).to_have_text("one two ")
        stepping.say("three", last=True)
        await expect(says).to_have_text("one two three")
        await expect(page.locator('.card[data-status="done"]')).to_have_count(4)
        assert await compare(page, hub) == 4
        assert await page.locator(".note:visible").count() == 0


async def test_runs_that_stand_still_say_so_and_go_on(browser: Browser) -> None:
    stepping = Stepping()
    with running_redis("--appendonly", "yes", "--appendfsync", "always") as redis:
        bus = RedisBus(redis.url, "w-page")
        async with open_hub(stepping.agent, bus=bus) as hub, open_page(browser, hub) as page, hub.client() as client:
            says = page.locator(f'.card[data-run="{await client.start("stepping")}"] .says')
            stepping.say("one ")
            await expect(says).to_have_text("one ")
            redis.kill()
            stepping.say("two ")
            await expect(page.locator("#connection-text")).to_have_text("Runs stand still", timeout=20_000)
            await expect(page.locator("#advice")).to_contain_text("go on by themselves")
            redis.start()
            stepping.say("three", last=True)
            await expect(page.locator("#connection-text")).to_have_text("Connected", timeout=20_000)
            await expect(says).to_have_text("one two three", timeout=20_000)
            await expect(page.locator("#advice")).to_be_hidden()


async def test_runs_of_others_are_shown_and_reloading_shows_the_same(browser: Browser) -> None:
    async with open_hub(worker) as hub, open_page(browser, hub) as page, hub.client() as client:
        runs = [await client.start("worker", {"seed": seed}) for seed in range(5)]
        await expect(page.locator('.card[data-status="done"]')).to_have_count(5)
        before = await states(page)
        assert before.keys() == set(runs)
        await page.reload()
        await expect(page.locator('.card[data-status="done"]')).to_have_count(5)
        assert await states(page) == before
        assert await compare(page, hub) == 5


async def test_the_page_and_the_hub_reach_the_same_states_in_twenty_runs_at_once(browser: Browser) -> None:
    async with open_hub(worker) as hub, open_page(browser, hub) as page, hub.client() as client:
        runs = [await client.start("worker", {"seed": seed}) for seed in range(20)]
        await client.end(*runs)
        await expect(page.locator('.card[data-status="done"]')).to_have_count(20)
        assert await compare(page, hub) == 20
        for run in runs:
            view = client.memory.view(run)
            folded = await page.evaluate("events => events.reduce(agentcast.apply, undefined)", view.events)
            assert folded == view.document


def _event(number: int, event: str, /, **fields: Any) -> dict[str, Any]:
    return {
        "type": "event",
        "event": event,
        "run": "r",
        "seq": number,
        "prev": 0,
        "ts": number / 4,
        "agent": "a",
    } | fields


def _many(count: int, make: Any) -> list[dict[str, Any]]:
    return [make(number) for number in range(count)]


QUEUED = _event(1, "run_queued", epoch="e", input={"x": None}, thread="t", position=2)
TRICKY: dict[str, list[dict[str, Any]]] = {
    "spans over the cap": [
        *_many(1_500, lambda n: _event(n, "tool_start", span=f"s{n}", tool="t", args={})),
        *_many(700, lambda n: _event(n, "tool_end", span=f"s{n}", tool="t", duration=1, result=n)),
        *_many(900, lambda n: _event(n, "lm_start", span=f"l{n}", model="m", parent="s1")),
    ],
    "open spans over the cap": _many(2_100, lambda n: _event(n, "node_start", span=f"s{n}", node="n", kind="graph")),
    "messages over the cap": [
        *_many(600, lambda n: _event(n, "message_start", message=f"m{n}", span="s", field="f")),
        *_many(600, lambda n: _event(n, "token", message=f"m{n}", delta="x")),
    ],
    "validation errors over the cap": _many(
        250,
        lambda n: _event(
            n, "validation_error", span="s", node="n", attempt=1, max_retries=2, error=f"{n}", failed_fields=["a"]
        ),
    ),
    "state over the cap": _many(700, lambda n: _event(n, "state", patch={f"k{n % 650}": n})),
    "state with numbers for names": _many(400, lambda n: _event(n, "state", patch={str(900 - n): n})),
    "names that objects have already": [
        _event(2, "state", patch={"constructor": 1, "__proto__": {"a": 1}, "toString": None}),
        _event(3, "node_start", span="__proto__", node="constructor", kind="graph", inputs={"__proto__": 1}),
        _event(4, "node_end", span="__proto__", node="constructor", duration=1, patch={"hasOwnProperty": 1}),
    ],
    "things that are not there": [
        _event(2, "token", message="none", delta="x"),
        _event(3, "message_end", message="none", text="x"),
        _event(4, "message_retracted", message="none", reason="x"),
        _event(5, "tool_end", span="none", tool="t", duration=1, result=1),
        _event(6, "tool_progress", span="none", progress=1),
        _event(7, "node_end", span="none", node="n", duration=1, patch={"a": 1}),
    ],
    "things twice": [
        _event(2, "message_start", message="m", span="s", field="f"),
        _event(3, "token", message="m", delta="x"),
        _event(4, "message_start", message="m", span="s2", field="g"),
        _event(5, "message_end", message="m", text="xy"),
        _event(6, "token", message="m", delta="z"),
        _event(7, "message_end", message="m", text="no"),
        _event(8, "message_retracted", message="m", reason="r"),
        _event(9, "tool_start", span="s", tool="t", args={"a": 1}),
        _event(10, "tool_end", span="s", tool="t", duration=1, result=None),
        _event(11, "tool_start", span="s", tool="u", args={"a": 2}),
        _event(12, "tool_end", span="s", tool="u", duration=1, error={"code": "c", "message": "m"}),
        _event(13, "tool_progress", span="s", progress=1, total=2),
        _event(14, "node_start", span="t", node="n", kind="module"),
        _event(15, "node_error", span="t", node="n", duration=1, error={"code": "cancelled", "message": "m"}),
    ],
    "texts that grow": [
        _event(2, "message_start", message="m", span="s", field="f"),
        _event(3, "message_start", message="n", span="s", field="g"),
        *_many(50, lambda n: _event(4 + n, "token", message="mn"[n % 2], delta=f"{n}☃\\u0000")),
        _event(60, "status", message="one"),
        _event(61, "status", message="two", span="s"),
    ],
    "what is open at the end": [
        _event(2, "run_position", position=1),
        _event(3, "run_start", worker="w", attempt=1),
        _event(4, "message_start", message="m", span="s", field="f"),
        _event(5, "tool_start", span="s", tool="t", args={}),
        _event(6, "tool_progress", span="s", progress=1, message="half"),
        _event(7, "cancel_requested", by="me"),
        _event(8, "run_cancelled", reason="r", duration=1, usage={"input_tokens": 1, "output_tokens": 2}),
    ],
    "what is trimmed": [
        *_many(6, lambda n: _event(2 + n, "tool_start", span=f"s{n}", tool="t", args={"a": n})),
        *_many(4, lambda n: _event(8 + n, "tool_end", span=f"s{n}", tool="t", duration=1, result=n)),
        *_many(3, lambda n: _event(12 + n, "message_start", message=f"m{n}", span="s", field="f")),
        *_many(3, lambda n: _event(15 + n, "validation_error", span="s", node="n", attempt=n, error="e")),
        _event(18, "state", patch={"a": 1, "2": None, "c": {}}),
        _event(19, "state_trimmed", values=["s0", "s3", "gone"], spans=["s1", "s5"]),
        _event(20, "state_trimmed", messages=["m0", "m2"], validation_errors=2, fields=["a", "2", "never"]),
        _event(21, "tool_end", span="s5", tool="t", duration=1, result="too late"),
        _event(22, "token", message="m2", delta="too late"),
        _event(23, "message_start", message="m2", span="s", field="f"),
        _event(24, "state", patch={"a": 2}),
        _event(25, "state_trimmed"),
    ],
    "what nobody knows yet": [_event(2, "brand_new", anything=1), _event(3, "custom", name="n", value=None)],
}


@pytest.mark.parametrize("name", TRICKY)
async def test_the_reducers_agree(browser: Browser, reducer: Page, name: str) -> None:
    events = json.loads(json.dumps([QUEUED, *TRICKY[name]]))
    state = RunState.new("r", "a")
    for event in events:
        state.apply(event)
    assert await _reduced(reducer, events) == state.document


@settings(max_examples=50, deadline=None)
@given(log=logs)
async def test_the_reducers_agree_on_states_that_are_trimmed(browser: Browser, reducer: Page, log: Any) -> None:
    trimmed = trimmed_log(*log)
    assert await _reduced(reducer, trimmed.events) == trimmed.folded.document


async def _reduced(reducer: Page, events: list[dict[str, Any]]) -> Any:
    folded = await reducer.evaluate(
        "text => JSON.stringify(JSON.parse(text).reduce(agentcast.apply, undefined))", json.dumps(events)
    )
    return json.loads(folded)


@pytest.fixture(scope="module")
async def reducer(browser: Browser) -> AsyncIterator[Page]:
    idle: list[FunctionAgent] = []
    async with open_hub(*idle) as hub, open_page(browser, hub) as page:
        yield page

"""The private names of other packages: that they are what `_dspy` takes them for, and that nobody else is touched.

Each of these fails when DSPy, or anyio, changes what is used or replaced.
"""

import ast
import asyncio
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import dspy
import pytest
from dspy.clients import execution
from dspy.clients import lm as lm_module
from dspy.streaming import messages
from dspy.utils.callback import BaseCallback

from agentcast.agents._dspy import names as _dspy
from agentcast.agents.streaming import stream_events, streamify
from tests.support.lms import chat, lm_of, pieces

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]


SOURCES = sorted(path for folder in ("agents", "server") for path in (ROOT / folder).rglob("*.py"))
PUBLIC = {
    "dspy.experimental",
    "dspy.lm15",
    "dspy.streaming",
    "dspy.utils.callback",
    "dspy.utils.exceptions",
}
"""Modules whose names DSPy documents, or exports for engines of one's own."""


def test_the_versions_that_are_checked_are_those_that_are_tested_with():
    for package, version in _dspy.CHECKED.items():
        assert importlib.metadata.version(package).startswith(version)


@pytest.mark.parametrize("name", _dspy.PRIVATE)
def test_each_private_name_is_there(name: str):
    holder, _, last = name.rpartition(".")
    found: Any = pkgutil.resolve_name(holder)
    made = {"LM": lambda: dspy.LM("openai/x"), "RLM": lambda: dspy.RLM("question -> answer")}
    found = made[found.__name__]() if isinstance(found, type) and found.__name__ in made else found
    assert hasattr(found, last), name


@pytest.mark.parametrize("source", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_other_module_imports_a_private_name(source: Path):
    if source.parent.name == "_dspy":
        return
    for node in ast.walk(ast.parse(source.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
        for name in names:
            if name.startswith("dspy."):
                assert any(f"{name}.".startswith(f"{public}.") for public in PUBLIC), f"{name} belongs into _dspy"
            assert not (name.startswith("anyio.") and "._" in name), f"{name} belongs into _dspy"


def test_these_are_dspys_only_ways_out_of_a_synchronous_call():
    """Whatever else DSPy calls would bypass the bridge; what is gone need not be replaced any more."""
    assert dspy.__version__.startswith(_dspy.CHECKED["dspy"])
    uses = {
        module.__name__: re.findall(r"\banyio\.[\w.]+\(.*\)", inspect.getsource(module))
        for module in (execution, lm_module)
    }
    assert uses == {
        "dspy.clients.execution": ["anyio.from_thread.run(stream.send, chunk)"],
        "dspy.clients.lm": [
            "anyio.from_thread.run(functools.partial(stream_completion, request, cache_kwargs))",
        ],
    }
    callback = inspect.getsource(messages.StatusStreamingCallback)
    assert callback.count("sync_send_to_stream(stream, StatusMessage(status_message))") == 6


def test_importing_replaces_nothing_and_the_first_stream_does_it_once():
    script = """
import anyio, asyncio, dspy
from dspy.clients import execution, lm
from dspy.streaming import messages
from agentcast.agents import streaming as ours
names = lambda: (execution.anyio, lm.anyio, messages.sync_send_to_stream)
async def f(): return 7
async def main():
    before = names()
    program = ours.streamify(f)
    assert names() == before
    assert [item async for item in program()] == [7]
    after = names()
    assert not any(one is other for one, other in zip(before, after))
    assert [item async for item in program()] == [7]
    assert names() == after
asyncio.run(main())
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout == "ok\n", done.stderr


def test_a_dspy_without_some_of_its_modules_is_used_all_the_same():
    script = """
import asyncio, dspy
del dspy.RLM, dspy.ReActV2, dspy.Refine
from agentcast.agents import streaming as ours
async def look():
    return await dspy.Tool(lambda: 7, name="look", args={}).acall()
async def main():
    assert (await anext(ours.streamify(look)())).message.startswith("Calling tool look")
asyncio.run(main())
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout == "ok\n", done.stderr


@pytest.fixture
def installed() -> None:
    assert _dspy.install()


async def test_other_users_of_dspy_stream_as_before(installed: None):
    class Look(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        def forward(self) -> Any:
            dspy.Tool(lambda: "seen", name="look")()
            return self.ask(question="?")

    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="x"), 9))):
        items = [item async for item in dspy.streamify(Look())()]
    assert sum(isinstance(item, messages.StatusMessage) for item in items) == 2
    assert isinstance(items[-1], dspy.Prediction)
    assert len(items) > 4


async def test_the_stand_in_is_anyio_for_everybody_else(installed: None):
    stand_in: Any = execution.anyio
    assert stand_in.sleep is anyio.sleep
    assert stand_in.from_thread.run_sync is anyio.from_thread.run_sync
    assert await anyio.to_thread.run_sync(stand_in.from_thread.run, answer) == 42
    with pytest.raises(anyio.NoEventLoopError):
        await in_foreign_thread(lambda: stand_in.from_thread.run(answer))


async def answer() -> int:
    return 42


async def in_foreign_thread(call: Callable[[], Any]) -> Any:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # noqa: BLE001 -- raised below
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    await anyio.to_thread.run_sync(thread.join)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def send_through(module: ModuleType, chunk: Any) -> Any:
    """As LiteLLM's calls stream: a coroutine that sends by itself."""

    async def stream_completion() -> Any:
        await dspy.settings.send_stream.send(chunk)
        return chunk

    return module.anyio.from_thread.run(stream_completion)


@pytest.mark.parametrize("place", ["program", "parallel", "loop", "parallel on the loop"])
async def test_the_coroutine_of_a_litellm_call_runs_from_any_thread(place: str):
    def send(**_: Any) -> Any:
        return send_through(lm_module, {"chunk": 1})

    def in_parallel() -> Any:
        return dspy.Parallel(num_threads=2, disable_progress_bar=True)([(send, {})] * 100)[0]

    async def on_loop() -> Any:
        return in_parallel() if "parallel" in place else send()

    class Program(dspy.Module):  # type: ignore[misc]
        def forward(self) -> Any:
            return in_parallel() if place == "parallel" else send()

    stream = streamify(on_loop if "loop" in place else Program())()
    with anyio.fail_after(10):
        items = [item async for item in stream]
    assert items == [{"chunk": 1}] * (101 if "parallel" in place else 2)


async def test_a_chunk_from_a_foreign_thread_takes_no_event_loop_of_its_own(monkeypatch: pytest.MonkeyPatch):
    class Both(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        def forward(self) -> Any:
            return dspy.Parallel(num_threads=2, disable_progress_bar=True)([(self.ask, {"question": "?"})] * 2)[0]

    monkeypatch.delattr(_dspy, "run_to_end")
    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="x"), 9))):
        items = [item async for item in streamify(Both())()]
    assert len(items) > 6
    assert items[-1].answer == "x"


async def test_what_the_coroutine_raises_comes_through():
    async def on_loop() -> Any:
        async def fail() -> None:
            raise KeyError("mine")

        return lm_module.anyio.from_thread.run(fail)

    with pytest.raises(KeyError, match="mine"):
        await anext(streamify(on_loop)())


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """DSPy without what was replaced of its private names, and nobody knows."""
    monkeypatch.setattr(execution, "anyio", anyio)
    monkeypatch.setattr(lm_module, "anyio", anyio)
    monkeypatch.setattr(messages, "sync_send_to_stream", _dspys_own(messages.sync_send_to_stream))
    _dspy._replace_names.cache_clear()
    yield
    _dspy._replace_names.cache_clear()  # the next one finds what is replaced


def _dspys_own(function: Any) -> Any:
    return getattr(function, "_original", function)


async def lost_nothing() -> None:
    class Both(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ask = dspy.Predict("question -> answer")

        def forward(self) -> Any:
            answers = dspy.Parallel(num_threads=2, disable_progress_bar=True)([(self.ask, {"question": "?"})] * 2)
            return dspy.Prediction(answers=[*answers, self.ask(question="?")])

    with dspy.context(lm=lm_of(lambda _: pieces(chat(answer="it is so"), 3))):
        events = [event async for event in stream_events(Both(), {})]
        items = [item async for item in streamify(Both())()]
    assert [event.text for event in events if event.event == "message_end"] == ["it is so"] * 3
    tokens = [event.delta for event in events if event.event == "token"]
    assert tokens.count("it is so") == 2, "those from Parallel come whole"
    assert len(tokens) > 4, "those of the program's own thread stream"
    assert [each.answer for each in items[-1].answers] == ["it is so"] * 3


@pytest.mark.parametrize("version", ["9.0.1", "3.5.0", "3.3.9"])
async def test_an_untested_dspy_is_reported_once_and_left_alone(
    untouched: None, version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(dspy, "__version__", version)
    await lost_nothing()
    assert execution.anyio is anyio
    (record,) = caplog.records
    assert version in record.getMessage()


@pytest.mark.parametrize("version", ["9.0.1", "3.4.9"])
@pytest.mark.parametrize(
    ("module", "name"),
    [(execution, "anyio"), (lm_module, "anyio"), (messages, "sync_send_to_stream")],
    ids=["execution", "lm", "messages"],
)
def test_a_dspy_without_a_private_name_is_reported_once_and_left_alone(
    untouched: None,
    module: Any,
    name: str,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(dspy, "__version__", version)
    monkeypatch.delattr(module, name)
    left = {each.__name__: dict(vars(each)) for each in (execution, lm_module, messages)}
    assert not _dspy.install()
    assert not _dspy.install()
    assert {each.__name__: dict(vars(each)) for each in (execution, lm_module, messages)} == left
    (record,) = caplog.records
    assert version in record.getMessage()


@pytest.mark.parametrize("name", ["dspy.clients.execution", "dspy.clients.lm", "dspy.streaming.messages"])
def test_a_dspy_without_a_module_is_reported_once_and_left_alone(
    untouched: None, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(dspy, "__version__", "9.0.1")
    monkeypatch.setitem(sys.modules, name, None)
    assert not _dspy.install()
    assert len(caplog.records) == 1


async def test_cancelling_reaches_a_program_that_asks_anyio():
    """As in the threads of `anyio.to_thread`, which is where DSPy runs synchronous programs."""
    started, ended = threading.Event(), threading.Event()

    class Asks(dspy.Module):  # type: ignore[misc]
        def forward(self) -> None:
            started.set()
            try:
                while True:
                    anyio.from_thread.check_cancelled()
                    threading.Event().wait(0.001)
            finally:
                ended.set()

    from agentcast.agents.streaming import run_program

    class Nothing(BaseCallback):  # type: ignore[misc]
        async def send(self, event: Any) -> None: ...

        def nowait(self, event: Any) -> None: ...

    async with anyio.create_task_group() as group:
        group.start_soon(run_program, Asks(), {}, Nothing())
        await anyio.to_thread.run_sync(started.wait, 5)
        group.cancel_scope.cancel()
    with anyio.fail_after(5):
        assert await asyncio.to_thread(ended.wait, 5)

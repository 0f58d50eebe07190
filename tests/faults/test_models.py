"""LM calls that fail: repeated where that can help, their text retracted, or reported with a code; cancelled at once.

Programs are called through the whole hub, natively and through litellm, awaited and on threads, and reach a provider's
HTTP API over a real socket.
"""

import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import dspy
import pytest
from dspy.utils.exceptions import LMTransportError

from agentcast.agents.context import within
from agentcast.agents.llm import Model, Retrying, close_connections
from agentcast.agents.registry import Registry
from agentcast.agents.streaming import streamify
from tests.support.client import Client, View
from tests.support.hub import RunningHub, open_hub
from tests.support.lms import chat
from tests.support.log import Log
from tests.support.openai import Answer, Hang, Provider, Refuse, Say, provider

MODEL = "openai/gpt-5-mini"
KEY = "sk-not-to-be-seen-anywhere"
ANSWER = "Nothing happens to the others."
WHOLE = Say(chat(answer=ANSWER))
QUICK = Retrying(attempts=3, backoff=0.01, patience=60, idle=30)
ASKED = {"question": "What happens to a slow client?"}


@pytest.fixture(autouse=True)
def prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


class Blocking(dspy.Module):  # type: ignore[misc]
    """A synchronous program."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        return self.answer(question=question)


PROGRAMS = {"awaited": lambda: dspy.Predict("question -> answer"), "blocking": Blocking}


@contextmanager
def retrying(how: Retrying) -> Iterator[None]:
    with dspy.context(adapter=dspy.ChatAdapter()), within(retrying=how):
        yield


def lm_of(served: Provider, engine: str = "auto") -> Model:
    return Model(MODEL, api_base=f"{served.url}/v1", api_key=KEY, engine=engine, cache=False, num_retries=0)


@asynccontextmanager
async def hub_of(
    served: Provider, kind: str = "awaited", how: Retrying = QUICK, engine: str = "auto"
) -> AsyncIterator[tuple[RunningHub, Client]]:
    """A hub with one agent, `asked`, whose model is what `served` serves."""
    registry = Registry()
    registry.add("asked", PROGRAMS[kind](), signature="question -> answer", lm=lm_of(served, engine))
    with retrying(how):
        async with open_hub(*registry) as hub, hub.client() as client:
            yield hub, client


async def outcome(*answers: Answer, **options: Any) -> tuple[View, Provider]:
    """What a client sees of one run."""
    async with provider(*answers) as served, hub_of(served, **options) as (_, client):
        view = await client.view(await client.start("asked", ASKED))
        assert KEY not in "".join(view.texts)
        return view, served


def of(view: View, *names: str) -> list[dict[str, Any]]:
    return [event for event in view.events if event["event"] in names]


# -- What passes -------------------------------------------------------------------------------------------------------

PASSING: dict[str, tuple[Answer, str]] = {
    "429": (Refuse(429), "lm_rate_limited"),
    "429 with Retry-After": (Refuse(429, headers={"Retry-After": "0"}), "lm_rate_limited"),
    "500": (Refuse(500), "lm_unavailable"),
    "503": (Refuse(503), "lm_unavailable"),
    "hang": (Hang(), "lm_timeout"),
    "cut": (Say(WHOLE.text, after=6), "lm_unavailable"),
    "ended early": (Say(WHOLE.text, after=6, fault="end"), "lm_bad_response"),
    "hang in the middle": (Say(WHOLE.text, after=6, fault="hang"), "lm_timeout"),
    "garbage": (Say(WHOLE.text, after=6, fault="garbage"), "lm_bad_response"),
    "error in the stream": (Say(WHOLE.text, after=6, fault="error"), "lm_unavailable"),
    "an unknown one": (Say(WHOLE.text, after=6, fault="error", error_code="overloaded_error"), "lm_unavailable"),
    "a gateway's": (Say(WHOLE.text, after=6, fault="error", error_code=502), "lm_unavailable"),
    "a gateway's 429": (Say(WHOLE.text, after=6, fault="error", error_code=429), "lm_rate_limited"),
}


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("fault", PASSING)
async def test_a_call_that_fails_in_passing_is_repeated_and_its_text_is_void(fault: str, kind: str) -> None:
    broken, code = PASSING[fault]
    idle = 0.3 if code == "lm_timeout" else 30.0
    view, served = await outcome(broken, WHOLE, kind=kind, how=Retrying(attempts=2, backoff=0.01, idle=idle))
    assert view.document["status"] == "done"
    assert view.document["result"] == {"answer": ANSWER}
    assert len(served.requests) == 2

    failed, succeeded = of(view, "lm_end")
    assert failed["error"]["code"] == code
    assert succeeded["usage"]["output_tokens"] == 7
    (status,) = of(view, "status")
    assert "trying again" in status["message"]
    assert "(attempt 2 of 2)" in status["message"]
    assert failed["seq"] < status["seq"] < of(view, "lm_start")[1]["seq"]

    texts = [message["text"] for message in view.document["messages"] if message["status"] == "done"]
    assert texts == [ANSWER]
    void = [message["text"] for message in view.document["messages"] if message["status"] == "retracted"]
    streamed = isinstance(broken, Say)
    assert len(void) == streamed == len(of(view, "message_retracted"))
    if streamed:
        assert ANSWER.startswith(void[0])
        assert void[0]
        assert of(view, "message_retracted")[0]["seq"] < status["seq"]


async def test_retry_after_is_waited_for() -> None:
    """The test checks the status that users see, not a clock."""
    view, _ = await outcome(Refuse(429, headers={"Retry-After": "1"}), WHOLE)
    (status,) = of(view, "status")
    assert "trying again in 1.0 s" in status["message"]
    assert view.document["status"] == "done"


async def test_attempts_end_and_the_run_says_that_a_later_one_may_succeed() -> None:
    view, served = await outcome(Refuse(503))
    assert len(served.requests) == QUICK.attempts
    assert len(of(view, "lm_end")) == QUICK.attempts
    error = view.document["error"]
    assert error["code"] == "lm_unavailable"
    assert error["retryable"] is True
    assert "try again" in error["message"]


async def test_a_provider_that_is_not_there() -> None:
    async with provider(WHOLE) as gone:
        pass
    with retrying(QUICK):
        async with hub_of(gone) as (_, client):
            view = await client.view(await client.start("asked", ASKED))
    assert view.document["error"]["code"] == "lm_unavailable"
    assert "Connection refused" in view.document["error"]["message"]
    assert len(of(view, "status")) == QUICK.attempts - 1


# -- What does not pass ------------------------------------------------------------------------------------------------

FINAL = {
    "401": (Refuse(401), "lm_auth"),
    "403": (Refuse(403), "lm_auth"),
    "404": (Refuse(404), "lm_not_found"),
    "quota": (Refuse(429, code="insufficient_quota"), "lm_billing"),
    "too long": (Refuse(400, code="context_length_exceeded"), "lm_context_window"),
    "bad": (Refuse(400, message=f"the key {KEY} is in a strange place"), "lm_bad_request"),
}


@pytest.mark.parametrize("case", FINAL)
async def test_what_cannot_be_helped_fails_at_once(case: str, caplog: pytest.LogCaptureFixture) -> None:
    refusal, code = FINAL[case]
    view, served = await outcome(refusal, WHOLE)
    assert len(served.requests) == 1
    assert not of(view, "status")
    error = view.document["error"]
    assert (error["code"], error["retryable"]) == (code, False)
    assert error["message"].startswith(f"{MODEL}: ")
    assert KEY not in caplog.text
    (logged,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert code in logged.getMessage()


async def test_a_client_that_breaks_down_is_in_the_log(log: Log) -> None:
    class Engine:
        def complete(self, request: Any) -> Any:
            raise KeyError("inside")

    class AsyncEngine(Engine):
        async def complete(self, request: Any) -> Any:
            raise KeyError("inside")

    log.expect("of agent asked failed")
    registry = Registry()
    lm = dspy.LM("own/engine", engine=Engine(), async_engine=AsyncEngine(), cache=False)
    registry.add("asked", dspy.Predict("question -> answer"), lm=lm)
    async with open_hub(*registry) as hub, hub.client() as client:
        view = await client.view(await client.start("asked", ASKED))
    assert view.document["error"]["code"] == "lm_error"
    assert "KeyError" in view.document["error"]["message"]
    assert "inside" not in "".join(view.texts)


# -- Through litellm ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # litellm and its types warn of themselves
@pytest.mark.parametrize("kind", PROGRAMS)
async def test_litellm_is_retried_in_the_same_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import litellm

    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    litellm.in_memory_llm_clients_cache.flush_cache()  # it distinguishes loops by their `id`, which tests reuse
    answers = (Refuse(429, headers={"Retry-After": "0"}), Say(WHOLE.text, after=6), WHOLE)
    view, served = await outcome(*answers, kind=kind, engine="litellm")
    assert view.document["result"] == {"answer": ANSWER}
    assert len(served.requests) == 3  # litellm and the client in it do not retry on their own
    codes = [end.get("error", {}).get("code") for end in of(view, "lm_end")]
    assert codes == ["lm_rate_limited", "lm_unavailable", None]
    done = [message["text"] for message in view.document["messages"] if message["status"] == "done"]
    assert done == [ANSWER]


# -- Cancelling --------------------------------------------------------------------------------------------------------

PATIENT = Retrying(attempts=5, patience=100_000, idle=3_000)
LATER = Refuse(503, headers={"Retry-After": "3000"})


@pytest.mark.parametrize("fault", [Hang(), Say(WHOLE.text, after=6, fault="hang")], ids=["before", "middle"])
async def test_a_call_is_cancelled_at_once_and_the_provider_is_let_go(fault: Answer) -> None:
    async with provider(fault) as served, hub_of(served, how=PATIENT) as (hub, client):
        run = await client.start("asked", ASKED)
        with anyio.fail_after(20):
            await served.asked(1)
            await client.ask("cancel", run=run)
            view = await client.view(run)
            await served.left.wait()
        assert view.document["status"] == "cancelled"
        assert hub.core.runs.abandoned == 0


@pytest.mark.parametrize("kind", PROGRAMS)
async def test_a_pause_between_attempts_is_cancelled_at_once(kind: str) -> None:
    async with provider(LATER) as served, hub_of(served, kind, PATIENT) as (hub, client):
        run = await client.start("asked", ASKED)
        with anyio.fail_after(20):
            await client.event("status", run)
            threads = [thread for thread in threading.enumerate() if thread.name.startswith("program ")]
            assert len(threads) == (kind == "blocking")
            await client.ask("cancel", run=run)
            view = await client.view(run)
            for thread in threads:
                await anyio.to_thread.run_sync(thread.join, 10)
                assert not thread.is_alive()
        assert view.document["status"] == "cancelled"
        assert hub.core.runs.abandoned == 0
        assert len(served.requests) == 1


async def test_pauses_of_blocking_programs_do_not_hold_up_the_loop() -> None:
    """Another client's whole run happens during the pause."""
    async with provider(LATER, WHOLE) as served, hub_of(served, "blocking", PATIENT) as (hub, client):
        pausing = await client.start("asked", ASKED)
        with anyio.fail_after(20):
            await client.event("status", pausing)
            async with hub.client() as other:
                view = await other.view(await other.start("asked", ASKED))
        assert view.document["status"] == "done"
        assert client.memory.view(pausing).document["status"] == "running"


async def test_a_blocking_call_on_the_loop_is_not_waited_for() -> None:
    """It blocks the loop while it is made, which its author has asked for; a pause would on top of that."""
    async with provider(WHOLE) as gone:
        pass
    registry = Registry()

    @registry.agent(lm=lm_of(gone))
    async def careless(question: str) -> str:
        return str(dspy.Predict("question -> answer")(question=question).answer)

    with retrying(PATIENT), anyio.fail_after(20):
        async with open_hub(*registry) as hub, hub.client() as client:
            view = await client.view(await client.start("careless", ASKED))
    assert view.document["error"]["code"] == "lm_unavailable"
    assert not of(view, "status")


# -- Streams that know no retraction -----------------------------------------------------------------------------------


async def _drain(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_a_stream_that_cannot_take_back_text_is_not_repeated() -> None:
    async with provider(Say(WHOLE.text, after=6), WHOLE) as served:
        program = streamify(dspy.Predict("question -> answer"), is_async_program=True)
        with retrying(QUICK), dspy.context(lm=lm_of(served)):
            stream = program(**ASKED)
            assert await anext(stream)
            with pytest.raises(LMTransportError):
                await _drain(stream)
            await close_connections()
        assert len(served.requests) == 1


async def test_but_it_is_when_it_had_shown_none() -> None:
    async with provider(Refuse(503), WHOLE) as served:
        program = streamify(dspy.Predict("question -> answer"), is_async_program=True)
        with retrying(QUICK), dspy.context(lm=lm_of(served)):
            items = [item async for item in program(**ASKED)]
            await close_connections()
        assert items[-1].answer == ANSWER
        assert len(served.requests) == 2

"""Real models, nothing replaced: a hub as users start it, and a provider's HTTP API on loopback (G1, G9)."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.support.lms import chat
from tests.support.modelled import FIXED, OWN
from tests.support.openai import Provider, Refuse, Say, provider
from tests.support.process import ServedHub, refused, serve

MODEL = "openai/gpt-5-mini"
KEY = "sk-not-to-be-seen-anywhere"
ANSWER = "It is cut after thirty seconds, and nobody else notices."
SAID = Say(chat(answer=ANSWER), size=5)
ASKED = {"question": "What happens to a slow client?"}
AGENTS = "tests.support.modelled:registry"


@asynccontextmanager
async def hub_of(served: Provider, monkeypatch: pytest.MonkeyPatch, lm: str = MODEL) -> AsyncIterator[ServedHub]:
    """A hub that is given its provider by the usual variables only."""
    for name, path in (("OPENAI_BASE_URL", "/v1"), ("ANTHROPIC_BASE_URL", ""), ("OLLAMA_API_BASE", "")):
        monkeypatch.setenv(name, served.url + path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    async with serve(agents=AGENTS, lm=lm, lm_backoff="0.01") as hub:
        yield hub


def of(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


async def test_tokens_usage_and_cost_arrive_and_the_key_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async with provider(Say(SAID.text, size=5, after=9), Refuse(401, KEY), SAID) as served:
        async with hub_of(served, monkeypatch) as hub, hub.client() as client:
            view = await client.view(await client.start("writer", ASKED))
            assert view.document["error"]["code"] == "lm_auth"
            assert "OPENAI_API_KEY" in view.document["error"]["message"]
            assert len(of(view.events, "message_retracted")) == 1

            run = await client.start("writer", ASKED)
            good = await client.view(run)
            assert good.document["result"] == {"answer": ANSWER}
            assert len(of(good.events, "token")) > 1 or len(ANSWER) == len(of(good.events, "token")[0]["delta"])
            (call,) = of(good.events, "lm_end")
            usage = {"input_tokens": 11, "output_tokens": 7, "cached_tokens": 4, "cost": call["usage"]["cost"]}
            assert call["usage"] == usage
            assert 0 < usage["cost"] < 0.01
            assert good.events[-1]["usage"] == usage
            assert of(good.events, "lm_start")[0]["model"] == MODEL

            loaded = await client.view(await client.start("loaded"))
            assert loaded.document["result"] is False

            async with httpx.AsyncClient(base_url=hub.url, trust_env=False) as http:
                answers = [await http.get(path) for path in ("/v1/agents", "/v1/runs", f"/v1/runs/{run}")]
            seen = [*view.texts, *good.texts, *(answer.text for answer in answers)]
            hub.signal(signal.SIGTERM)
            assert await hub.exit_code(within=10) == 0
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers in served.headers)
        assert KEY not in "".join(seen)
        log = "".join(hub.log)
        assert "lm_auth" in log
        assert KEY not in log
        assert "Traceback" not in log
        assert "ResourceWarning" not in log


async def test_several_models_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async with provider(SAID) as served, hub_of(served, monkeypatch) as hub, hub.client() as client:
        view = await client.view(await client.start("several", ASKED))
        assert view.document.get("result") == {"answer": ANSWER}, view.document["error"]
        assert [event["model"] for event in of(view.events, "lm_start")] == [OWN, FIXED]
        first, second = (event["usage"] for event in of(view.events, "lm_end"))
        assert first["input_tokens"] == second["input_tokens"] == 11
        assert "cost" in first
        assert "cost" not in second  # nobody knows the price of one's own machine
        total = view.events[-1]["usage"]
        assert total["input_tokens"] == 22
        assert total["cost"] == first["cost"]
        assert [body["model"] for body in served.requests] == ["claude-sonnet-4-5", "llama3.2"]
        assert served.headers[0]["x-api-key"] == KEY
        assert KEY not in str(served.headers[1])

        other = await client.view(await client.start("other", ASKED))
        assert [event["model"] for event in of(other.events, "lm_start")] == [OWN]
        assert len(of(other.events, "token")) >= 1


async def test_a_hub_without_the_key_starts_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    async with serve(agents=AGENTS, lm=MODEL) as hub, hub.client() as client:
        assert "OPENAI_API_KEY is not set" in hub.banner
        view = await client.view(await client.start("writer", ASKED))
        assert view.document["error"]["code"] == "lm_auth"
        assert "set OPENAI_API_KEY" in view.document["error"]["message"]
        assert view.document["error"]["retryable"] is False


async def test_a_model_that_nobody_serves_is_refused_at_the_start() -> None:
    code, text = await refused(lm="nowhere/model-1")
    assert code == 2
    assert "no provider is known by that name" in text

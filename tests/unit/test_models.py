"""Models: when a call is made again, what its failure is called, and what is made of a model string."""

import os
import sys
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMAuthError,
    LMBillingError,
    LMError,
    LMInvalidRequestError,
    LMNotConfiguredError,
    LMProviderError,
    LMRateLimitError,
    LMServerError,
    LMStreamAssemblyError,
    LMTimeoutError,
    LMTransportError,
    LMUnexpectedError,
    LMUnsupportedModelError,
)

from agentcast.agents.context import within
from agentcast.agents.failures import failure_of
from agentcast.agents.llm import (
    Model,
    ModelError,
    Retrying,
    as_model,
    make_lm,
    missing_key,
    takes_litellm,
)
from agentcast.agents.registry import Registry, RegistryError
from agentcast.agents.registry.hosting import FunctionAgent, ProgramAgent

MODEL = "openai/gpt-5-mini"
SERVER = LMServerError("no", model=MODEL, status=500)


def caused(error: LMError, *causes: BaseException) -> LMError:
    """`error` as raised because of the first of `causes`, that because of the next."""
    last: BaseException = error
    for cause in causes:
        last.__cause__ = cause
        last = cause
    return error


class ReadTimeout(Exception):
    pass


# -- Retrying ----------------------------------------------------------------------------------------------------------


def test_pauses_grow_and_are_random():
    retrying = Retrying(attempts=10, backoff=2.0, patience=1_000)
    for attempt, most in ((1, 2), (2, 4), (3, 8), (4, 16), (5, 30), (9, 30)):
        pauses = {retrying.pause(SERVER, attempt, 0) for _ in range(200)}
        assert len(pauses) > 100
        assert all(pause is not None and most / 2 <= pause <= most for pause in pauses)


def test_attempts_are_limited():
    assert Retrying(attempts=3).pause(SERVER, 2, 0) is not None
    assert Retrying(attempts=3).pause(SERVER, 3, 0) is None
    assert Retrying(attempts=1).pause(SERVER, 1, 0) is None


def test_no_attempt_begins_after_the_patience_is_over():
    retrying = Retrying(attempts=9, backoff=1.0, patience=60)
    assert retrying.pause(SERVER, 1, 58.9) is not None
    assert retrying.pause(SERVER, 1, 59.6) is None


def test_retry_after_is_kept_to_unless_it_is_beyond_the_patience():
    retrying = Retrying(attempts=9, backoff=1.0, patience=60)
    for seconds in (0, 7, 50):
        pauses = [retrying.pause(LMRateLimitError("slow", retry_after=seconds), 3, 5) for _ in range(50)]
        assert all(pause is not None and seconds <= pause <= seconds + 1 for pause in pauses)
    assert retrying.pause(LMRateLimitError("slow", retry_after=3_600), 1, 0) is None


# -- Failures ----------------------------------------------------------------------------------------------------------

FAILURES = [
    (LMNotConfiguredError("no key", model=MODEL), "lm_auth", "set OPENAI_API_KEY"),
    (LMAuthError("key sk-1 is wrong", model=MODEL, status=401), "lm_auth", "check OPENAI_API_KEY"),
    (LMAuthError("no", model=MODEL, status=403), "lm_auth", "403"),
    (LMBillingError("no", model=MODEL), "lm_billing", "quota"),
    (LMRateLimitError("no", model=MODEL, retry_after=3_600), "lm_rate_limited", "wait 3600 s"),
    (LMUnsupportedModelError("no", model=MODEL), "lm_not_found", "404"),
    (LMInvalidRequestError("no", model=MODEL, status=404), "lm_not_found", "404"),
    (ContextWindowExceededError(model=MODEL), "lm_context_window", "longer than the model takes"),
    (LMInvalidRequestError("temperature must be 1\nmore", model=MODEL), "lm_bad_request", "temperature must be 1"),
    (LMTimeoutError("no", model=MODEL), "lm_timeout", "silent"),
    (caused(LMTransportError("no", model=MODEL), OSError(), ReadTimeout()), "lm_timeout", "silent"),
    (SERVER, "lm_unavailable", "500"),
    (
        caused(LMTransportError("x", model=MODEL), ConnectionRefusedError(111, "to 10.1.2.3")),
        "lm_unavailable",
        "refused",
    ),
    (LMServerError("no", model=MODEL), "lm_unavailable", "failed while it answered"),
    (LMProviderError("no", model=MODEL, provider_code="overloaded"), "lm_unavailable", "failed while it answered"),
    (LMProviderError("no", model=MODEL, provider_code="429"), "lm_rate_limited", "too many requests"),
    (LMProviderError("no", model=MODEL, provider_code="1113"), "lm_unavailable", "failed"),
    (LMProviderError("no", model=MODEL, provider_code="401"), "lm_auth", "check OPENAI_API_KEY"),
    (LMProviderError("moved", model=MODEL, status=301), "lm_bad_request", "moved"),
    (LMStreamAssemblyError("no", model=MODEL), "lm_bad_response", "broke off"),
    (caused(LMUnexpectedError("no", model=MODEL), ValueError("{")), "lm_bad_response", "could not be read"),
    (caused(LMUnexpectedError("no", model=MODEL), KeyError("sk-1")), "lm_error", "KeyError"),
]
RETRYABLE = {"lm_rate_limited", "lm_timeout", "lm_unavailable", "lm_bad_response"}


@pytest.mark.parametrize(("error", "code", "text"), FAILURES, ids=range(len(FAILURES)))
def test_every_failure_has_a_code_and_says_what_to_do(error: LMError, code: str, text: str):
    failure = failure_of(error)
    assert failure.code == code
    assert failure.message.startswith(f"{MODEL}: ")
    assert text in failure.message
    assert failure.retryable == (code in RETRYABLE)
    assert (Retrying().pause(error, 1, 0) is not None) == (code in RETRYABLE and error.retry_after is None)
    assert "sk-1" not in failure.message
    assert "10.1.2.3" not in failure.message
    assert "\n" not in failure.message


def test_a_group_of_one_error_is_that_error():
    assert failure_of(ExceptionGroup("x", [ExceptionGroup("y", [SERVER])])) == failure_of(SERVER)
    assert failure_of(ExceptionGroup("x", [SERVER, SERVER])).code == "agent_error"
    assert failure_of(ValueError("wrong")).message == "wrong"


def test_what_a_provider_says_is_reported_without_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    said = "bad key sk-very-secret at https://me:hunter22@gate.example/v1"
    message = failure_of(LMInvalidRequestError(said, model=MODEL)).message
    assert message == f"{MODEL}: the provider refuses the request: bad key [redacted] at https://gate.example/v1"


# -- Making models -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("OPENAI_", "ANTHROPIC_", "OLLAMA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


@pytest.mark.parametrize(
    ("model", "variable", "value", "base"),
    [
        (MODEL, "OPENAI_BASE_URL", "http://gate:1/v1", "http://gate:1/v1"),
        (MODEL, "OPENAI_API_BASE", "http://gate:1/openai/", "http://gate:1/openai"),
        ("anthropic/claude-sonnet-4-5", "ANTHROPIC_BASE_URL", "http://gate:1", "http://gate:1/v1"),
        ("anthropic/claude-sonnet-4-5", "ANTHROPIC_BASE_URL", "http://gate:1/v1/", "http://gate:1/v1"),
        ("ollama/llama3.2", "OLLAMA_API_BASE", "http://box:11434", "http://box:11434/v1"),
        ("ollama_chat/llama3.2", "OLLAMA_API_BASE", "http://box:11434/", "http://box:11434/v1"),
    ],
)
def test_a_base_url_of_the_environment_does_not_need_litellm(
    monkeypatch: pytest.MonkeyPatch, model: str, variable: str, value: str, base: str
):
    monkeypatch.setenv(variable, value)
    lm = make_lm(model)
    assert type(lm) is Model
    assert lm.kwargs["api_base"] == base
    assert not takes_litellm(lm)


def test_a_missing_key_is_known_without_a_call(monkeypatch: pytest.MonkeyPatch):
    assert missing_key(make_lm(MODEL)) == "OPENAI_API_KEY"
    assert missing_key(make_lm("anthropic/claude-sonnet-4-5")) == "ANTHROPIC_API_KEY"
    assert missing_key(make_lm("ollama/llama3.2")) is None
    assert missing_key(make_lm("offline")) is None
    monkeypatch.setenv("OPENAI_API_KEY", "sk-some-key")
    assert missing_key(make_lm(MODEL)) is None


async def test_silence_is_distinguished_from_a_queue_for_connections(monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []

    async def acall(self: Any, *_: Any, **options: Any) -> Any:
        made.append(options.get("timeout"))
        return ["x"]

    monkeypatch.setattr(dspy.LM, "acall", acall)
    lm, given = as_model(dspy.LM(MODEL, cache=False)), as_model(dspy.LM(MODEL, cache=False, timeout=3))
    with within(retrying=Retrying(attempts=1, idle=7)):
        await lm.acall("Hello")
        await given.acall("Hello")
        await lm.acall("Hello", timeout=4)
    assert made[0].read == 7
    assert made[0].pool > 3_600
    assert made[1:] == [None, 4]


# -- An agent's own model ----------------------------------------------------------------------------------------------


def test_an_agent_takes_a_model_of_its_own():
    registry = Registry()
    mine = dspy.LM(MODEL, api_key="sk-given-in-code")
    agents: list[Any] = [
        registry.add("named", dspy.Predict("question -> answer"), lm="ollama/llama3.2"),
        registry.add("given", dspy.Predict("question -> answer"), lm=mine),
        registry.add("default", dspy.Predict("question -> answer")),
    ]

    @registry.agent(lm="ollama/qwen3")
    async def function(question: str) -> str:
        return question

    @registry.react(tools=[], lm="ollama/llama3.2")
    class Reacting(dspy.Signature):  # type: ignore[misc]
        question: str = dspy.InputField()
        answer: str = dspy.OutputField()

    agents += [registry["function"], registry["reacting"]]
    assert all(isinstance(agent, ProgramAgent | FunctionAgent) for agent in agents)
    models = [agent.lm and agent.lm.model for agent in agents]
    assert models == ["ollama/llama3.2", MODEL, None, "ollama/qwen3", "ollama/llama3.2"]
    assert all(type(agent.lm) in (Model, type(None)) for agent in agents)
    assert type(mine) is dspy.LM


@pytest.mark.parametrize(
    ("lm", "problem"), [("gpt5", "no provider is known"), ("openai/", "no model id"), (7, "an int")]
)
def test_a_wrong_model_of_an_agent_is_an_error_at_once(lm: Any, problem: str):
    with pytest.raises(RegistryError, match=problem) as caught:
        Registry().add("writer", dspy.Predict("question -> answer"), lm=lm)
    assert caught.value.subject == "agent 'writer'"


def test_a_model_that_needs_litellm_is_recognized(monkeypatch: pytest.MonkeyPatch):
    lm = make_lm("mistral/mistral-small")
    assert takes_litellm(lm)
    assert missing_key(lm) is None
    monkeypatch.setitem(sys.modules, "litellm", None)
    with pytest.raises(ModelError, match="pip install litellm"):
        make_lm("mistral/mistral-small")

"""`agentcast doctor`: tries everything that a hub with these settings would need, and says what to do about what fails.

Each check is a function that yields findings; `examine` is the list of them. A check that fails stops no other.
Nothing of what is shown holds a secret (G9). It must not be known here how findings are printed.
"""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import anyio
import dspy
from dspy.utils.exceptions import AdapterParseError

from agentcast.agents import llm, mcp
from agentcast.agents.base import redact
from agentcast.agents.events import Usage
from agentcast.agents.failures import failure_of
from agentcast.agents.registry import Registry, RegistryError, add_assistant, load, servers_used
from agentcast.agents.streaming import run_program
from agentcast.server.bus.redis import check
from agentcast.server.cli import serving
from agentcast.server.client import ClientError, connect
from agentcast.server.config import Settings
from agentcast.server.errors import BusError

CALL_SECONDS = 60.0
"""The most that the one small call to a model may take."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found. `ok` None: there was nothing to check, or it is worth knowing. `remedy`: what to do, of
    a failure."""

    subject: str
    ok: bool | None
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = {True: "✓", False: "✗", None: "–"}[self.ok]
        line = f"{mark} {self.subject:<10}  {self.text}"
        return redact(f"{line}\n    {self.remedy}" if self.remedy else line)


async def examine(settings: Settings, report: Callable[[Finding], None]) -> bool:
    """Make all checks, passing each finding to `report`; gives whether nothing failed."""
    well = True
    registry = Registry()
    checks = (_registries(settings, registry), _models(settings, registry), _redis(settings), _mcp(settings, registry))
    for findings in (*checks, _port(settings)):
        async for finding in findings:
            well = well and finding.ok is not False
            report(finding)
    return well


# -- Registries --------------------------------------------------------------------------------------------------------


async def _registries(settings: Settings, found: Registry) -> AsyncIterator[Finding]:
    """Loads them into `found`."""
    for spec in settings.agents:
        try:
            registry = load(spec)
            found.update(registry)
        except RegistryError as error:
            yield Finding("registry", False, f"{error.subject}: {error.problem}", error.remedy)
        else:
            yield Finding("registry", True, f"{spec}: {', '.join(registry.names)}")


# -- Models ------------------------------------------------------------------------------------------------------------


async def _models(settings: Settings, registry: Registry) -> AsyncIterator[Finding]:
    once = llm.Retrying(attempts=1, idle=min(settings.lm_idle, CALL_SECONDS))
    try:
        model = llm.configure(settings.lm, once)
    except llm.ModelError as error:
        remedy = "give --lm or AGENTCAST_LM a model as dspy.LM takes it, such as openai/gpt-5-mini, or offline"
        yield Finding("model", False, f"{error.model}: {error.problem}", remedy)
    else:
        yield await _called(dspy.settings.lm, model.name, "the default")
    for lm, agent in _own_models(registry):
        yield await _called(lm, str(lm.model), f"of agent {agent}")


def _own_models(registry: Registry) -> list[tuple[Any, str]]:
    """The models that agents or their predictors have for themselves, each with the first agent that has it."""
    found: dict[str, tuple[Any, str]] = {}
    for agent in registry:
        program = getattr(agent, "program", None)
        predictors = [predictor for _, predictor in program.named_predictors()] if program is not None else []
        for lm in (getattr(agent, "lm", None), *(llm.as_model(predictor.lm) for predictor in predictors)):
            if lm is not None:
                found.setdefault(f"{lm.model} {lm.kwargs.get('api_base')}", (lm, agent.spec.name))
    return list(found.values())


async def _called(lm: Any, name: str, whose: str) -> Finding:
    """One small call, made and streamed as an agent's would be."""
    started = time.monotonic()
    way = ", through litellm" if llm.takes_litellm(lm) else ""
    usage: Usage | None = None
    try:
        with anyio.fail_after(CALL_SECONDS), dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
            usage = (await run_program(dspy.Predict("question -> answer"), _QUESTION, _Unheard())).usage
    except AdapterParseError:
        way += ", though not in the form asked for: it may be too small a model"
    except TimeoutError:
        remedy = "try again; if it stays so slow, take another model"
        return Finding("model", False, f"{name} ({whose}): no answer within {CALL_SECONDS:g} s", remedy)
    except Exception as error:  # noqa: BLE001 -- whatever a client raises is what this is to find out
        text, _, remedy = failure_of(error).message.partition("; ")
        text = text.removeprefix(f"{name}: ")
        return Finding("model", False, f"{name} ({whose}): {text}", remedy or "see the provider's documentation")
    seconds = time.monotonic() - started
    return Finding("model", True, f"{name} ({whose}) answered in {seconds:.1f} s{_cost(usage)}{way}")


_QUESTION = {"question": "What is 1 + 1? Answer with the number alone."}


def _cost(usage: Usage | None) -> str:
    if usage is None:
        return ""
    dollars = "" if usage.cost is None else f", ${usage.cost:.6f}"
    return f" ({usage.input_tokens} + {usage.output_tokens} tokens{dollars})"


class _Unheard:
    """An emitter that nobody listens to."""

    async def send(self, event: Any) -> None:
        pass

    def nowait(self, event: Any) -> None:
        pass


# -- What else a hub may be connected to -------------------------------------------------------------------------------


async def _redis(settings: Settings) -> AsyncIterator[Finding]:
    if settings.redis is None:
        yield Finding("redis", None, "not used: the runs of this hub are in its memory")
        return
    try:
        yield Finding("redis", True, await check(settings.redis.get_secret_value(), settings.redis_prefix))
    except BusError as error:
        yield Finding("redis", False, str(error), "start it, or fix --redis or AGENTCAST_REDIS")


async def _mcp(settings: Settings, registry: Registry) -> AsyncIterator[Finding]:
    """Starts each MCP server, and ends it again."""
    try:
        configured = mcp.load_servers(settings.mcp_config) if settings.mcp_config else []
        servers = servers_used(add_assistant(registry, configured))
    except mcp.McpConfigError as error:
        where = f": {error.where}" if error.where else ""
        yield Finding("mcp", False, f"{error.file}{where}: {error.problem}", error.remedy)
        return
    except RegistryError as error:
        yield Finding("mcp", False, f"{error.subject}: {error.problem}", error.remedy)
        return
    if not servers:
        yield Finding("mcp", None, "no agent uses an MCP server")
    for status in await mcp.check(servers):
        name = f"{status.name} ({status.kind})"
        if status.state == "up":
            yield Finding("mcp", True, f"{name} has {status.tools} tools")
            for problem in status.problems:
                yield Finding("mcp", None, f"{status.name}: {problem}")
        else:
            remedy = "fix what describes it, or start it where it runs; until then its agents are not available"
            yield Finding("mcp", False, f"{name}: {status.reason or 'it did not start in time'}", remedy)


# -- The port ----------------------------------------------------------------------------------------------------------


async def _port(settings: Settings) -> AsyncIterator[Finding]:
    where = f"{settings.host}:{settings.port}"
    try:
        serving.bind(settings).close()
    except serving.CannotServe as error:
        try:
            document = await connect(f"http://{where}").describe()
        except ClientError:
            problem, _, remedy = str(error).partition("; ")
            yield Finding("port", False, problem, remedy)
        else:
            yield Finding("port", True, f"a hub is running at {where}, with {len(document['agents'])} agents")
    else:
        yield Finding("port", True, f"{where} is free" if settings.port else "any free one is taken")

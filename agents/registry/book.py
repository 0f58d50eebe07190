"""A registry: agents by name, and the ways to add one. It must not know how registries are found."""

import inspect
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

import dspy
from pydantic import BaseModel

from agentcast.agents._dspy.names import missing_runtime
from agentcast.agents.base import DEFAULT_MAX_CONCURRENT, DEFAULT_TIMEOUT, Agent, AgentSpec
from agentcast.agents.inputs.contract import SchemaError, function_call, module_contract, signature_contract
from agentcast.agents.llm import ModelError, as_model, make_lm
from agentcast.agents.mcp import McpServer
from agentcast.agents.react import DEFAULT_MAX_ITERS, ReAct
from agentcast.agents.registry.errors import RegistryError
from agentcast.agents.registry.hosting import FunctionAgent, ProgramAgent
from agentcast.agents.transpiler import Program

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])
S = TypeVar("S", bound=type)


class Registry:
    """Agents by name, in the order in which they were added. Iterating gives the agents."""

    def __init__(self) -> None:
        self._agents: dict[str, Agent] = {}
        self._places: dict[str, str] = {}

    def __iter__(self) -> Iterator[Agent]:
        return iter(self._agents.values())

    def __len__(self) -> int:
        return len(self._agents)

    def __contains__(self, name: object) -> bool:
        return name in self._agents

    def __getitem__(self, name: str) -> Agent:
        return self._agents[name]

    def get(self, name: str) -> Agent | None:
        return self._agents.get(name)

    @property
    def names(self) -> list[str]:
        return list(self._agents)

    # -- Adding ----------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        program: Any,
        *,
        signature: Any = None,
        input_model: type[BaseModel] | None = None,
        description: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_concurrent: int = DEFAULT_MAX_CONCURRENT,
        messages: Collection[str] | None = None,
        lm: Any = None,
    ) -> Agent:
        """Add a `dspy.Module` as an agent.

        Its inputs and outputs are those of a compiled graph's models, of its signature or of `signature`, or the typed
        parameters of its `aforward` or `forward`; `input_model` replaces the inputs. Input fields of type
        `dspy.History`, and one named `history` of type `str`, are filled with the earlier turns of the run's thread and
        are not asked for. `messages` are the output fields that stream as text; `None`: all. `timeout` is in seconds;
        `max_concurrent` are runs at once in one process. `lm` is the agent's language model, a string as `AGENTCAST_LM`
        takes it or a `dspy.LM`, where its predictors have none.

        :raises RegistryError: the name is wrong or taken, the types cannot be inferred, or what it needs is not
            installed.
        """
        if not isinstance(program, dspy.Module):
            raise RegistryError(
                f"agent {name!r}",
                f"{kind_of(program)} is not a dspy.Module",
                "pass a module such as dspy.Predict(…); for a function use @registry.agent",
            )
        if (missing := missing_runtime(program)) is not None:
            remedy = 'install it (pip install "dspy[deno]"), or give the module an interpreter_factory'
            raise RegistryError(f"agent {name!r}", missing, remedy)
        given = None if signature is None else dspy.Signature(signature) if isinstance(signature, str) else signature
        contract = _derived(
            name, lambda: module_contract(name, program) if given is None else signature_contract(name, given)
        )
        if input_model is not None:
            filled = {key: kind for key, kind in contract.history.items() if key not in input_model.model_fields}
            contract = replace(contract, input_model=input_model, history=filled)
        if messages is None and isinstance(program, ReAct):
            messages = program.message_fields
        spec = _spec(
            name=name,
            description=description if description is not None else _description(given, program),
            input_model=contract.input_model,
            output_schema=contract.output_schema,
            timeout=timeout,
            max_concurrent=max_concurrent,
            graph=contract.graph,
        )
        try:
            agent = ProgramAgent(spec, program, contract, messages, _lm(name, lm))
        except ValueError as error:
            raise RegistryError(f"agent {name!r}", str(error), "fix the tools of its parts") from error
        return self.register(agent)

    def react(
        self,
        *,
        tools: Sequence[Any],
        max_iters: int = DEFAULT_MAX_ITERS,
        name: str | None = None,
        description: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_concurrent: int = DEFAULT_MAX_CONCURRENT,
        lm: Any = None,
    ) -> Callable[[S], S]:
        """Decorate a `dspy.Signature` class: a ReAct agent that answers it with `tools` (see `react.ReAct`).

        :raises RegistryError: as `add`; or what is decorated is no signature, or a tool cannot be used.
        """

        def decorate(signature: S) -> S:
            agent_name = name or snake_case(getattr(signature, "__name__", ""))
            if not _is_signature(signature):
                raise RegistryError(
                    f"agent {agent_name!r}",
                    f"@registry.react decorates a dspy.Signature class, not {kind_of(signature)}",
                    "write `class Name(dspy.Signature)`, or use @registry.agent for a function",
                )
            program = _react(agent_name, signature, tools, max_iters, "@registry.react")
            options = {"timeout": timeout, "max_concurrent": max_concurrent, "lm": lm}
            self.add(agent_name, program, description=description, **options)
            return signature

        return decorate

    def mcp(
        self,
        name: str,
        signature: Any,
        *,
        servers: Sequence[McpServer],
        max_iters: int = DEFAULT_MAX_ITERS,
        description: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_concurrent: int = DEFAULT_MAX_CONCURRENT,
        lm: Any = None,
    ) -> Agent:
        """Add a ReAct agent that answers `signature` (a class, or "question -> answer") with the tools of MCP servers.

        :raises RegistryError: as `add`; or there are no servers, or two of one name.
        """
        if not servers or not all(isinstance(server, McpServer) for server in servers):
            raise RegistryError(f"agent {name!r}", "servers must be a list of MCP servers", "make them with mcp_server")
        program = _react(name, signature, servers, max_iters, "registry.mcp")
        options = {"timeout": timeout, "max_concurrent": max_concurrent, "lm": lm}
        return self.add(name, program, description=description, **options)

    @overload
    def agent(self, function: F, /) -> F: ...

    @overload
    def agent(
        self,
        *,
        name: str | None = None,
        description: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_concurrent: int = DEFAULT_MAX_CONCURRENT,
        lm: Any = None,
    ) -> Callable[[F], F]: ...

    def agent(
        self,
        function: F | None = None,
        *,
        name: str | None = None,
        description: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_concurrent: int = DEFAULT_MAX_CONCURRENT,
        lm: Any = None,
    ) -> F | Callable[[F], F]:
        """Decorate an `async def`: an agent that runs it. The function itself stays as it is.

        Its input is the one parameter that is a pydantic model, or else its typed parameters together. A parameter
        annotated `Emitter` is given the run's emitter, one annotated `Task` the task. What it returns is checked
        against its annotation. `lm` is what DSPy programs that it calls use; see `add`.

        :raises RegistryError: it is not `async def`, its types cannot be inferred, or the name is wrong or taken.
        """

        def decorate(function: F) -> F:
            agent_name = name or snake_case(getattr(function, "__name__", ""))
            _check_function(agent_name, function)
            call = _derived(agent_name, lambda: function_call(agent_name, function))
            spec = _spec(
                name=agent_name,
                description=description if description is not None else _first_paragraph(function.__doc__),
                input_model=call.input_model,
                output_schema=call.output_schema,
                timeout=timeout,
                max_concurrent=max_concurrent,
            )
            self.register(FunctionAgent(spec, function, call, _lm(agent_name, lm)))
            return function

        return decorate if function is None else decorate(function)

    def register(self, agent: Agent) -> Agent:
        """Add any object with the shape of `agentcast.agents.base.Agent`.

        :raises RegistryError: the name is wrong or taken.
        """
        self._put(agent, _place())
        return agent

    def update(self, other: "Registry") -> None:
        """Add all agents of `other`. An agent that both have, the same object, is no conflict.

        :raises RegistryError: both have an agent of one name.
        """
        for agent in other:
            self._put(agent, other._places[agent.spec.name])

    def _put(self, agent: Agent, place: str) -> None:
        name = agent.spec.name
        if not _NAME.fullmatch(str(name)):
            raise RegistryError(
                f"agent {name!r}",
                "the name must start with a letter a-z and go on with up to 63 of a-z, 0-9, _ and -",
                "give it another one with name=…",
            )
        known = self._agents.setdefault(name, agent)
        if known is not agent:
            raise RegistryError(
                f"agent {name!r}",
                f"there are two of that name, at {self._places[name]} and at {place}",
                "rename one of them",
            )
        self._places[name] = place


def _lm(name: str, lm: Any) -> Any:
    """An agent's own language model."""
    if lm is None or isinstance(lm, dspy.BaseLM):
        return as_model(lm)
    problem = f"lm is {kind_of(lm)}" if not isinstance(lm, str) else ""
    try:
        if not problem:
            return make_lm(lm)
    except ModelError as error:
        problem = f"lm={lm!r}: {error.problem}"
    raise RegistryError(f"agent {name!r}", problem, "give a model string such as 'openai/gpt-5-mini', or a dspy.LM")


def _react(name: str, signature: Any, tools: Sequence[Any], max_iters: int, where: str) -> ReAct:
    try:
        return ReAct(signature, tools, max_iters)
    except ValueError as error:
        raise RegistryError(f"agent {name!r}", str(error), f"fix what is given to {where}") from error


def _spec(**fields: Any) -> AgentSpec:
    name = fields["name"]
    for field, least in (("timeout", 0), ("max_concurrent", 0)):
        if not fields[field] > least:
            raise RegistryError(f"agent {name!r}", f"{field} is {fields[field]}", "give it a number above 0")
    return AgentSpec(**fields)


T = TypeVar("T")


def _derived(name: str, derive: Callable[[], T]) -> T:
    try:
        return derive()
    except SchemaError as error:
        raise RegistryError(f"agent {name!r}", error.problem, error.remedy) from error


def _is_signature(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, dspy.Signature)


def _check_function(name: str, function: Any) -> None:
    if inspect.isasyncgenfunction(function):
        problem, remedy = "it yields", "emit events with `emit: Emitter` and return the result"
    elif isinstance(function, type) or not callable(function):
        problem, remedy = f"@registry.agent decorates an async function, not {kind_of(function)}", "write `async def`"
    elif not inspect.iscoroutinefunction(function):
        problem = "it is not `async def`, so it would block every other run"
        remedy = "write `async def` and await what takes long; blocking calls go through anyio.to_thread.run_sync"
    else:
        return
    raise RegistryError(f"agent {name!r}", problem, remedy)


def snake_case(name: str) -> str:
    """`name` as an agent's name: "HTTPReader" gives "http_reader"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().strip("_")


def _description(signature: Any, program: Any) -> str:
    if isinstance(program, Program):
        return program.graph.description
    source = signature or getattr(program, "signature", None)
    if source is None and isinstance(program, dspy.ChainOfThought):
        source = program.predict.signature
    if source is not None:
        return _first_paragraph(source.instructions)
    return _first_paragraph(type(program).__dict__.get("__doc__"))


def _first_paragraph(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def kind_of(value: Any) -> str:
    """What `value` is, for people."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _place() -> str:
    """File and line of the code that called into this module."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"

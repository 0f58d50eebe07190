"""`@self_correcting`: a typed function, or a module class, whose result is asked for until it has its type.

    @self_correcting
    async def review(text: str) -> Review:
        \"\"\"Review the text.\"\"\"

    found = await review("It was good.")        # a Review

A function becomes a program of one node, which a language model does: its parameters are the inputs, its docstring the
instructions, its return type says what is accepted. Its body is never run. A module class does its own work; what its
`forward` or `aforward` returns is checked, and its predictors are shown what was wrong.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

import dspy
from pydantic import BaseModel, RootModel, create_model

from agentcast.agents.graph import END, Graph, GraphError, StatefulNode
from agentcast.agents.graph.checking import CALL_OPTIONS, option_problems
from agentcast.agents.graph.state import detached
from agentcast.agents.inputs.contract import SchemaError, input_model, parameter_fields
from agentcast.agents.streaming import node_span, replace_methods
from agentcast.agents.streaming.calls import call_in_thread
from agentcast.agents.threads import run_to_end
from agentcast.agents.transpiler.program import Program, call_observed, compiled, is_unobserved
from agentcast.agents.transpiler.steps import (
    DEFAULT_RETRIES,
    Rejected,
    accepted_output,
    correcting_adapter,
    default_formatter,
    fields_of,
    rejecting_unreadable,
)
from agentcast.agents.values import plain

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

ANSWER = "answer"
"""The output field of a function that does not return a pydantic model."""


class SelfCorrecting(Program[Any], Generic[P, R]):
    """A function that a language model does: called like the function, and a `Program`, which can be tuned, streamed
    (`astream`), and added to a registry. A call takes `max_retries` besides the function's parameters."""

    def __init__(self, function: Callable[P, R], node: StatefulNode, max_retries: int | None, *, unwraps: bool) -> None:
        instructions = node.instructions or ""
        graph = Graph(description=" ".join(instructions.partition("\n\n")[0].split()))
        graph.add_node(node)
        graph.add_edge(node.name, END)
        graph.set_entry_point(node.name)
        super().__init__(*compiled(graph, node.output_model))
        functools.update_wrapper(self, function)
        self._signature = inspect.signature(function)
        self._max_retries = max_retries
        self._unwraps = unwraps

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """What the function promises to return.

        :raises OutputError: the model's answers did not have its type, in all attempts.
        """
        result: R = run_to_end(lambda: self._answer(args, kwargs))
        return result

    async def _answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        options = {name: value for name, value in kwargs.items() if name in CALL_OPTIONS}
        bound = self._signature.bind(*args, **{name: kwargs[name] for name in kwargs if name not in options})
        inputs = dict(bound.arguments)
        result = await (call_observed(self, {**options, **inputs}) if is_unobserved() else self._run(options, inputs))
        return getattr(result, ANSWER) if self._unwraps else result

    async def _run(self, options: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        return await super()._run({"max_retries": self._max_retries, **options}, inputs)


class _Awaited(SelfCorrecting[P, R]):
    """One made of an `async def`."""

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:  # type: ignore[override]
        return await self._answer(args, kwargs)


class _Decorator(Protocol):
    @overload
    def __call__(self, target: C, /) -> C: ...  # type: ignore[overload-overlap]  # a class is callable, too

    @overload
    def __call__(self, target: Callable[P, R], /) -> SelfCorrecting[P, R]: ...


@overload
def self_correcting(target: C, /) -> C: ...  # type: ignore[overload-overlap]  # a class is callable, too


@overload
def self_correcting(target: Callable[P, R], /) -> SelfCorrecting[P, R]: ...


@overload
def self_correcting(
    *,
    schema: type[BaseModel] | None = None,
    max_retries: int | None = None,
    refine_instructions: str | None = None,
    lm: Any = None,
) -> _Decorator: ...


def self_correcting(
    target: Any = None,
    /,
    *,
    schema: type[BaseModel] | None = None,
    max_retries: int | None = None,
    refine_instructions: str | None = None,
    lm: Any = None,
) -> Any:
    """Decorate a typed function, sync or async, or a `dspy.Module` class, which gives a subclass.

    An answer that does not have the return type (or is no `schema`, which takes its place) is asked for again, up to
    `max_retries` times (by default 3); the model is given its own answer, what is wrong with it, and
    `refine_instructions`. `lm` is the `dspy.LM` of predictors that have none of their own. The events of a call are
    those of a graph's node, in the run that it is made in; outside of any run there are none.

    :raises TypeError: the function lacks a type, or takes what cannot be given by name.
    :raises ValueError: `max_retries` is negative, or a parameter has a reserved name.
    """

    def decorate(target: Any) -> Any:
        for problem in option_problems(max_retries or 0):
            raise ValueError(f"@self_correcting: {problem}")
        options: dict[str, Any] = {"max_retries": max_retries, "refine_instructions": refine_instructions}
        if isinstance(target, type) and issubclass(target, dspy.Module):
            return _corrected_class(target, schema, lm, options)
        if not inspect.isfunction(target):
            raise TypeError(f"@self_correcting decorates a function or a dspy.Module class, not {target!r}")
        return _corrected_function(target, schema, lm, **options)

    return decorate if target is None else decorate(target)


# -- Functions -----------------------------------------------------------------------------------------------------


def _corrected_function(
    function: Any, schema: Any, lm: Any, max_retries: int | None, refine_instructions: str | None
) -> Any:
    name = function.__name__
    try:
        takes = input_model(name, parameter_fields(function, f"{name}()", "annotate it"))
    except SchemaError as error:
        raise TypeError(f"@self_correcting: {error.problem}: {error.remedy}") from error
    returned = schema or _returned(function)
    if returned is None:
        raise TypeError(f"@self_correcting: {name}() has no return type: annotate it with the model of its result")
    is_model = _is_model(returned)
    gives = returned if is_model else create_model(f"{takes.__name__[: -len('Input')]}Output", answer=(returned, ...))
    node = StatefulNode(name, takes, gives, inspect.getdoc(function), refine_instructions=refine_instructions)
    kind = _Awaited if inspect.iscoroutinefunction(function) else SelfCorrecting
    try:
        program = kind(function, node, max_retries, unwraps=not is_model)
    except GraphError as error:
        raise ValueError(f"@self_correcting: {'; '.join(error.problems)}") from error
    if lm is not None:
        program.set_lm(lm)
    return program


def _returned(function: Any) -> Any:
    """The return type; None if it says nothing."""
    found = typing.get_type_hints(function, include_extras=True).get("return")
    return None if found in (None, type(None), Any) else found


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel) and not issubclass(value, RootModel | dspy.Type)


# -- Module classes ------------------------------------------------------------------------------------------------


def _corrected_class(kind: Any, schema: Any, lm: Any, options: Mapping[str, Any]) -> Any:
    methods = _methods(kind)
    if not methods:
        raise TypeError(f"@self_correcting: {kind.__name__} has neither forward nor aforward")
    gives: Any = schema or next(filter(None, map(_returned, methods.values())), None)
    if not _is_model(gives):
        where = " or ".join(f"{kind.__name__}.{name}" for name in methods)
        raise TypeError(f"@self_correcting: {where} must return a pydantic model: annotate it, or pass schema=…")
    node = StatefulNode(kind.__name__, BaseModel, gives, **options)
    members = {name: _corrected_method(method, node, lm) for name, method in methods.items()}
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (kind,), {**members, **names})


def _methods(kind: type) -> dict[str, Any]:
    """`forward` and `aforward`, where the class that defines the one that counts defines them."""
    for each in kind.__mro__:
        found = {name: vars(each)[name] for name in ("forward", "aforward") if name in vars(each)}
        if found:
            return found
    return {}


def _corrected_method(method: Any, node: StatefulNode, lm: Any) -> Any:
    """`method` of a module class; it returns the accepted `node.output_model`."""
    signature = inspect.signature(method)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if not kinds.isdisjoint({inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}):
        raise TypeError(f"@self_correcting: {node.name}.{method.__name__} takes parameters that cannot be named")

    async def call(module: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
        inputs = _by_name(signature, module, *args, **kwargs)
        if is_unobserved():
            return await call_observed(module, inputs)
        with dspy.context(**({} if lm is None else {"lm": lm})):
            return await _attempts(module, method, node, inputs)

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def awaited(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await call(self, args, kwargs)

        return awaited

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run_to_end(lambda: call(self, args, kwargs))

    return called


def _by_name(signature: inspect.Signature, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a method by name, without the first one, which is the module."""
    _, *arguments = signature.bind(*args, **kwargs).arguments.items()
    inputs: dict[str, Any] = {}
    for name, value in arguments:
        is_rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        inputs |= value if is_rest else {name: value}
    return inputs


async def _attempts(module: Any, method: Any, node: StatefulNode, inputs: Mapping[str, Any]) -> BaseModel:
    async def work() -> Any:
        given = detached(dict(inputs))
        if inspect.iscoroutinefunction(method):
            return await method(module, **given)
        return await call_in_thread(functools.partial(method, module, **given), f"module {node.name}")

    async def attempt(rejected: Rejected | None) -> Any:
        shown = {}
        if rejected is not None:
            adapter = dspy.settings.adapter or dspy.ChatAdapter()
            shown = {"adapter": correcting_adapter(adapter, node, rejected, _writers(module, node))}
        with dspy.context(**shown):
            return fields_of(node.output_model, await rejecting_unreadable(node, work))

    replace_methods()
    retries = DEFAULT_RETRIES if node.max_retries is None else node.max_retries
    with node_span(node.name, lambda: {name: plain(value) for name, value in inputs.items()}) as span:
        output, _ = await accepted_output(node, attempt, span, default_formatter, retries)
        span.end(lambda: {name: plain(getattr(output, name)) for name in type(output).model_fields})
    return output


def _writers(module: Any, node: StatefulNode) -> Collection[str]:
    """The output fields of the predictors that are shown what was wrong: the model's, or if the module has predictors
    and none of them writes one of those, all that they write."""
    written = {name for predictor in module.predictors() for name in predictor.signature.output_fields}
    fields = node.output_model.model_fields
    return written if written and fields.keys().isdisjoint(written) else fields

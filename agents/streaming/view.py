"""How the objects of DSPy behave inside a run, whatever program they are part of. None of them is changed.

- `Tool.acall` calls a synchronous function on the event loop; in a run it calls it on a thread (G3). There, as in
  `Tool.__call__`, a tool that cancels itself fails, and does not end the run. Where DSPy's own loops could not show a
  result to the model, they get a text instead.
- `RLM.aforward` runs code, and what that calls, on the event loop; in a run it does all its work on a thread (G3).
- `BestOfN.forward` and `Refine.forward` count failed attempts on the module, those of all its calls together; in a run
  they count on a copy.
- `Module.acall`, `BaseLM.acall` and `Tool.acall` report to the run in callbacks, which cannot wait; in a run
  they wait for room before they begin (G5). So a task of the program is held back there, and no other task is.
- `Predict.forward` and `aforward` call the LM that the predictor has, or DSPy's settings; in an agent's run they call
  what the context's `models` makes of it, so that nobody's predictors need to be changed. And `aforward` cannot await
  an LM that has no asynchronous side; it then does on a thread what `forward` does, outside of runs, too.

They are public methods, replaced when the first run begins, once in a process. What else is called outside of runs does
what DSPy does. What has to be done to private names is in `agents._dspy`.

What computes much takes a turn first (`agents.turns`), so that the event loop is free for others meanwhile.
"""

import contextlib
import copy
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import dspy

from agentcast.agents._dspy.in_runs import replace_in_runs
from agentcast.agents._dspy.memos import text_of
from agentcast.agents._dspy.names import get_setting
from agentcast.agents.base import ToolError
from agentcast.agents.context import SETTING, current, wait_for_room, within
from agentcast.agents.observations import contained, observed, showable
from agentcast.agents.streaming.calls import call_in_thread, can_be_awaited, ending_tool
from agentcast.agents.threads import unblocking
from agentcast.agents.turns import take_turn

_lock = threading.Lock()
_log = logging.getLogger(__name__)


def replace_methods() -> None:
    """Replace them, if that was not yet done."""
    with _lock:
        replace_in_runs(_in_run)
        _replace()


def _in_run() -> bool:
    context = get_setting(SETTING)
    return context is not None and (context.observer is not None or context.emitter is not None)


@functools.cache
def _replace() -> None:
    for (kind, name), replacement in _REPLACEMENTS.items():
        owner = getattr(dspy, kind, None)
        if hasattr(owner, name):  # not all versions of DSPy have all modules
            setattr(owner, name, replacement(getattr(owner, name)))


def _awaited_tool(acall: Callable[..., Any]) -> Callable[..., Any]:
    """`Tool.acall`."""

    @functools.wraps(acall)
    async def call(tool: Any, /, **args: Any) -> Any:
        if not current():
            return await acall(tool, **args)
        await take_turn()
        with _shown(tool) as is_shown, _logged(tool, is_shown), contained():
            function = _listing(tool.func) if is_shown else tool.func
            if not _is_dspys(tool.func):
                function = unblocking(function, f"tool {tool.name}")
            result = await acall(_calling(function, tool), **args)
            return showable(result) if is_shown else result

    return call


def _held_back(acall: Callable[..., Any]) -> Callable[..., Any]:
    """`acall` that in a run waits for room first."""

    @functools.wraps(acall)
    async def call(callee: Any, /, *args: Any, **named: Any) -> Any:
        await wait_for_room()
        return await acall(callee, *args, **named)

    return call


def _is_dspys(function: Any) -> bool:
    """Whether `function` is how one of DSPy's own loops ends, which blocks nothing."""
    return getattr(function, "__module__", None) in ("dspy.predict.react", "dspy.predict.react_v2")


def _called_tool(tool_call: Callable[..., Any]) -> Callable[..., Any]:
    """`Tool.__call__`."""

    @functools.wraps(tool_call)
    def call(tool: Any, /, **args: Any) -> Any:
        if not current():
            return tool_call(tool, **args)
        with _shown(tool) as is_shown, _logged(tool, is_shown), contained():
            result = tool_call(_calling(_listing(tool.func), tool) if is_shown else tool, **args)
            return showable(result) if is_shown else result

    return call


@contextlib.contextmanager
def _shown(tool: Any) -> Iterator[bool]:
    """Whether what `tool` returns goes into a prompt of DSPy's own: whether a loop calls it, and not another tool.
    A loop that `observes` turns results and failures into observations itself."""
    callers = dspy.settings.caller_modules or [None]
    loop = callers[-1]
    end = None if getattr(loop, "observes", False) else ending_tool(loop)
    is_its_own = end not in (None, tool.name) and loop.tools.get(tool.name) is tool
    is_nested = current().callers is callers
    with within(callers=callers):
        yield is_its_own and not is_nested


@contextlib.contextmanager
def _logged(tool: Any, is_shown: bool) -> Iterator[None]:
    """Log a failure of `tool` that nobody else learns more of than its type: the model is shown no traceback (G9)."""
    try:
        yield
    except Exception as error:
        if is_shown and not isinstance(error, ToolError | ValueError):
            _log.warning("tool %s failed", tool.name, exc_info=error)
        raise


def _calling(function: Callable[..., Any], tool: Any) -> Any:
    """`tool`, but it calls `function`."""
    return tool if function is tool.func else tool.model_copy(update={"func": function})


_listing = functools.partial(observed, made=lambda result: result)


def _all_on_a_thread(aforward: Callable[..., Any]) -> Callable[..., Any]:
    """`aforward` that in a run calls `forward` on a thread."""

    @functools.wraps(aforward)
    async def call(module: Any, /, **inputs: Any) -> Any:
        if not current():
            return await aforward(module, **inputs)
        forward = functools.partial(type(module).forward, module, **inputs)
        return await call_in_thread(forward, f"module {type(module).__name__}")

    return call


def _on_a_copy(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that in a run leaves its module as it is."""

    @functools.wraps(forward)
    def call(module: Any, /, **inputs: Any) -> Any:
        return forward(copy.copy(module) if current() else module, **inputs)

    return call


def _with_model(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`Predict.forward` that calls the LM that the context's `models` gives."""

    @functools.wraps(forward)
    def call(predictor: Any, /, **inputs: Any) -> Any:
        return forward(predictor, **_modelled(predictor, inputs))

    return call


def _with_model_awaited(aforward: Callable[..., Any]) -> Callable[..., Any]:
    """`Predict.aforward` likewise; an LM that cannot be awaited is called on a thread."""

    @functools.wraps(aforward)
    async def call(predictor: Any, /, **inputs: Any) -> Any:
        if _in_run():
            await take_turn()
        given = _modelled(predictor, inputs)
        lm = given.get("lm", predictor.lm) or dspy.settings.lm
        if can_be_awaited(lm) and can_be_awaited(getattr(dspy.settings.adapter, "extraction_model", None)):
            return await aforward(predictor, **given)
        return await call_in_thread(functools.partial(dspy.Predict.forward, predictor, **inputs), "LM call")

    return call


def _modelled(predictor: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    models = current().models
    if models is None:
        return inputs
    lm = inputs.get("lm", predictor.lm) or dspy.settings.lm
    return inputs if lm is None else {**inputs, "lm": models(lm)}


_KNOWN_ADAPTERS = (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter)
"""Adapters whose texts about a signature depend on nothing else. A subclass's may."""


def _kept(*parts: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method that makes a text about a signature of what the methods `parts` give; in a run, the text is kept."""

    def replacement(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(adapter: Any, signature: Any) -> Any:
            kind = type(adapter)
            if kind not in _KNOWN_ADAPTERS or not current() or not vars(adapter).keys().isdisjoint(parts):
                return method(adapter, signature)
            key = (method, kind, *(getattr(kind, part) for part in parts))
            return text_of(signature, key, functools.partial(method, adapter, signature))

        return call

    return replacement


_REPLACEMENTS: dict[tuple[str, str], Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    ("Module", "acall"): _held_back,
    ("BaseLM", "acall"): _held_back,
    ("Tool", "acall"): lambda acall: _awaited_tool(_held_back(acall)),
    ("Tool", "__call__"): _called_tool,
    ("RLM", "aforward"): _all_on_a_thread,
    ("BestOfN", "forward"): _on_a_copy,
    ("Refine", "forward"): _on_a_copy,
    ("Adapter", "format_system_message"): _kept(
        "format_field_description", "format_field_structure", "format_task_description"
    ),
    ("ChatAdapter", "user_message_output_requirements"): _kept(),
    ("JSONAdapter", "user_message_output_requirements"): _kept(),
    ("XMLAdapter", "user_message_output_requirements"): _kept(),
    ("Predict", "forward"): _with_model,
    ("Predict", "aforward"): _with_model_awaited,
}

"""What a language model is shown of what a tool did: data of bounded size, which goes into every prompt that follows.

A prompt shows it as DSPy would, save where DSPy fails, or shows what belongs to the process and not to the result:
memory addresses, paths, secrets (G9). Reading a result never fails, whatever its class does.

This module must not know what a tool is, or who calls it.
"""

import contextlib
import inspect
import itertools
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import dspy
from pydantic.fields import FieldInfo

from agentcast.agents._dspy.names import format_field_value
from agentcast.agents.base import ToolError, public_message, redact
from agentcast.agents.failures import is_failure
from agentcast.agents.threads import is_async_callable
from agentcast.agents.values import COUNT_BYTES, plain

LISTS_OF_NO_TEXTS = (TypeError, AttributeError)
"""What DSPy raises for lists like [1, 2], since it takes every list for one of texts."""

_TEXT_FIELD = FieldInfo(annotation=str)
_JSON_LISTS = (tuple, set, frozenset, deque)
_TYPED_ITEMS = 100
_MOST_ITEMS = COUNT_BYTES // 16 + 1
"""Items of a generator from which on the list of them is cut in any case."""


def observed(function: Callable[..., Any], made: Callable[[Any], Any]) -> Callable[..., Any]:
    """`function`, but it gives what `made` makes of what it returns, now or when awaited. An iterator is read first,
    where the function runs, into a list of as many items as can be shown.

    :raises ToolError: something that it waited for was cancelled, or it wanted to end the process.
    """

    async def awaited(result: Any) -> Any:
        with contained():
            result = await (_read(result) if isinstance(result, AsyncIterator) else result)
            return made(_listed(result))

    def call(**args: Any) -> Any:
        with contained():
            result = function(**args)
            is_later = inspect.isawaitable(result) or isinstance(result, AsyncIterator)
            return awaited(result) if is_later else made(_listed(result))

    async def acall(**args: Any) -> Any:
        return await awaited(function(**args))

    return acall if is_async_callable(function) else call


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Make a `ToolError` of a failure that would end the run, as it is no `Exception`; see `failures.is_failure`."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if is_failure(error):
            raise ToolError(public_message(error)) from error
        raise


def observation(result: Any) -> Any:
    """`result` as plain data. DSPy's own types, such as `dspy.Image`, stay what they are, in a list, too."""
    if isinstance(result, dspy.Type):
        return result
    if isinstance(result, bytes | bytearray):
        with contextlib.suppress(UnicodeDecodeError):
            result = result.decode()
    if holds_types(result):
        return [item if isinstance(item, dspy.Type) else plain(item, other=_text) for item in result]
    found = plain(result, other=_text)
    # A prompt shows a tuple as JSON, and a list of texts as a numbered one.
    return tuple(found) if isinstance(result, _JSON_LISTS) and isinstance(found, list) else found


def showable(result: Any) -> Any:
    """`result`, if DSPy can show it, else the text of its observation."""
    with contextlib.suppress(Exception):  # as its class does
        format_field_value(_TEXT_FIELD, result)
        return result
    found = observation(result)
    return found if isinstance(found, dspy.Type) else prompt_text(found)


def prompt_text(value: Any) -> Any:
    """The text of an observation in a prompt, as DSPy writes it in a field of text."""
    if type(value) is str:
        return value
    try:
        return format_field_value(_TEXT_FIELD, value)
    except LISTS_OF_NO_TEXTS:
        return format_field_value(_TEXT_FIELD, tuple(value))  # as JSON


def holds_types(result: Any) -> bool:
    """Whether `result` is a list, not a long one, with some of DSPy's own types in it: texts and images, say."""
    is_short_list = isinstance(result, list | tuple) and len(result) <= _TYPED_ITEMS
    return is_short_list and any(isinstance(item, dspy.Type) for item in result)


def _listed(result: Any) -> Any:
    return list(itertools.islice(result, _MOST_ITEMS)) if isinstance(result, Iterator) else result


async def _read(items: AsyncIterator[Any]) -> list[Any]:
    found: list[Any] = []
    async for item in items:
        found.append(item)
        if len(found) == _MOST_ITEMS:
            break
    return found


def _text(value: Any) -> str:
    """What `value` says of itself. Its type if that is nothing, or if it is a description in angle brackets."""
    name = f"<{type(value).__name__}>"
    if isinstance(value, BaseException):
        return public_message(value)
    if isinstance(value, os.PathLike):
        return name
    try:
        text = str(value)
        return name if text.startswith("<") and text == repr(value) else redact(text)
    except Exception:  # noqa: BLE001 -- whatever its class does
        return name

"""What is wrong with a graph, or went wrong in one."""

import errno
from collections.abc import Sequence


class GraphError(ValueError):
    """A graph cannot be compiled. `problems` are all the reasons, each naming its node and field."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(problems)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        head = f"the graph has {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}:"
        return "\n".join([head, *(f"- {problem}" for problem in self.problems)])


class StepError(ValueError):
    """A step of a running graph failed. `node` is the step's."""

    def __init__(self, node: str, problem: str) -> None:
        super().__init__(f"node {node!r}: {problem}")
        self.node = node


class InputError(StepError):
    """The state does not have what a node's `input_model` asks for."""


class OutputError(StepError):
    """What a node gave broke its `output_model` in every attempt. `last_output` is the text of the last one; the cause
    is its `pydantic.ValidationError`."""

    def __init__(self, node: str, problem: str, *, attempts: int, last_output: str) -> None:
        tries = f"after {attempts} attempts" if attempts > 1 else "and it was asked for once"
        super().__init__(node, f"its output is wrong, {tries}: {problem}")
        self.attempts = attempts
        self.last_output = last_output


class NodeCancelled(StepError):
    """What a node, or a router, waited for was cancelled, though the run was not."""

    def __init__(self, node: str) -> None:
        super().__init__(node, "something that it waited for was cancelled")


class RouteError(StepError):
    """A router chose what its `path_map` does not have, or what stands for several of its keys."""


class ConflictError(StepError):
    """Two nodes, neither of which follows on the other, set one field, which declares no reducer."""

    def __init__(self, field: str, first: str, second: str) -> None:
        super().__init__(
            second,
            f"it sets {field!r}, which {first!r} sets in parallel; "
            f"declare how to merge them, as in Annotated[…, operator.add], or rename one",
        )
        self.field = field
        self.nodes = (first, second)


class ResultError(ValueError):
    """The state at the end does not make the program's `output_model`."""


class StepLimitError(ValueError):
    """The graph has run `max_steps` nodes and is not at its end. `node` is None: it is no single node's error."""

    node = None

    def __init__(self, max_steps: int) -> None:
        super().__init__(limit_text(max_steps))
        self.max_steps = max_steps


def limit_text(max_steps: int) -> str:
    return f"no end after {max_steps} steps"


class NodeTimeout(TimeoutError):
    """A node took longer than its `timeout`."""

    def __init__(self, node: str, seconds: float) -> None:
        super().__init__(errno.ETIMEDOUT, f"node {node!r} took longer than {seconds:g} s")
        self.node = node

    def __str__(self) -> str:
        return str(self.strerror)


def name_node(error: BaseException, node: str) -> None:
    """Give `error`, of any type, the attribute `node`; the innermost node stays."""
    if hasattr(error, "node"):
        return
    try:
        error.node = node  # type: ignore[attr-defined]
    except (AttributeError, TypeError):  # an exception with __slots__
        return
    error.add_note(f"in node {node!r} of a graph")

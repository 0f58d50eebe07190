"""Registries: what is derived from signatures and types, what is refused and how, and loading by name."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest
from pydantic import BaseModel, ValidationError

from agentcast.agents.base import Emitter, Task, Turn
from agentcast.agents.events import AgentEvent, Status
from agentcast.agents.offline import offline_lm
from agentcast.agents.registry import Registry, RegistryError, load
from agentcast.agents.registry.book import snake_case


class Heard:
    """An emitter that keeps what it is sent."""

    def __init__(self) -> None:
        self.events: list[AgentEvent] = []

    async def send(self, event: AgentEvent) -> None:
        self.events.append(event)

    def nowait(self, event: AgentEvent) -> None:
        self.events.append(event)


class Ticket(BaseModel):
    text: str
    urgent: bool = False


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AGENTCAST_OFFLINE_DELAY", "0")
    with dspy.context(lm=offline_lm(), adapter=dspy.ChatAdapter()):
        yield


async def run(
    registry: Registry, agent_name: str, heard: Heard | None = None, /, history: tuple[Turn, ...] = (), **fields: Any
):
    agent = registry[agent_name]
    task = Task(run="r1", input=agent.spec.input_model(**fields), history=history)
    return await agent.run(task, heard or Heard())


# -- Derived contracts ---------------------------------------------------------------------------------------------


def test_signature_gives_input_model_description_and_schemas():
    class Triage(dspy.Signature):  # type: ignore[misc]
        """Sort a ticket.

        The model reads this part too.
        """

        text: str = dspy.InputField(desc="what the customer wrote")
        copies: int = dspy.InputField(ge=1, default=1)
        level: Literal["low", "high"] = dspy.OutputField(desc="how urgent it is")
        reasons: list[str] = dspy.OutputField()

    registry = Registry()
    spec = registry.add("triage", dspy.ChainOfThought(Triage), timeout=5, max_concurrent=2).spec

    assert (spec.name, spec.description, spec.timeout, spec.max_concurrent) == ("triage", "Sort a ticket.", 5, 2)
    schema = spec.input_model.model_json_schema()
    assert schema["properties"]["text"] == {
        "description": "what the customer wrote",
        "title": "Text",
        "type": "string",
    }
    assert schema["properties"]["copies"] == {"default": 1, "minimum": 1, "title": "Copies", "type": "integer"}
    assert schema["required"] == ["text"]
    assert spec.output_schema["properties"]["level"]["enum"] == ["low", "high"]
    assert spec.output_schema["properties"]["reasons"]["type"] == "array"
    for wrong in ({"text": "x", "copies": 0}, {"text": "x", "colour": "red"}, {}):
        with pytest.raises(ValidationError):
            spec.input_model(**wrong)


async def test_fields_may_be_called_like_methods_of_a_model():
    registry = Registry()

    @registry.agent
    async def odd(schema: str, copy: int) -> list[str]:
        return [schema] * copy

    assert await run(registry, "odd", schema="a", copy=2) == ["a", "a"]


async def test_module_without_signature_is_read_from_its_method():
    class Doubler(dspy.Module):  # type: ignore[misc]
        """Doubles."""

        async def aforward(self, number: int, times: int = 1) -> Any:
            return dspy.Prediction(doubled=number * 2**times, trajectory={"thought_0": "private"})

    registry = Registry()
    spec = registry.add("doubler", Doubler()).spec
    assert spec.description == "Doubles."
    assert set(spec.input_model.model_fields) == {"number", "times"}
    assert await run(registry, "doubler", number=3) == {"doubled": 6}


async def test_explicit_signature_and_input_model_win():
    class Loose(dspy.Module):  # type: ignore[misc]
        async def aforward(self, **inputs: Any) -> Any:
            return dspy.Prediction(answer=inputs["text"].upper(), other=1)

    registry = Registry()
    registry.add("loose", Loose(), signature="text -> answer, forgotten", input_model=Ticket, description="Shouts.")
    assert registry["loose"].spec.input_model is Ticket
    assert await run(registry, "loose", text="a") == {"answer": "A"}


async def test_result_of_a_program_is_its_output_fields_as_plain_data():
    registry = Registry()
    registry.add("sums", dspy.Predict("question -> total: float, parts: list[int]"))
    assert await run(registry, "sums", question="total: 5") == {"total": 5.0, "parts": []}


async def test_history_is_filled_from_the_thread_and_not_asked_for():
    seen: list[str] = []

    class Echo(dspy.Module):  # type: ignore[misc]
        async def aforward(self, history: str, question: str) -> Any:
            seen.append(history)
            return dspy.Prediction(answer=question)

    registry = Registry()
    spec = registry.add("echo", Echo()).spec
    assert set(spec.input_model.model_fields) == {"question"}
    turns = (Turn({"question": "a"}, {"answer": "b"}), Turn({"question": "c"}, "d"))
    await run(registry, "echo", history=turns, question="e")
    assert seen == ["question: a\nanswer: b\n\nquestion: c\nresult: d"]
    assert (
        "history"
        not in Registry().add("two", dspy.Predict("history, question -> answer")).spec.input_model.model_fields
    )


# -- Functions -----------------------------------------------------------------------------------------------------


async def test_function_takes_typed_parameters_and_what_it_asks_for_by_type():
    registry = Registry()

    @registry.agent
    async def greet(name: str, out: Emitter, times: int = 1, *, job: Task) -> str:
        """Greet someone.

        Details.
        """
        await out.send(Status(message=job.run))
        return f"Hello {name}" * times

    heard = Heard()
    assert await run(registry, "greet", heard, name="Ada", times=2) == "Hello AdaHello Ada"
    assert heard.events == [Status(message="r1")]
    spec = registry["greet"].spec
    assert (spec.description, spec.output_schema) == ("Greet someone.", {"type": "string"})
    assert set(spec.input_model.model_fields) == {"name", "times"}
    assert await greet("x", heard, job=Task(run="r", input=Ticket(text=""))) == "Hello x"  # still a plain function


async def test_function_may_take_a_model_whole():
    registry = Registry()

    @registry.agent(name="intake", timeout=3, max_concurrent=1)
    async def take(ticket: Ticket) -> Ticket:
        return ticket.model_copy(update={"urgent": True})

    assert registry["intake"].spec.input_model is Ticket
    assert registry["intake"].spec.timeout == 3
    assert await run(registry, "intake", text="x") == {"text": "x", "urgent": True}


async def test_function_that_returns_something_else_fails_naming_the_field():
    registry = Registry()

    @registry.agent
    async def broken() -> Ticket:
        return {"text": "fine", "urgent": "perhaps"}  # type: ignore[return-value]

    with pytest.raises(ValueError, match=r"broken returned something else than it declares in urgent: .*boolean"):
        await run(registry, "broken")


async def test_react_decorator_leaves_the_signature_and_runs_the_loop():
    registry = Registry()

    def search(query: str) -> str:
        """Search the notes."""
        return "notes.md:3 (Keys)\nThe key is under the mat."

    @registry.react(tools=[search], max_iters=3, name="finder")
    class WhereIs(dspy.Signature):  # type: ignore[misc]
        """Find things."""

        question: str = dspy.InputField()
        answer: str = dspy.OutputField()

    assert issubclass(WhereIs, dspy.Signature)
    result = await run(registry, "finder", question="Where is the key?")
    assert set(result) == {"answer"}
    assert "notes.md, line 3: “The key is under the mat.”" in result["answer"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Researcher", "researcher"),
        ("HTTPReader", "http_reader"),
        ("WhereIs2", "where_is2"),
        ("plain_name", "plain_name"),
    ],
)
def test_names_are_made_of_class_names(name: str, expected: str):
    assert snake_case(name) == expected


# -- Refusals ------------------------------------------------------------------------------------------------------


def untyped(registry: Registry) -> None:
    async def f(x): ...

    registry.agent(f)


def untyped_emit(registry: Registry) -> None:
    async def f(x: int, emit): ...

    registry.agent(f)


def sync(registry: Registry) -> None:
    def f(x: int) -> int:
        return x

    registry.agent(f)  # type: ignore[type-var]


def generator(registry: Registry) -> None:
    async def f(x: int):
        yield x

    registry.agent(f)


def variadic(registry: Registry) -> None:
    async def f(**inputs: Any) -> None: ...

    registry.agent(f)


def unknown_type(registry: Registry) -> None:
    async def f(x: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    registry.agent(f)


def odd_type(registry: Registry) -> None:
    async def f(x: Callable[[], int]) -> None: ...

    registry.agent(f)


def loose_module(registry: Registry) -> None:
    class Loose(dspy.Module):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any: ...

    registry.add("loose", Loose())


def twin_tools(registry: Registry) -> None:
    def look(query: str) -> str:
        return query

    @registry.react(tools=[look, look])
    class Twins(dspy.Signature):  # type: ignore[misc]
        question: str = dspy.InputField()
        answer: str = dspy.OutputField()


@pytest.mark.parametrize(
    ("register", "problem", "remedy"),
    [
        (untyped, "parameter 'x' of f() has no type", "annotate it"),
        (untyped_emit, "parameter 'emit' of f() has no type (write `emit: Emitter`)", "annotate it"),
        (sync, "it is not `async def`, so it would block every other run", "write `async def` and await"),
        (generator, "it yields", "emit events with `emit: Emitter`"),
        (variadic, "the inputs cannot be inferred from f(), which takes **inputs: Any", "name and type its parameters"),
        (unknown_type, "a type of", "define it at the top of its module"),
        (odd_type, "its inputs make no JSON Schema", "use types that pydantic knows"),
        (loose_module, "the inputs cannot be inferred from Loose.forward", "pass signature=…"),
        (twin_tools, "there are two tools named 'look'", "fix what is given to @registry.react"),
        (lambda r: r.add("x", lambda: 1), "a function is not a dspy.Module", "for a function use @registry.agent"),
        (lambda r: r.add("Bad Name", dspy.Predict("a -> b")), "the name must start with a letter a-z", "name=…"),
        (lambda r: r.add("x" * 65, dspy.Predict("a -> b")), "up to 63 of", "name=…"),
        (lambda r: r.add("x", dspy.Predict("a -> b"), timeout=0), "timeout is 0", "above 0"),
        (lambda r: r.add("x", dspy.Predict("a -> b"), max_concurrent=0), "max_concurrent is 0", "above 0"),
        (lambda r: r.react(tools=[])(Ticket), "not the class Ticket", "class Name(dspy.Signature)"),
        (lambda r: r.agent(3), "not an int", "write `async def`"),
    ],
)
def test_what_cannot_be_registered_is_refused_with_a_remedy(
    register: Callable[[Registry], Any], problem: str, remedy: str
):
    registry = Registry()
    with pytest.raises(RegistryError) as caught:
        register(registry)
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy
    assert str(caught.value).startswith(f"{caught.value.subject}: {caught.value.problem}. ")
    assert len(registry) == 0


def test_duplicate_names_are_reported_with_both_places():
    registry = Registry()
    first = sys._getframe().f_lineno + 1
    registry.add("x", dspy.Predict("a -> b"))
    with pytest.raises(RegistryError) as caught:
        registry.add("x", dspy.Predict("a -> b"))
    places = caught.value.problem
    assert f"{__file__}:{first}" in places
    assert f"{__file__}:{first + 2}" in places


def test_registries_merge_and_the_same_agent_twice_is_no_conflict():
    one, two = Registry(), Registry()
    one.add("a", dspy.Predict("a -> b"))
    two.add("b", dspy.Predict("a -> b"))
    one.update(two)
    one.update(two)
    assert [agent.spec.name for agent in one] == one.names == ["a", "b"]
    assert ("a" in one, one.get("c"), len(one), one["b"]) == (True, None, 2, two["b"])


# -- Loading -------------------------------------------------------------------------------------------------------

MODULES = {
    "load_good": "import dspy\nfrom agents.registry import Registry\nregistry = Registry()\n"
    "registry.add('one', dspy.Predict('a -> b'))\nother = Registry()\nother.add('two', dspy.Predict('a -> b'))\n",
    "load_twin": "import dspy\nfrom agents.registry import Registry\nregistry = Registry()\n"
    "registry.add('one', dspy.Predict('a -> b'))\n",
    "load_needs": "import package_that_is_nowhere\n",
    "load_raises": "x = 1\nraise RuntimeError('no luck')\n",
    "load_syntax": "def broken(:\n",
    "load_empty": "number = 3\n",
    "load_refused": "from agents.registry import Registry\nregistry = Registry()\nregistry.add('x', 3)\n",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("modules")
def test_registries_load_by_name_from_the_current_directory():
    assert load("load_good:registry, load_good:other").names == ["one", "two"]
    assert load("load_good").names == ["one"]


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("specs", "subject", "problem", "remedy"),
    [
        ("load_nowhere:registry", "load_nowhere:registry", "there is no module 'load_nowhere'", "start in the folder"),
        ("load_good.sub:r", "load_good.sub:r", "there is no module 'load_good.sub'", "start in the folder"),
        (
            "load_needs",
            "load_needs",
            "imports 'package_that_is_nowhere', which is not installed",
            "install that package",
        ),
        ("load_raises", "load_raises", "raised RuntimeError: no luck", "fix that module"),
        ("load_syntax", "load_syntax", "raised SyntaxError", "fix that module"),
        ("load_good:agents", "load_good:agents", "load_good has no attribute 'agents'", "registries: registry, other"),
        ("load_empty", "load_empty", "load_empty has no attribute 'registry'", "write `registry = Registry()` there"),
        ("load_empty:number", "load_empty:number", "it is an int, not a Registry", "registry.add(name, program)"),
        ("load_good,load_twin", "load_twin", "agent 'one': there are two of that name, at", "rename one of them"),
        ("load_refused", "load_refused", "agent 'x': an int is not a dspy.Module", "pass a module"),
        ("some/dir/mod.py:reg", "some/dir/mod.py:reg", "not of the form package.module:registry", "some.dir.mod:reg"),
        ("a:b:c", "a:b:c", "not of the form package.module:registry", "write it as package.module:registry"),
        (" , ", "' , '", "it names no agents", "write it as package.module:registry"),
    ],
)
def test_what_cannot_be_loaded_says_which_why_and_what_to_do(specs: str, subject: str, problem: str, remedy: str):
    with pytest.raises(RegistryError) as caught:
        load(specs)
    assert caught.value.subject == subject
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy


@pytest.mark.usefixtures("modules")
def test_an_error_inside_a_module_is_reported_with_its_line():
    with pytest.raises(RegistryError, match=r"load_raises\.py:2"):
        load("load_raises")

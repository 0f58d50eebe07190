"""Input is validated as the JSON that it is, and whatever a validator raises is a problem of the input (G9)."""

import enum
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any
from uuid import UUID

import dspy
import orjson
import pytest
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    RootModel,
    Strict,
    WrapValidator,
    create_model,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

from agentcast.agents.base import Emitter, ToolError
from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.inputs.checking import RejectedInput, read_input
from agentcast.agents.offline import offline_lm
from agentcast.agents.registry import Registry
from agentcast.agents.transpiler import AgentTranspiler
from agentcast.server.cli.arguments import typed_input
from tests.support.hub import RunningHub, open_hub

STRICT = ConfigDict(strict=True)


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Part(BaseModel):
    model_config = STRICT

    made: date
    size: Decimal


@dataclass
class Place:
    since: date


class Options(TypedDict):
    when: date


def strict(annotation: Any) -> type[BaseModel]:
    return create_model("Strict", __config__=STRICT, value=(annotation, ...))


def only_field_is_strict(annotation: Any) -> type[BaseModel]:
    return create_model("Lax", value=(Annotated[annotation, Strict()], ...))


def forbids_others(annotation: Any) -> type[BaseModel]:
    return create_model("Forbidding", __base__=strict(annotation), __config__=ConfigDict(extra="forbid"))


TYPES: list[tuple[Any, Any, Any]] = [
    (date, "2026-11-25", date(2026, 11, 25)),
    (datetime, "2026-11-25T10:00:00", datetime(2026, 11, 25, 10)),
    (time, "10:00:00", time(10)),
    (timedelta, "PT5S", timedelta(seconds=5)),
    (UUID, "12345678-1234-5678-1234-567812345678", UUID("12345678-1234-5678-1234-567812345678")),
    (Colour, "red", Colour.RED),
    (Level, 3, Level.HIGH),
    (tuple[int, str], [1, "a"], (1, "a")),
    (tuple[date, ...], ["2026-11-25"], (date(2026, 11, 25),)),
    (set[int], [1, 2], {1, 2}),
    (frozenset[str], ["a"], frozenset("a")),
    (bytes, "raw", b"raw"),
    (Decimal, "1.10", Decimal("1.10")),
    (Decimal, 1.5, Decimal("1.5")),
    (float, 1, 1.0),
    (int, 5, 5),
    (str, "x", "x"),
    (bool, True, True),
    (dict[date, set[int]], {"2026-11-25": [1]}, {date(2026, 11, 25): {1}}),
    (dict[int, str], {"1": "a"}, {1: "a"}),
    (list[date] | None, ["2026-11-25"], [date(2026, 11, 25)]),
]
NESTED: list[tuple[Any, Any, Any]] = [
    (Part, {"made": "2026-11-25", "size": "1.5"}, Part(made=date(2026, 11, 25), size=Decimal("1.5"))),
    (list[Part], [{"made": "2026-11-25", "size": 2}], [Part(made=date(2026, 11, 25), size=Decimal(2))]),
    (Place, {"since": "2026-11-25"}, Place(date(2026, 11, 25))),
    (Options, {"when": "2026-11-25"}, {"when": date(2026, 11, 25)}),
]


@pytest.mark.parametrize("model_of", [strict, only_field_is_strict, forbids_others])
@pytest.mark.parametrize(("annotation", "given", "value"), TYPES)
def test_a_strict_field_takes_what_json_has_for_its_type(
    model_of: Callable[[Any], type[BaseModel]], annotation: Any, given: Any, value: Any
) -> None:
    read: Any = read_input(model_of(annotation), {"value": given})

    assert (read.value, type(read.value)) == (value, type(value))


@pytest.mark.parametrize("model_of", [strict, forbids_others])
@pytest.mark.parametrize(("annotation", "given", "value"), NESTED)
def test_a_strict_model_may_hold_others(
    model_of: Callable[[Any], type[BaseModel]], annotation: Any, given: Any, value: Any
) -> None:
    read: Any = read_input(model_of(annotation), {"value": given})

    assert read.value == value


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        (int, "5"),
        (int, 5.0),
        (bool, 1),
        (str, 5),
        (float, "1.5"),
        (date, 20_000),
        (Colour, "blue"),
        (set[int], [1, "2"]),
    ],
)
def test_a_strict_field_refuses_what_is_only_like_its_type(annotation: Any, given: Any) -> None:
    with pytest.raises(RejectedInput) as rejected:
        read_input(strict(annotation), {"value": given})

    assert {problem["loc"][0] for problem in rejected.value.problems} == {"value"}


# -- Validators that raise -----------------------------------------------------------------------------------------


class Custom(Exception):
    pass


class Unreadable(ValueError):
    def __str__(self) -> str:
        raise RuntimeError("/srv/private")


def recursing(value: Any) -> Any:
    return recursing(value)


def raising(error: BaseException) -> Callable[[Any], Any]:
    def validate(value: Any) -> Any:
        if error.args == ("deep",):
            return recursing(value)
        raise error

    return validate


def wrapping(validate: Callable[[Any], Any]) -> WrapValidator:
    return WrapValidator(lambda value, handler: validate(handler(value)))


def model_that_raises(error: BaseException) -> type[BaseModel]:
    checked: Any = Annotated[int, AfterValidator(raising(error))]

    class Given(BaseModel):
        value: checked

    return Given


RAISED = [
    TypeError("/srv/private"),
    KeyError("/srv/private"),
    AttributeError("/srv/private"),
    IndexError("/srv/private"),
    ZeroDivisionError("/srv/private"),
    RuntimeError("/srv/private"),
    NotImplementedError(),
    StopIteration(),
    LookupError(),
    OSError(2, "No such file", "/srv/private"),
    Custom("/srv/private"),
    ExceptionGroup("/srv/private", [TypeError()]),
    Unreadable(),
    RecursionError("deep"),
    MemoryError(),
    SystemExit(3),
    GeneratorExit(),
]
EXPECTED = [ValueError("not so"), AssertionError("not so"), ToolError("not so")]


def rejected(model: type[BaseModel], **input: Any) -> list[dict[str, Any]]:
    with pytest.raises(RejectedInput) as refusal:
        read_input(model, input)
    problems = refusal.value.problems
    assert b"private" not in orjson.dumps(problems)
    assert b"Traceback" not in orjson.dumps(problems)
    return problems


@pytest.mark.parametrize("error", [*RAISED, *EXPECTED], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", [AfterValidator, BeforeValidator, wrapping, PlainValidator])
def test_whatever_a_fields_validator_raises_names_the_field(error: BaseException, kind: Any) -> None:
    checked: Any = Annotated[str, kind(raising(error))]

    class Given(BaseModel):
        before: int = 0
        value: checked
        after: date | None = None

    (problem,) = rejected(Given, before=1, value="x", after="2026-11-25")

    assert problem["loc"] == ["value"]
    if error in EXPECTED:
        assert "not so" in problem["msg"]


def test_what_a_validator_raises_is_reported_by_its_type_only() -> None:
    model = model_that_raises(KeyError("/srv/private"))

    assert rejected(model, value=1)[0]["msg"] == "it could not be checked: KeyError"


def test_a_secret_in_the_text_of_a_validator_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_API_KEY", "hunter2hunter2")
    model = create_model(
        "Given", value=(int, ...), __validators__={"v": field_validator("value")(lambda v: _refuse_with_the_key())}
    )

    (problem,) = rejected(model, value=1)

    assert "hunter2" not in problem["msg"]
    assert "[redacted]" in problem["msg"]


def _refuse_with_the_key() -> None:
    raise ValueError(f"refused by {os.environ['SHOP_API_KEY']}")


def test_the_text_of_a_validator_always_encodes_and_is_bounded() -> None:
    for text in ("\ud800", "x" * 1_000_000):
        model = model_that_raises(ValueError(text))
        assert len(orjson.dumps(rejected(model, value=1))) < 3_000


def test_a_nested_validator_that_raises_names_the_field_around_it() -> None:
    inner = create_model("Inner", deep=(Annotated[int, AfterValidator(raising(TypeError()))], ...))
    model = create_model("Outer", first=(int, ...), inner=(list[inner], ...))  # type: ignore[valid-type]

    (problem,) = rejected(model, first=1, inner=[{"deep": 1}])

    assert problem["loc"] == ["inner"]


def test_a_model_that_holds_itself_names_the_field_as_well() -> None:
    class Tree(BaseModel):
        name: str
        kids: list["Tree"] = []

        @field_validator("name")
        @classmethod
        def check(cls, name: str) -> str:
            return name[10]

    assert rejected(Tree, name="x")[0]["loc"] == ["name"]
    assert rejected(Tree, name="long enough", kids=[{"name": "x"}])[0]["loc"] == ["kids"]


def test_a_default_that_raises_names_its_field() -> None:
    class Defaults(BaseModel):
        first: int = 1
        second: int = Field(default_factory=lambda: 1 // 0)

    assert rejected(Defaults)[0]["loc"] == ["second"]


def test_a_validator_that_needs_an_earlier_field_is_named_itself() -> None:
    class Range(BaseModel):
        low: int
        high: int

        @field_validator("high")
        @classmethod
        def check(cls, high: int, info: Any) -> int:
            return int(high // info.data["low"])

    assert rejected(Range, low=0, high=3)[0]["loc"] == ["high"]


@pytest.mark.parametrize("alias", ["Value", AliasPath("Value", 0), AliasChoices("Other", "Value")])
def test_a_field_is_named_as_it_was_given(alias: Any) -> None:
    field: Any = Annotated[Any, AfterValidator(raising(TypeError())), Field(validation_alias=alias)]
    model = create_model("Aliased", value=(field, ...))

    (problem,) = rejected(model, Value=[1])

    assert ".".join(map(str, problem["loc"])) in ("Value", "Value.0")


class _BeforeWhole(BaseModel):
    a: int

    @model_validator(mode="before")
    @classmethod
    def whole(cls, value: Any) -> Any:
        return value["missing"]


class _AfterWhole(BaseModel):
    a: int

    @model_validator(mode="after")
    def whole(self) -> "_AfterWhole":
        self.a // 0
        return self


class _WrapWhole(BaseModel):
    a: int

    @model_validator(mode="wrap")
    @classmethod
    def whole(cls, value: Any, handler: Any) -> Any:
        handler(value)
        raise TypeError("/srv/private")


class _Init(BaseModel):
    a: int

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        raise Custom("/srv/private")


class _PostInit(BaseModel):
    a: int

    def model_post_init(self, context: Any) -> None:
        recursing(self)


class _Root(RootModel[dict[str, Annotated[int, AfterValidator(raising(TypeError()))]]]):
    pass


class _Misleading(BaseModel):
    """The field's validator would raise too, but not the same, and is never asked."""

    a: Annotated[int, AfterValidator(raising(KeyError()))]

    @model_validator(mode="before")
    @classmethod
    def whole(cls, value: Any) -> Any:
        raise TypeError


@pytest.mark.parametrize("model", [_BeforeWhole, _AfterWhole, _WrapWhole, _Init, _PostInit, _Root, _Misleading])
def test_what_a_validator_of_the_whole_raises_names_the_input(model: type[BaseModel]) -> None:
    assert rejected(model, a=1)[0]["loc"] == []


def test_a_validator_that_is_interrupted_from_the_keyboard_is_no_problem_of_the_input() -> None:
    model = model_that_raises(KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        read_input(model, {"value": 1})


@pytest.mark.parametrize("depth", [190, 220, 300])
def test_input_nested_too_deeply_is_a_problem_of_the_input(depth: int) -> None:
    deep = json.loads("[" * depth + "]" * depth)
    model = create_model("Deep", value=(Any, ...))

    if depth < 200:
        assert read_input(model, {"value": deep}).value == deep  # type: ignore[attr-defined]
    else:
        assert len(rejected(model, value=deep)) == 1


# -- Names of fields -----------------------------------------------------------------------------------------------


class Aliased(BaseModel):
    """One field for each way in which a field can have a name besides its own."""

    model_config = ConfigDict(extra="forbid")

    plain: int = Field(alias="Plain")
    validated: int = Field(validation_alias="validatedAs")
    serialized: int = Field(serialization_alias="serializedAs")
    chosen: int = Field(validation_alias=AliasChoices("one", "other"))
    path: int = Field(validation_alias=AliasPath("nested", 0))


class OnlyByName(BaseModel):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=False)

    value: int = Field(alias="Value")
    inner: list["OnlyByName"] = []


class Generated(BaseModel):
    model_config = ConfigDict(alias_generator=lambda name: name.title())

    value: int
    inner: list["Generated"] = []


@pytest.mark.parametrize("model", [Aliased, OnlyByName, Generated])
def test_what_the_schema_calls_a_field_is_taken_and_so_is_its_name(model: type[BaseModel]) -> None:
    names = model.model_json_schema()["properties"] if model is Aliased else ["Value"]

    by_schema = read_input(model, dict.fromkeys(names, 1))
    by_name = read_input(model, {name: 1 for name in model.model_fields if name != "inner"})

    assert by_schema == by_name


@pytest.mark.parametrize("model", [OnlyByName, Generated])
def test_names_of_both_kinds_are_taken_inside_as_well(model: type[BaseModel]) -> None:
    read: Any = read_input(model, {"Value": 1, "inner": [{"value": 2}, {"Value": 3}]})

    assert [inner.value for inner in read.inner] == [2, 3]


# -- Through the hub -----------------------------------------------------------------------------------------------


class Order(BaseModel):
    model_config = ConfigDict(strict=True)

    when: date
    colours: set[Colour]
    size: Decimal = Decimal(1)
    part: Part | None = None


class Echo(BaseModel):
    said: str


def said(*values: Any) -> str:
    return " ".join(f"{type(value).__name__}:{value}" for value in values)


def registry() -> Registry:
    registry = Registry()

    @registry.agent
    async def whole(order: Order, emit: Emitter) -> str:
        return said(order.when, len(order.colours), order.size)

    @registry.agent
    async def typed(when: Annotated[date, Strict()], count: Annotated[int, Strict()] = 1) -> str:
        return said(when, count)

    class Sorting(dspy.Signature):  # type: ignore[misc]
        """Sort."""

        order: Order = dspy.InputField()
        count: Annotated[int, Strict()] = dspy.InputField(default=1)
        answer: str = dspy.OutputField()

    registry.add("signature", dspy.Predict(Sorting), lm=offline_lm())
    graph = Graph()
    graph.add_node(StatefulNode("say", Order, Echo, fn=lambda order: {"said": said(order.when, order.size)}))
    graph.add_edge("say", END)
    graph.set_entry_point("say")
    registry.add("graph", AgentTranspiler.compile(graph, output_model=Echo))

    @registry.agent
    async def careless(text: Annotated[str, AfterValidator(lambda text: text[100])]) -> str:
        return text

    return registry


ORDER = {"when": "2026-11-25", "colours": ["red"], "size": "1.5"}
INPUTS: dict[str, Any] = {
    "whole": ORDER,
    "typed": {"when": "2026-11-25", "count": 2},
    "signature": {"order": ORDER, "count": 2},
    "graph": ORDER,
}


@pytest.fixture
async def hub() -> Any:
    async with open_hub(*registry()) as hub:
        yield hub


@pytest.mark.parametrize("agent", INPUTS)
async def test_strict_agents_run_over_the_socket_and_over_http(hub: RunningHub, agent: str) -> None:
    async with hub.client() as client, hub.http() as http:
        view = await client.view(await client.start(agent, INPUTS[agent]))
        started = await http.post("/v1/runs", json={"agent": agent, "input": INPUTS[agent]})
        assert view.document["status"] == "done", view.document
        assert view.document["input"] == INPUTS[agent]
        assert started.status_code == 200


@pytest.mark.parametrize("agent", ["typed", "whole", "graph"])
def test_the_command_line_makes_such_input(agent: str) -> None:
    spec = registry()[agent].spec
    pairs = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in INPUTS[agent].items()]

    read_input(spec.input_model, typed_input(spec.input_model.model_json_schema(), pairs))


async def test_a_validator_that_fails_is_invalid_input_over_the_socket_and_over_http(
    hub: RunningHub, caplog: pytest.LogCaptureFixture
) -> None:
    async with hub.client() as client, hub.http() as http:
        response = await http.post("/v1/runs", json={"agent": "careless", "input": {"text": "x"}})
        assert response.status_code == 422
        error = await client.refused("start", agent="careless", input={"text": "x"})
        assert error == response.json()["error"]
        assert (error["code"], error["details"][0]["loc"]) == ("invalid_input", ["text"])
        assert "text: it could not be checked: IndexError" in error["message"]
        assert hub.core.runs.active == 0
    assert "an input of careless could not be checked" in caplog.text
    assert "IndexError: string index out of range" in caplog.text

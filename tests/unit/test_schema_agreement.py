"""The output schema that an agent advertises describes the result that its runs have: names of fields above all."""

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from ipaddress import IPv4Address
from typing import Annotated, Any, NamedTuple, Union
from uuid import UUID

import dspy
import jsonschema
import orjson
import pytest
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    RootModel,
    computed_field,
    field_serializer,
    model_serializer,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from agentcast.agents.base import Task
from agentcast.agents.events import AgentEvent
from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.registry import Registry
from agentcast.agents.transpiler import AgentTranspiler
from agentcast.agents.values import plain
from tests.support.hub import open_hub


class Colour(enum.Enum):
    RED = "red"


class Aliased(BaseModel):
    full_name: str = Field(alias="fullName")


class Other(BaseModel):
    number: int


class ByItself(BaseModel):
    """Its aliases are used without being asked for."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    full_name: str = Field(alias="fullName")


class Generated(BaseModel):
    model_config = ConfigDict(alias_generator=lambda name: name.upper(), populate_by_name=True)

    inner: list[Aliased]
    kids: list["Generated"] = []
    made: date = date(2026, 11, 25)
    sizes: set[int] = {1}
    price: Decimal = Decimal("1.5")
    colour: Colour = Colour.RED
    took: timedelta = timedelta(seconds=1)
    id: UUID = UUID(int=1)
    address: IPv4Address = IPv4Address("127.0.0.1")
    hidden: int = Field(default=1, exclude=True)

    @computed_field(alias="initialOf")  # type: ignore[prop-decorator]
    @property
    def initial(self) -> str:
        return "x"


class SeveralNames(BaseModel):
    model_config = ConfigDict(extra="allow")

    read: int = Field(validation_alias="readAs")
    written: int = Field(serialization_alias="writtenAs")
    chosen: int = Field(validation_alias=AliasChoices("one", "other"))
    path: int = Field(validation_alias=AliasPath("nested", 0))


class Names(RootModel[list[Aliased]]):
    pass


@dataclass
class Point:
    across: Annotated[int, Field(alias="x")]


@pydantic_dataclass
class Place:
    where: Point
    name: str = Field(default="here", alias="Name")


class Options(TypedDict):
    full_name: Annotated[str, Field(alias="fullName")]


class Pair(NamedTuple):
    first: Aliased
    second: int


class FieldSerialized(BaseModel):
    number: int

    @field_serializer("number")
    def _number(self, number):
        return str(number)


class WhollySerialized(BaseModel):
    number: int

    @model_serializer
    def _whole(self):
        return [self.number]


SOMEBODY = Aliased(fullName="Anna")
SEVERAL = SeveralNames.model_validate({"readAs": 1, "written": 2, "one": 3, "nested": [4], "more": 5})
TABLE: list[tuple[Any, Any, Any]] = [
    (Aliased, SOMEBODY, {"fullName": "Anna"}),
    (ByItself, ByItself(fullName="Anna"), {"fullName": "Anna"}),
    (list[Aliased], [SOMEBODY], [{"fullName": "Anna"}]),
    (dict[str, Aliased], {"a": SOMEBODY}, {"a": {"fullName": "Anna"}}),
    (dict[Colour, list[Aliased]], {Colour.RED: [SOMEBODY]}, {"red": [{"fullName": "Anna"}]}),
    (tuple[Aliased, int], (SOMEBODY, 1), [{"fullName": "Anna"}, 1]),
    (Aliased | None, SOMEBODY, {"fullName": "Anna"}),
    (Aliased | None, None, None),
    (Union[Other, Aliased], SOMEBODY, {"fullName": "Anna"}),  # noqa: UP007 -- the older form
    (list[Other | ByItself], [Other(number=1), ByItself(fullName="Anna")], [{"number": 1}, {"fullName": "Anna"}]),
    (Generated, Generated(inner=[SOMEBODY], kids=[Generated(inner=[])]), ...),
    (SeveralNames, SEVERAL, {"read": 1, "writtenAs": 2, "chosen": 3, "path": 4, "more": 5}),
    (Names, Names([SOMEBODY]), [{"fullName": "Anna"}]),
    (Point, Point(1), {"x": 1}),
    (Place, Place(Point(1)), ...),
    (Options, {"full_name": "Anna"}, {"fullName": "Anna"}),
    (Options, {"fullName": "Anna"}, {"fullName": "Anna"}),
    (Pair, Pair(SOMEBODY, 2), [{"fullName": "Anna"}, 2]),
    (FieldSerialized, FieldSerialized(number=1), {"number": "1"}),
    (WhollySerialized, WhollySerialized(number=1), [1]),
    (Annotated[int, PlainSerializer(lambda number: f"{number} %")], 5, "5 %"),
    (Annotated[int, PlainSerializer(lambda number: f"{number} %", return_type=str)], 5, "5 %"),
    (IPv4Address, IPv4Address("127.0.0.1"), "127.0.0.1"),
    (dspy.Code, dspy.Code(code="x = 1"), "x = 1"),
    (list[dspy.Code], [dspy.Code(code="x = 1")], ["x = 1"]),
    (dspy.Reasoning, dspy.Reasoning(content="since"), "since"),
    (dspy.History, dspy.History(messages=[{"question": "why"}]), ...),
    (str, "x", "x"),
    (int | None, None, None),
]
IDS = [f"{index}-{getattr(annotation, '__name__', 'type')}" for index, (annotation, _, _) in enumerate(TABLE)]


class Silent:
    async def send(self, event: AgentEvent) -> None: ...

    def nowait(self, event: AgentEvent) -> None: ...


async def result_of(registry: Registry) -> Any:
    """The result of a run of the only agent, as `run_end` has it, after it was found to be as advertised."""
    (agent,) = registry
    result = plain(await agent.run(Task(run="r", input=agent.spec.input_model()), Silent()))
    schema = json.loads(orjson.dumps(dict(agent.spec.output_schema)))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(result, schema, cls=jsonschema.Draft202012Validator)
    return result


def function(annotation: Any, value: Any) -> Registry:
    async def given() -> Any:
        return value

    given.__annotations__["return"] = annotation
    registry = Registry()
    registry.agent(given)
    return registry


def signature(annotation: Any) -> Any:
    return dspy.Signature(
        {"first": (annotation, dspy.OutputField(desc="what it is")), "second": (annotation, dspy.OutputField())}
    )


class Answering(dspy.Module):  # type: ignore[misc]
    """A program that gives what a test wants."""

    def __init__(self, prediction: Any) -> None:
        super().__init__()
        self.prediction = prediction

    async def aforward(self) -> Any:
        return self.prediction


def program(annotation: Any, value: Any) -> Registry:
    registry = Registry()
    prediction = dspy.Prediction(first=value, second=value, reasoning="none of the signature's")
    registry.add("given", Answering(prediction), signature=signature(annotation))
    return registry


@pytest.mark.parametrize(("annotation", "value", "expected"), TABLE, ids=IDS)
async def test_the_result_of_a_function_is_as_advertised(annotation: Any, value: Any, expected: Any) -> None:
    result = await result_of(function(annotation, value))

    assert expected is ... or result == expected


@pytest.mark.parametrize(("annotation", "value", "expected"), TABLE, ids=IDS)
async def test_the_outputs_of_a_program_are_as_advertised(annotation: Any, value: Any, expected: Any) -> None:
    result = await result_of(program(annotation, value))

    assert result.keys() == {"first", "second"}
    bare = getattr(annotation, "__metadata__", None) is None  # DSPy takes a field's serialiser for the field's own
    assert expected is ... or not bare or result == {"first": expected, "second": expected}


def test_a_schema_says_no_less_than_pydantic_where_that_is_true() -> None:
    (agent,) = function(IPv4Address, None)

    assert agent.spec.output_schema == {"type": "string", "format": "ipv4"}


def test_types_of_one_name_are_kept_apart() -> None:
    def other() -> type[BaseModel]:
        class Aliased(BaseModel):
            number: int

        return Aliased

    fields = {"first": (Aliased, dspy.OutputField()), "second": (list[other()], dspy.OutputField())}  # type: ignore[misc]
    registry = Registry()
    registry.add("both", Answering(None), signature=dspy.Signature(fields))
    (agent,) = registry

    jsonschema.validate({"first": {"fullName": "x"}, "second": [{"number": 1}]}, dict(agent.spec.output_schema))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"first": {"number": 1}, "second": []}, dict(agent.spec.output_schema))


@pytest.mark.parametrize("value", [{"fullName": "Anna"}, {"full_name": "Anna"}])
@pytest.mark.parametrize("make", [function, program])
async def test_a_mapping_in_place_of_a_model_is_given_as_the_model(
    make: Callable[[Any, Any], Registry], value: dict[str, str]
) -> None:
    result = await result_of(make(Aliased, value))

    assert {"fullName": "Anna"} in (result, *result.values())


# -- Graphs: their results have the names of the state's fields -------------------------------------------------------


class Answer(BaseModel):
    model_config = ConfigDict(serialize_by_alias=True)

    text: str = Field(default="x", alias="Text")
    people: list[ByItself] = Field(default=[ByItself(fullName="Anna")], serialization_alias="People")


class Basket(BaseModel):
    items: list[int] = [1]


class Nothing(BaseModel):
    pass


def graph_registry() -> Registry:
    graph = Graph()
    graph.add_node(StatefulNode("answer", Nothing, Answer, fn=lambda _: Answer()))
    graph.add_edge("answer", END)
    graph.set_entry_point("answer")
    registry = Registry()
    registry.add("graph", AgentTranspiler.compile(graph, output_model=Answer))
    return registry


async def test_the_result_of_a_graph_is_as_advertised() -> None:
    assert await result_of(graph_registry()) == {"text": "x", "people": [{"full_name": "Anna"}]}


async def test_a_program_may_return_a_model_with_a_field_called_items() -> None:
    registry = Registry()
    registry.add("basket", Answering(Basket()), input_model=Nothing)

    assert await result_of(registry) == {"items": [1]}


# -- Through the hub -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "registry",
    [function(list[Generated], [Generated(inner=[SOMEBODY])]), program(list[Aliased], [SOMEBODY]), graph_registry()],
    ids=["function", "program", "graph"],
)
async def test_what_the_hub_says_of_an_agent_is_true_of_its_runs(registry: Registry) -> None:
    agent: Any
    (agent,) = registry
    async with open_hub(agent) as hub, hub.client() as client, hub.http() as http:
        (described,) = (await http.get("/v1/agents")).json()["agents"]
        view = await client.view(await client.start(agent.spec.name))
        shown = (await http.get(f"/v1/runs/{view.run}")).json()["state"]
    assert view.document["status"] == "done", view.document
    jsonschema.validate(view.document["input"], described["input"])
    jsonschema.validate(view.document["result"], described["output"])
    assert shown["result"] == view.document["result"]

"""Images, audio and files as input: what a JSON client can send; and inputs of `stream_events`, checked as on a hub."""

import datetime
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, Optional

import dspy
import pytest
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, RootModel
from typing_extensions import TypedDict

from agentcast.agents.base import Emitter, Task, Turn
from agentcast.agents.graph import END, Graph, StatefulNode
from agentcast.agents.inputs.checking import read_input
from agentcast.agents.registry import Registry
from agentcast.agents.streaming import stream_events
from agentcast.agents.transpiler import AgentTranspiler
from agentcast.server.cli.arguments import typed_input
from tests.support.lms import chat
from tests.unit.test_react import Heard

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:Implementing custom LMs:DeprecationWarning"),
]

PNG = "data:image/png;base64,iVBORw0KGgo="
WAV = "data:audio/wav;base64,UklGRg=="
PDF = "data:application/pdf;base64,JVBERi0="
URL = "https://example.org/a.png"

GIVEN: list[tuple[type, Any, dict[str, Any]]] = [
    (dspy.Image, URL, {"url": URL}),
    (dspy.Image, "gs://bucket/a.png", {"url": "gs://bucket/a.png"}),
    (dspy.Image, PNG, {"url": PNG}),
    (dspy.Image, {"url": URL}, {"url": URL}),
    (dspy.Image, {"url": PNG}, {"url": PNG}),
    (dspy.Audio, WAV, {"data": "UklGRg==", "audio_format": "wav"}),
    (dspy.Audio, {"data": "UklGRg==", "audio_format": "mp3"}, {"data": "UklGRg==", "audio_format": "mp3"}),
    (dspy.File, PDF, {"file_data": PDF, "file_id": None, "filename": None}),
    (dspy.File, {"file_id": "f-1"}, {"file_data": None, "file_id": "f-1", "filename": None}),
    (dspy.File, {"file_data": PDF, "filename": "a"}, {"file_data": PDF, "file_id": None, "filename": "a"}),
]
REFUSED: list[tuple[type, Any]] = [
    (dspy.Image, "/etc/passwd"),
    (dspy.Image, "file:///etc/passwd"),
    (dspy.Image, {"url": "/etc/passwd"}),
    (dspy.Image, ""),
    (dspy.Image, 7),
    (dspy.Image, None),
    (dspy.Image, {"url": URL, "extra": 1}),
    (dspy.Image, [URL]),
    (dspy.Audio, "https://example.org/a.wav"),
    (dspy.Audio, "/etc/passwd"),
    (dspy.Audio, {"data": "x"}),
    (dspy.File, "https://example.org/a.pdf"),
    (dspy.File, "/etc/passwd"),
    (dspy.File, {}),
]


def signature_of(annotation: Any) -> Any:
    return dspy.Signature({"medium": (annotation, dspy.InputField()), "text": (str, dspy.OutputField())}, "Describe.")


def agent_of(annotation: Any) -> Any:
    return Registry().add("describe", dspy.Predict(signature_of(annotation)))


@pytest.mark.parametrize(("kind", "given", "expected"), GIVEN)
def test_what_json_can_hold_is_taken(kind: type, given: Any, expected: dict[str, Any]):
    for annotation in (kind, kind | None, Annotated[kind, Field(description="x")], Optional[kind]):  # noqa: UP045
        taken = agent_of(annotation).spec.input_model.model_validate({"medium": given}).medium
        assert (type(taken), dict(taken)) == (kind, expected)


@pytest.mark.parametrize(("kind", "given"), REFUSED)
def test_what_cannot_be_one_is_refused_by_field(kind: type, given: Any):
    with pytest.raises(ValueError, match="medium"):
        agent_of(kind).spec.input_model.model_validate({"medium": given})


class Page(BaseModel):
    scan: dspy.Image
    number: int = 1


class Book(BaseModel):
    pages: list[Page]
    cover: dspy.Image | None = Field(None, alias="front")


@dataclass
class Data:
    scan: dspy.Image


class Typed(TypedDict):
    scan: dspy.Image


class Named(NamedTuple):
    scan: dspy.Image
    number: int = 1


class Roots(RootModel[list[dspy.Image]]):
    pass


class Aliased(BaseModel):
    scan: dspy.Image = Field(validation_alias=AliasChoices("picture", AliasPath("pictures", 0)))


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)

    scans: tuple[dspy.Image, ...]
    on: datetime.date


@pytest.mark.parametrize(
    ("annotation", "given", "expected"),
    [
        (list[dspy.Image], [URL, {"url": PNG}], [dspy.Image(URL), dspy.Image(PNG)]),
        (dict[str, dspy.Image], {"a": URL}, {"a": dspy.Image(URL)}),
        (dspy.Image | str, "words", "words"),
        (dspy.Image | int, URL, dspy.Image(URL)),
        (list[dspy.Image | None], [URL, None], [dspy.Image(URL), None]),
        (list[dspy.Audio | dspy.Image], [PNG, WAV], [dspy.Image(PNG), dspy.Audio(WAV)]),
        (tuple[dspy.Image, ...], [URL], (dspy.Image(URL),)),
        (Page, {"scan": URL}, Page(scan=dspy.Image(URL))),
        (
            Book,
            {"pages": [{"scan": URL, "number": 2}], "front": PNG},
            Book(pages=[Page(scan=dspy.Image(URL), number=2)], front=dspy.Image(PNG)),
        ),
        (tuple[str, dspy.Image], ["a", URL], ("a", dspy.Image(URL))),
        (Sequence[dspy.Image], [URL], [dspy.Image(URL)]),
        (dspy.Image | dspy.Audio | dspy.File, WAV, dspy.Audio(WAV)),
        (dspy.Image | dspy.Audio | dspy.File, PDF, dspy.File(PDF)),
        (Data, {"scan": URL}, Data(dspy.Image(URL))),
        (Typed, {"scan": URL}, {"scan": dspy.Image(URL)}),
        (Named, [URL, 2], Named(dspy.Image(URL), 2)),
        (Roots, [URL], Roots([dspy.Image(URL)])),
        (Aliased, {"picture": URL}, Aliased.model_validate({"picture": dspy.Image(URL)})),
        (Aliased, {"pictures": [URL]}, Aliased.model_validate({"picture": dspy.Image(URL)})),
        (dict[str, list[Page]], {"a": [{"scan": URL}]}, {"a": [Page(scan=dspy.Image(URL))]}),
        (list[str], [URL], [URL]),
        (str, URL, URL),
        (dspy.Code, "x = 1", dspy.Code(code="x = 1")),
    ],
)
def test_at_any_depth(annotation: Any, given: Any, expected: Any):
    assert agent_of(annotation).spec.input_model.model_validate({"medium": given}).medium == expected


async def test_strict_models_may_hold_them():
    async def describe(sheet: Strict) -> str:
        return str(sheet.scans[0].url)

    given = {"scans": [URL], "on": "2024-02-29"}
    expected = Strict(scans=(dspy.Image(URL),), on=datetime.date(2024, 2, 29))
    taken: Any = read_input(agent_of(Strict).spec.input_model, {"medium": given})
    assert taken.medium == expected
    registry = Registry()
    registry.agent(describe)
    task = Task(run="r", input=read_input(registry["describe"].spec.input_model, given))
    assert await registry["describe"].run(task, Heard()) == URL


@pytest.mark.parametrize(("kind", "given", "expected"), GIVEN)
async def test_a_function_may_take_nothing_else(kind: type, given: Any, expected: dict[str, Any]):
    async def describe(medium: Any) -> dict[str, Any]:
        return dict(medium)

    describe.__annotations__["medium"] = kind
    registry = Registry()
    registry.agent(describe)
    task = Task(run="r", input=read_input(registry["describe"].spec.input_model, {"medium": given}))
    assert await registry["describe"].run(task, Heard()) == expected


AROUND: dict[str, Any] = {
    "alone": lambda kind: kind,
    "list": lambda kind: list[kind],  # type: ignore[valid-type]
    "optional": lambda kind: kind | None,
}


@pytest.mark.parametrize("kind", [dspy.Image, dspy.Audio, dspy.File])
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_schema_offers_a_text_and_an_object(kind: type, around: Any):
    schema = agent_of(around(kind)).spec.input_model.model_json_schema()
    text, fields = schema["$defs"][kind.__name__]["anyOf"]
    assert (text["type"], fields["type"]) == ("string", "object")
    assert "data:" in text["description"]
    assert "from_path" not in str(schema)


def test_model_of_that_name_keeps_its_own_schema():
    class Image(BaseModel):
        width: int

    schema = agent_of(Image).spec.input_model.model_json_schema()
    assert schema["$defs"]["Image"]["properties"] == {"width": {"title": "Width", "type": "integer"}}


def test_terminal_sends_them():
    schema = agent_of(dspy.Image).spec.input_model.model_json_schema()
    assert typed_input(schema, [f"medium={URL}"]) == {"medium": URL}
    assert typed_input(schema, [f'medium={{"url": "{URL}"}}']) == {"medium": {"url": URL}}


class Messages(dspy.BaseLM):  # type: ignore[misc]
    """A language model that keeps the messages it is given."""

    def __init__(self) -> None:
        super().__init__("messages", cache=False)
        self.asked: list[Any] = []

    def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        self.asked.append(messages)
        message = SimpleNamespace(content=chat(text="a cat", answer="a cat"), tool_calls=None)
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage={}, model="messages")

    def media(self) -> list[Any]:
        """The parts of the last call that are no text."""
        contents = [message["content"] for message in self.asked[-1] if isinstance(message["content"], list)]
        return [part for content in contents for part in content if part["type"] != "text"]


PARTS: dict[type, tuple[str, Mapping[str, Any]]] = {
    dspy.Image: (PNG, {"type": "image_url", "image_url": {"url": PNG}}),
    dspy.Audio: (WAV, {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}),
    dspy.File: (PDF, {"type": "file", "file": {"file_data": PDF}}),
}


@pytest.mark.parametrize("kind", PARTS)
async def test_model_is_shown_what_was_sent(kind: type):
    given, part = PARTS[kind]
    agent, lm = agent_of(kind), Messages()
    task = Task(run="r", input=agent.spec.input_model.model_validate({"medium": given}))
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        assert await agent.run(task, Heard()) == {"text": "a cat"}
    assert lm.media() == [part]


class Photo(BaseModel):
    photo: dspy.Image
    pages: list[Page] = []


class Text(BaseModel):
    text: str


async def test_graphs_and_functions_and_modules_take_them():
    graph = Graph()
    graph.add_node(StatefulNode("look", Photo, Text))
    graph.add_edge("look", END)
    graph.set_entry_point("look")
    seen: list[Any] = []
    registry = Registry()
    registry.add("graph", AgentTranspiler.compile(graph, output_model=Text))

    @registry.agent
    async def whole(photo: Photo, emit: Emitter) -> str:
        seen.append(photo)
        return "a cat"

    @registry.agent
    async def fields(photo: dspy.Image, pages: list[Page]) -> str:
        seen.append(Photo(photo=photo, pages=pages))
        return "a cat"

    class Module(dspy.Module):  # type: ignore[misc]
        async def aforward(self, photo: dspy.Image, pages: list[Page]) -> Any:
            seen.append(Photo(photo=photo, pages=pages))
            return "a cat"

    registry.add("module", Module())
    lm = Messages()
    for agent in registry:
        given = agent.spec.input_model.model_validate({"photo": URL, "pages": [{"scan": PNG}]})
        with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
            assert "a cat" in str(await agent.run(Task(run="r", input=given), Heard()))
        assert "string" in str(agent.spec.input_model.model_json_schema()["$defs"]["Image"])
    assert lm.media()[0] == {"type": "image_url", "image_url": {"url": URL}}
    assert [isinstance(each, Photo) and dict(each) for each in seen] == [
        {"photo": dspy.Image(URL), "pages": [Page(scan=dspy.Image(PNG))]}
    ] * 3


async def test_image_of_an_earlier_turn_is_shown_again_unless_it_was_cut():
    class Ask(dspy.Signature):  # type: ignore[misc]
        photo: dspy.Image | None = dspy.InputField()
        question: str = dspy.InputField()
        history: dspy.History = dspy.InputField()
        answer: str = dspy.OutputField()

    agent, lm = Registry().add("ask", dspy.Predict(Ask)), Messages()
    cut = f"{PNG}… [cut, 100000 characters in all]"
    turns = [Turn({"photo": photo, "question": "What is it?"}, {"answer": "a cat"}) for photo in (URL, cut, None)]
    task = Task(run="r", input=agent.spec.input_model(photo=None, question="And its name?"), history=tuple(turns))
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        await agent.run(task, Heard())
    assert lm.media() == [{"type": "image_url", "image_url": {"url": URL}}]
    assert "characters in all" not in str(lm.asked)


# -- stream_events -----------------------------------------------------------------------------------------------------


class Level(enum.Enum):
    LOW = "low"


class Ticket(dspy.Signature):  # type: ignore[misc]
    title: str = dspy.InputField()
    due: datetime.date = dspy.InputField()
    level: Level = dspy.InputField()
    page: Page = dspy.InputField()
    votes: int = dspy.InputField(default=3)
    answer: str = dspy.OutputField()


INPUTS = {"title": "t", "due": "2024-02-29", "level": "low", "page": {"scan": URL}}


async def outcome_of(program: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    with dspy.context(lm=Messages(), adapter=dspy.ChatAdapter()):
        async with stream_events(program, inputs, **options) as events:
            async for _ in events:
                pass
    assert events.outcome is not None
    return events.outcome.prediction


class Seeing(dspy.Predict):  # type: ignore[misc]
    """Keeps what it is called with."""

    seen: Any = None

    async def aforward(self, **inputs: Any) -> Any:
        type(self).seen = inputs
        return await super().aforward(**inputs)


async def test_stream_events_converts_as_the_hub_does():
    program = Seeing(Ticket)
    await outcome_of(program, INPUTS)
    streamed = Seeing.seen
    agent = Registry().add("ticket", program)
    task = Task(run="r", input=agent.spec.input_model.model_validate(INPUTS))
    with dspy.context(lm=Messages(), adapter=dspy.ChatAdapter()):
        await agent.run(task, Heard())
    assert streamed == Seeing.seen
    assert streamed == {
        "title": "t",
        "due": datetime.date(2024, 2, 29),
        "level": Level.LOW,
        "page": Page(scan=dspy.Image(URL)),
        "votes": 3,
    }


async def test_stream_events_takes_python_values_as_they_are():
    program, page = Seeing(Ticket), Page(scan=dspy.Image(URL))
    await outcome_of(program, {**INPUTS, "due": datetime.date(2024, 1, 1), "level": Level.LOW, "page": page})
    assert Seeing.seen["page"] is page


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"title": None}, "title: Input should be a valid string"),
        ({"level": "high"}, "level: Input should be 'low'"),
        ({"page": {"scan": "/etc/passwd"}}, "page.scan: Value error, Unrecognized image string"),
        ({"other": 1}, "other: Extra inputs are not permitted"),
        ({"due": ...}, "due: Field required"),
        ({"due": ..., "votes": "many"}, "due: Field required; votes: Input should be a valid integer"),
    ],
)
@pytest.mark.parametrize("name", [None, "tickets"])
def test_stream_events_names_what_is_wrong(change: dict[str, Any], text: str, name: str | None):
    inputs = {key: value for key, value in {**INPUTS, **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=f"^invalid input for {name or 'Predict'}: {text}"):
        stream_events(dspy.Predict(Ticket), inputs, name=name)


async def test_program_whose_types_are_unknown_is_given_what_there_is():
    seen: list[Any] = []

    class Loose(dspy.Module):  # type: ignore[misc]
        async def aforward(self, **inputs: Any) -> Any:
            seen.append(inputs)
            return dspy.Prediction(answer="x")

    class Untyped(dspy.Module):  # type: ignore[misc]
        def forward(self, a, b=2):
            seen.append((a, b))
            return dspy.Prediction(answer="x")

    marker = object()
    await outcome_of(Loose(), {"any": marker})
    await outcome_of(Untyped(), {"a": marker})
    assert seen == [{"any": marker}, (marker, 2)]


async def test_signature_that_is_replaced_is_the_one_that_holds():
    program = Seeing("title -> answer")
    await outcome_of(program, {"title": "t"})
    program.signature = program.signature.append("votes", dspy.InputField(), int)
    await outcome_of(program, {"title": "t", "votes": "3"})
    assert Seeing.seen == {"title": "t", "votes": 3}


async def test_typed_modules_and_graphs_are_checked_too():
    class Doubler(dspy.Module):  # type: ignore[misc]
        async def aforward(self, number: int) -> Any:
            return dspy.Prediction(doubled=2 * number)

    graph = Graph()
    graph.add_node(StatefulNode("look", Photo, Text))
    graph.add_edge("look", END)
    graph.set_entry_point("look")
    assert (await outcome_of(Doubler(), {"number": "21"})).doubled == 42
    assert await outcome_of(AgentTranspiler.compile(graph, output_model=Text), {"photo": URL}) == Text(text="a cat")
    for program in (Doubler(), AgentTranspiler.compile(graph, output_model=Text)):
        with pytest.raises(ValueError, match=r"invalid input for .*x: Extra inputs"):
            stream_events(program, {"number": 1, "photo": URL, "x": 1})

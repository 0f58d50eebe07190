"""The researcher over a folder of real text: what it quotes stands in the files, and nothing else can be read."""

import re
from pathlib import Path
from typing import Any

import anyio
import dspy
import pytest

from agentcast.agents.base import Task, ToolError, Turn
from agentcast.agents.demo import registry
from agentcast.agents.demo.corpus import Corpus, corpus, passages, section
from agentcast.agents.demo.researcher import calculate, read, search
from agentcast.agents.events import AgentEvent, MessageEnd, Status, Token, ToolEnd, ToolStart
from agentcast.agents.offline import offline_lm
from agentcast.agents.registry import load

GUIDE = """\
# Garden guide

How to keep the garden alive.

## Watering

Water the roses at dawn. The ferns drink twice as much,
so give them 12 litres a day.

| plant | litres |
|---|---|
| rose | 6 |
| fern | 12 |

## Winter

Cover the roses before the first frost. Never cover
the ferns: they rot.
"""
TOOLS = (
    '"""Garden tools."""\n\n\ndef sharpen(blade):\n    """Sharpen a blade with the blue stone."""\n    return blade\n'
)


class Heard:
    """An emitter that keeps what it is sent."""

    def __init__(self) -> None:
        self.events: list[AgentEvent] = []

    async def send(self, event: AgentEvent) -> None:
        self.events.append(event)

    def nowait(self, event: AgentEvent) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "docs"
    (folder / "code").mkdir(parents=True)
    (folder / "guide.md").write_text(GUIDE)
    (folder / "code" / "tools.py").write_text(TOOLS)
    (folder / "notes.rst").write_text("Notes\n=====\n\nThe gate key hangs in the shed.\n")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8 roses")
    (folder / ".hidden.md").write_text("roses")
    (tmp_path / "secret.txt").write_text("roses and passwords")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    monkeypatch.setenv("AGENTCAST_DOCS", str(folder))
    monkeypatch.setenv("AGENTCAST_OFFLINE_DELAY", "0")
    with dspy.context(lm=offline_lm(), adapter=dspy.ChatAdapter()):
        yield folder


def flat(text: str) -> str:
    return " ".join(text.split())


async def ask(question: str, history: tuple[Turn, ...] = ()) -> tuple[str, Heard]:
    agent, heard = registry["researcher"], Heard()
    task = Task(run="r1", input=agent.spec.input_model(question=question), history=history)
    with anyio.fail_after(10):
        result = await agent.run(task, heard)
    assert set(result) == {"answer"}
    return result["answer"], heard


# -- The agent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "quoted"),
    [
        ("How much water do the ferns need?", "The ferns drink twice as much, so give them 12 litres a day."),
        ("When should I cover the roses?", "Cover the roses before the first frost."),
        ("Where is the gate key?", "The gate key hangs in the shed."),
    ],
)
async def test_answers_are_verbatim_quotes_from_the_files_they_name(docs: Path, question: str, quoted: str):
    answer, heard = await ask(question)
    quotes = re.findall(r"^(\S+), line (\d+): “(.*)”$", answer, re.M)
    assert quoted in [text for _, _, text in quotes]
    for file, line, text in quotes:
        content = (docs / file).read_text()
        assert text in flat(content)
        from_line = content.splitlines()[int(line) - 1 :]
        assert text in flat("\n".join(from_line))
        assert text not in flat("\n".join(from_line[1:]))
    assert "AGENTCAST_LM" in answer
    assert [event.tool for event in heard.of(ToolStart)] == ["search", "read"]
    assert [event.message.split()[0] for event in heard.of(Status)] == ["Searching", "Reading"]
    assert all(event.error is None for event in heard.of(ToolEnd))


async def test_thoughts_reasoning_and_answer_stream(docs: Path):
    answer, heard = await ask("When should I cover the roses?")
    texts: dict[str, str] = {}
    for token in heard.of(Token):
        texts[token.message] = texts.get(token.message, "") + token.delta
    assert {event.message: event.text for event in heard.of(MessageEnd)} == texts
    assert list(texts.values())[-1] == answer
    assert len(heard.of(Token)) > 4  # without a pause between words, those of one turn of the loop are joined


async def test_sums_are_right_and_absent_things_are_not_invented(docs: Path):
    answer, heard = await ask("What is (17 + 4) * 2 * 4?")
    assert answer.startswith("“(17 + 4) * 2 * 4 = 168”")
    assert [event.tool for event in heard.of(ToolStart)] == ["calculate"]
    answer, heard = await ask("Who built the Eiffel tower?")
    assert answer.startswith(
        "I cannot tell: no sentence that I have read answers this (I looked for: Who, built, Eiffel, tower)."
    )
    assert [event.tool for event in heard.of(ToolStart)] == ["search"]


async def test_thread_does_not_confuse_it(docs: Path):
    turn = Turn({"question": "When should I cover the roses?"}, {"answer": "…"})
    answer, _ = await ask("Where is the gate key?", (turn,))
    assert "“The gate key hangs in the shed.”" in answer
    assert "roses" not in answer


async def test_concurrent_runs_do_not_mix(docs: Path):
    answers: dict[str, str] = {}

    async def one(question: str) -> None:
        answers[question], heard = await ask(question)
        assert len(heard.of(ToolStart)) == 2

    async with anyio.create_task_group() as group:
        for question in ("Where is the gate key?", "When should I cover the roses?", "How is a blade sharpened?"):
            group.start_soon(one, question)
    assert "gate key hangs" in answers["Where is the gate key?"]
    assert "first frost" in answers["When should I cover the roses?"]
    assert "blue stone" in answers["How is a blade sharpened?"]


async def test_missing_folder_is_a_clear_error_without_its_path(docs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AGENTCAST_DOCS", str(docs / "gone"))
    answer, heard = await ask("Where is the gate key?")
    message = "AGENTCAST_DOCS is set to something that does not exist"
    assert {event.error.message for event in heard.of(ToolEnd)} == {message}
    assert str(docs) not in answer + str([event.wire() for event in heard.events])


@pytest.mark.parametrize(
    ("question", "quoted"),
    [
        (
            "What is agentcast?",
            "agentcast runs many LLM agents at once, and lets any number of people watch them live.",
        ),
        ("What is a hub?", "A hub is the server process that runs the agents and streams what they do."),
        ("What happens to a slow client?", "A slow client hurts only itself: neither the agents nor the other clients"),
        ("How do I cancel a run?", "To cancel a run, press Cancel on the page, or send the command `cancel`."),
        ("Can I use it without Redis?", "Redis is optional: without Redis, a hub keeps its runs in its own memory."),
        ("Which Python version do I need?", "You need Python version 3.11 or newer, and nothing else."),
        ("How do I use a real model?", "To use a real model, set `AGENTCAST_LM` to its name, such as"),
        ("How do I write my own agent?", "To write your own agent, add a DSPy program or a function to a registry,"),
        ("Is it free?", "It's free: agentcast is free software."),
        ("Is there authentication?", "No authentication is built in: a hub listens on 127.0.0.1, and knows no users"),
        ("How many runs can a hub run at once?", "1,000 runs may be queued or running at once in one process"),
        ("Which events end a run?", "A run ends with exactly one of the events `run_end`, `run_error` and"),
        ("How many files are in the library?", None),
        ("Anna has 3 apples and buys 4 more", None),
        ("I did not like this movie at all", None),
        ("hello", None),
        ("Does it support Windows?", None),
        ("What does it cost?", "It costs nothing."),
        ("What is a run?", "A run is one execution of an agent, from the input to the result."),
        ("Why is my agent slow?", None),
        ("Who are you?", None),
        ("Was kann ich hier machen?", None),
    ],
)
async def test_first_questions_about_the_guide(monkeypatch: pytest.MonkeyPatch, question: str, quoted: str | None):
    monkeypatch.delenv("AGENTCAST_DOCS", raising=False)
    monkeypatch.setenv("AGENTCAST_OFFLINE_DELAY", "0")
    with dspy.context(lm=offline_lm(), adapter=dspy.ChatAdapter()):
        answer, _ = await ask(question)
    if quoted is None:
        assert answer.startswith(("I cannot tell", "I answer questions about texts"))
    else:
        assert quoted in answer
    text = flat("\n".join(path.read_text() for path in corpus().files().values()))
    assert all(quote in text for quote in re.findall("“(.*?)”", answer))


def test_it_loads_by_name_and_asks_for_a_question_only():
    spec = load("agentcast.agents.demo:registry")["researcher"].spec
    assert spec.input_model.model_json_schema()["required"] == ["question"]
    assert set(spec.input_model.model_fields) == {"question"}
    assert spec.description.startswith("Answer a question about a folder of texts")


# -- The tools -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("docs")
def test_search_ranks_passages_with_their_place():
    first = search("when do ferns drink").split("\n\n")[0]
    assert first.startswith("guide.md:7 (Watering)\nWater the roses at dawn. The ferns drink")
    assert search("sharpen blade", limit=1).startswith("code/tools.py:")
    assert search("gate key").startswith("notes.rst:4 (Notes)\n")
    assert search("zebra") == "Nothing found for 'zebra'. Other or fewer words may help."
    assert search("the of and").startswith("Nothing found")
    assert "secret" not in search("roses passwords", limit=100)


@pytest.mark.usefixtures("docs")
def test_read_gives_the_section_or_some_lines():
    assert read("guide.md", 8) == "guide.md:5-14 (Watering)\n" + "\n".join(GUIDE.splitlines()[4:14])
    assert (
        read("./guide.md", line=7, count=1)
        == "guide.md:7-7 (Watering)\nWater the roses at dawn. The ferns drink twice as much,"
    )
    assert read("tools.py").startswith("code/tools.py:1-6\n")


@pytest.mark.usefixtures("docs")
@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("../secret.txt", "'../secret.txt' is outside the folder"),
        ("code/../../secret.txt", "is outside the folder"),
        ("/etc/passwd", "'/etc/passwd' is outside the folder"),
        ("~/.ssh/id", "is outside the folder"),
        ("C:\\boot.ini", "is outside the folder"),
        ("..\\secret.txt", "is outside the folder"),
        ("link.txt", "there is no file 'link.txt'; there are: code/tools.py, guide.md, notes.rst"),
        (".hidden.md", "there is no file '.hidden.md'"),
        ("photo.jpg", "there is no file 'photo.jpg'"),
        ("", "there is no file ''"),
        ("guide.md\0", "there is no file"),
    ],
)
def test_nothing_outside_the_folder_can_be_read(docs: Path, file: str, problem: str):
    with pytest.raises(ToolError) as caught:
        read(file)
    assert problem in str(caught.value)
    assert str(docs) not in str(caught.value)


@pytest.mark.usefixtures("docs")
def test_lines_that_are_not_there_are_an_error():
    with pytest.raises(ToolError, match=r"guide\.md has 18 lines; there is no line 40"):
        read("guide.md", 40)
    with pytest.raises(ToolError, match="there is no line 0"):
        read("guide.md", 0)


def test_calculate_explains_what_it_cannot():
    assert calculate("2 + 3 * 4") == "2 + 3 * 4 = 14"
    with pytest.raises(ToolError, match="division by zero"):
        calculate("1 / 0")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("7 / 2", "3.5"),
        ("1 / 3", "0.333333333333"),
        ("0.1 + 0.2", "0.3"),
        ("-2 + +5", "3"),
        ("5 --3", "8"),
        ("3 × 4 ÷ 2", "6"),
        ("0 * -3", "0"),
        (".5 + 1.", "1.5"),
        ("*".join(["9" * 60] * 3), "1e+180"),
        ("999999999999 * 999999999999", "9.99999999998e+23"),
        ("(" * 50 + "1" + ")" * 50, "1"),
    ],
)
def test_arithmetic(expression: str, value: str):
    assert calculate(expression).rpartition(" = ")[2] == value


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("1 / 0", "division by zero"),
        ("__import__('os')", "is not an expression of numbers"),
        ("1); DROP TABLE texts; --", "is not an expression of numbers"),
        ("(SELECT 1)", "is not an expression of numbers"),
        ("2 /* 3", "is not an expression of numbers"),
        ("2 ** 3", "is not an expression of numbers"),
        ("1 2", "is not an expression of numbers"),
        ("1,2", "is not an expression of numbers"),
        ("1 +", "'1 +' is not an expression of numbers"),
        ("", "'' is not an expression of numbers"),
        ("1+" * 250 + "1", "is not an expression of numbers"),
        ("(" * 99 + "1" + ")" * 99, "is not an expression of numbers"),
    ],
)
def test_arithmetic_refuses_what_is_none(expression: str, problem: str):
    with pytest.raises(ToolError, match=re.escape(problem)):
        calculate(expression)


def test_index_is_built_once_and_renewed_when_files_change(docs: Path, monkeypatch: pytest.MonkeyPatch):
    texts = Corpus(docs)
    assert [hit.file for hit in texts.search("gate key", 1)] == ["notes.rst"]
    before = texts._index
    texts.search("roses", 1)
    assert texts._index is before
    (docs / "new.txt").write_text("The gate key is lost. The gate key is gone.")
    assert [hit.file for hit in texts.search("gate key lost", 1)] == ["new.txt"]
    (docs / "new.txt").unlink()
    assert [hit.file for hit in texts.search("gate key lost", 1)] == ["notes.rst"]


def test_guide_is_there_without_any_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AGENTCAST_DOCS", raising=False)
    assert len(corpus().files()) >= 4
    assert corpus().search("slow client", 1)[0].file == "clients.md"


def test_passages_and_sections_know_headings_and_lines():
    found = list(passages("guide.md", GUIDE))
    assert [(part.line, part.heading) for part in found] == [
        (3, "Garden guide"),
        (7, "Watering"),
        (10, "Watering"),
        (17, "Winter"),
    ]
    lines = GUIDE.splitlines()
    assert all("\n".join(lines).find(part.text) >= 0 for part in found)
    assert section(lines, 8) == (5, 14)
    assert section(["x"] * 500, 250) == (230, 289)

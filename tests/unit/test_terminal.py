"""What a run looks like: frames in, lines out. A terminal is a `Console` with `force_terminal`."""

import io
from typing import Any

import pytest
from rich.console import Console

from agentcast.server.cli.terminal import AgentsView, RunView, short
from agentcast.server.state import RunState

Frame = dict[str, Any]


class Screen:
    """A view, and the state that its frames make."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.file = io.StringIO()
        self.console = Console(
            file=self.file, force_terminal=terminal, width=60, height=20, color_system=None, legacy_windows=False
        )
        self.view = RunView(self.console, "a")
        self.state = RunState.new("r", "a")

    def show(self, event: str, **fields: Any) -> None:
        frame = {"type": "event", "event": event, "run": "r", "ts": 1.0, "duration": 0.25, **fields}
        self.state.apply(frame)
        self.view.show(frame, self.state.document)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()

    def drawn(self) -> str:
        """What is in progress now."""
        console = Console(file=io.StringIO(), force_terminal=True, width=60, height=20, color_system=None)
        with console.capture() as capture:
            console.print(self.view)
        return capture.get()


def queued() -> Frame:
    return {"input": {}, "epoch": "e"}


@pytest.mark.parametrize(
    ("event", "fields", "line"),
    [
        ("run_queued", queued(), "run r of a"),
        ("run_position", {"position": 3}, "  · queued, 3 ahead"),
        ("run_position", {"position": 0}, "  · queued, none ahead"),
        ("status", {"message": "looking"}, "  · looking"),
        ("node_start", {"span": "1", "node": "plan", "kind": "graph", "inputs": {"q": "x"}}, '  ▸ plan(q="x")'),
        ("node_end", {"span": "1", "node": "plan", "patch": {"n": 1}}, "  ✓ plan 250 ms: n=1"),
        ("node_error", {"span": "1", "node": "plan", "error": {"message": "no"}}, "  ✗ plan 250 ms: no"),
        ("lm_end", {"span": "1", "error": {"message": "no"}}, "  ✗ model 250 ms: no"),
        ("tool_start", {"span": "1", "tool": "find", "args": {"q": "é", "n": 2}}, '  → find(q="é", n=2)'),
        ("tool_end", {"span": "1", "tool": "find", "result": "a\nb  c"}, "  ← find 250 ms: a b c"),
        ("tool_end", {"span": "1", "tool": "find", "result": {"a": [1]}}, '  ← find 250 ms: {"a": [1]}'),
        ("tool_end", {"span": "1", "tool": "find", "error": {"message": "no"}}, "  ✗ find 250 ms: no"),
        ("step_limit", {"max_steps": 3, "message": "enough"}, "  ! enough"),
        ("message_end", {"message": "m", "text": "of progress"}, "  text: of progress"),
        ("state", {"patch": {"a": None}}, "  · state: a=null"),
        ("custom", {"name": "mood", "value": "good"}, "  · mood: good"),
        ("cancel_requested", {}, "  · cancelling …"),
        ("run_cancelled", {"reason": "no time"}, "■ cancelled in 250 ms: no time"),
        ("run_cancelled", {}, "■ cancelled in 250 ms"),
        ("run_error", {"error": {"message": "bad"}}, "✗ failed in 250 ms: bad"),
        ("run_end", {"usage": {"input_tokens": 1200, "output_tokens": 3, "cost": 0.01}}, None),
    ],
)
def test_each_event_has_its_line(event: str, fields: Frame, line: str | None) -> None:
    screen = Screen()
    screen.show(event, **fields)
    assert screen.lines == [line or "✓ done in 250 ms, 1,200 tokens in, 3 out, $0.0100"]


def test_a_validation_error_names_node_attempt_and_fields() -> None:
    screen = Screen()
    fields = {"span": "1", "node": "plan", "attempt": 1, "max_retries": 2, "error": "too long", "failed_fields": ["a"]}
    screen.show("validation_error", **fields)
    assert screen.lines == ["  ! plan, attempt 1 of 3, does not fit (a): too long"]


def test_steps_are_indented_under_the_step_that_they_are_in_and_models_add_no_level() -> None:
    screen = Screen()
    screen.show("node_start", span="1", node="outer", kind="graph")
    screen.show("node_start", span="2", parent="1", node="inner", kind="module")
    screen.show("lm_start", span="3", parent="2", model="m")
    screen.show("tool_start", span="4", parent="3", tool="t", args={})
    screen.show("status", span="2", message="s")
    screen.show("node_end", span="2", node="inner")
    assert screen.lines == ["  ▸ outer", "    ▸ inner", "      → t()", "      · s", "    ✓ inner 250 ms"]


def test_unknown_events_and_frames_show_nothing() -> None:
    screen = Screen()
    screen.show("from_the_future", what="ever")
    screen.view.show({"type": "ping"}, screen.state.document)
    assert screen.lines == []


def message(screen: Screen, id: str, field: str, text: str) -> None:
    screen.show("message_start", message=id, span="s", field=field)
    screen.show("token", message=id, delta=text)
    screen.show("message_end", message=id, text=text)


def test_texts_are_shown_whole_and_the_result_does_not_repeat_them() -> None:
    screen = Screen()
    message(screen, "m", "answer", "line one\nline two")
    screen.show("run_end", result={"answer": "line one\nline two\n", "score": 1})
    assert screen.lines == ["  answer:", "    line one", "    line two", "score: 1", "✓ done in 250 ms"]


@pytest.mark.parametrize(
    ("result", "lines"),
    [("text", ["result: text"]), ([1], ["result:", "  [", "    1", "  ]"]), (None, []), ({"a": "b"}, ["a: b"])],
)
def test_results_of_any_kind_are_shown(result: Any, lines: list[str]) -> None:
    screen = Screen()
    screen.show("run_end", result=result)
    assert screen.lines[:-1] == lines


def test_a_text_that_became_void_is_said_to_be() -> None:
    screen = Screen()
    screen.show("message_start", message="m", span="s", field="answer")
    screen.show("message_retracted", message="m", reason="does not fit")
    screen.show("message_retracted", message="unknown", reason="gone")
    assert screen.lines == ["  ! answer is void: does not fit", "  ! text is void: gone"]


def test_after_a_snapshot_only_what_was_not_shown_yet_is_shown() -> None:
    screen = Screen()
    message(screen, "m1", "thought", "first")
    message_two = {"message": "m2", "span": "s", "field": "answer", "text": "second", "status": "done"}
    screen.state.document["messages"].append(message_two)
    screen.state.document.update(status="failed", created=1.0, started=2.0, ended=4.5, error={"message": "bad"})
    screen.view.show({"type": "gap", "from": 2, "to": 9, "reason": "overflow"}, screen.state.document)
    screen.view.show({"type": "snapshot"}, screen.state.document)
    assert screen.lines == [
        "  thought: first",
        "! events 2–9 were skipped (overflow)",
        "  answer: second",
        "✗ failed in 2.5 s: bad",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_run_says_cannot_steer_the_terminal(terminal: bool) -> None:
    screen = Screen(terminal=terminal)
    evil = "a\x1b[2J\x07\x9b31m\rb[bold]c[/bold]"
    screen.show("status", message=evil)
    message(screen, "m", evil, evil)
    screen.show("tool_start", span="1", tool=evil, args={evil: evil})
    screen.show("tool_progress", span="1", progress=1, message=evil)
    screen.show("message_start", message="open", span="1", field=evil)
    screen.show("token", message="open", delta=evil)
    shown = screen.file.getvalue() + screen.drawn()
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\r"}
    assert "[bold]c[/bold]" in shown, "what looks like markup is text"


def test_long_lines_are_not_broken_in_a_pipe() -> None:
    screen = Screen()
    screen.show("status", message="word " * 50)
    assert len(screen.lines) == 1


def test_a_terminal_shows_what_is_in_progress() -> None:
    screen = Screen(terminal=True)
    with screen.view as view:
        screen.show("run_queued", **queued(), position=2)
        assert "queued, 2 ahead" in screen.drawn()
        screen.show("run_start", worker="w", attempt=1)
        screen.show("status", message="looking around")
        screen.show("tool_start", span="1", tool="find", args={})
        screen.show("tool_progress", span="1", progress=2, total=5, message="half")
        screen.show("message_start", message="m", span="s", field="answer")
        screen.show("token", message="m", delta="\n".join(f"line {n}" for n in range(100)))
        view.refresh()
        drawn = screen.drawn()
        assert "find 2 of 5 half …" in drawn
        assert "running 0 s · looking around · Ctrl-C cancels" in drawn
        assert "line 99" in drawn
        assert "line 1\n" not in drawn, "of a long text only the end is shown"
        assert len(drawn.splitlines()) <= 20
        screen.show("run_cancelled")
        assert screen.drawn().strip() == ""


def test_agents_are_shown_with_their_fields() -> None:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    schema: dict[str, Any] = {
        "properties": {"q": {"type": "string", "description": "what\nto ask"}, "n": {"type": "integer"}}
    }
    schema |= {"required": ["q"]}
    agents = [
        {"name": "one", "description": "Does one.", "input": schema},
        {"name": "two", "description": "", "input": {}, "available": False},
    ]
    document = {"agents": agents, "model": {"name": "m", "offline": True}}
    with console.capture() as capture:
        console.print(AgentsView(document, "http://hub"))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert lines == [
        "2 agents at http://hub, model m (offline)",
        "",
        "one",
        "Does one.",
        "q string required what to ask",
        "n integer optional",
        "",
        "two",
        "not available at the moment",
        "no input",
    ]


def test_short_is_one_line_of_bounded_width() -> None:
    assert short("a\n  b", 10) == "a b"
    assert short("x" * 100, 10) == "xxxxxxxxx…"
    assert short({"a": 1}, 20) == '{"a": 1}'

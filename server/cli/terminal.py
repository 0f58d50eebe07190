"""A run, and the agents of a hub, as people see them in a terminal; in a pipe or a file, as plain lines.

What is finished is printed once and stays. On a terminal a region below it shows what is in progress, drawn from the
run's state: texts as they stream, steps that run, the status. Whatever comes from a run is shown as it is, except for
control characters: a model's text must not be able to steer the terminal.

This module must not know where frames come from.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from agentcast.server.cli.arguments import type_name
from agentcast.server.state import STATUS_AFTER, RunState

ARGS_WIDTH = 100
RESULT_WIDTH = 160
TAIL_CHARS = 4_000
"""How much of a streaming text is looked at for its last lines."""
MAX_STREAMING, MAX_RUNNING = 3, 5
"""Texts and steps in progress that are shown at once; of more, the newest."""

_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_ENDINGS = {"run_end": ("✓", "done", "green"), "run_error": ("✗", "failed", "red")}
_ENDINGS["run_cancelled"] = ("■", "cancelled", "yellow")
_ENDED_AS = {status: event for event, status in STATUS_AFTER.items()}

Event = Mapping[str, Any]


class RunView:
    """Shows one run: `show` each frame, `refresh` now and then; a context, since a terminal is to be left tidy."""

    def __init__(self, console: Console, agent: str) -> None:
        self._console = console
        self._agent = agent
        self._state: Event = RunState.new("", agent).document
        self._depths: dict[str, int] = {}
        self._printed: set[str] = set()
        self._degraded: str | None = None
        self._started = time.monotonic()
        self._spinner = Spinner("dots", style="cyan")
        self._live = Live(self, console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def refresh(self) -> None:
        """Redraw what is in progress."""
        if self._live.is_started:
            self._live.refresh()

    def show(self, frame: Event, state: Event) -> None:
        """Show `frame`; `state` is the run's after it."""
        self._state = state
        match frame["type"]:
            case "event":
                show = getattr(self, f"_show_{frame['event']}", None)
                if show is not None:
                    show(frame)
            case "gap":
                self.note(f"events {frame['from']}–{frame['to']} were skipped ({frame['reason']})")
            case "snapshot":
                self._catch_up()
            case "ping":
                self._tell_degraded(frame.get("degraded"))

    def _tell_degraded(self, reason: str | None) -> None:
        if reason is not None and self._degraded is None:
            self.note(f"the run stands still: {reason}")
        elif reason is None and self._degraded is not None:
            self.note("the run goes on")
        self._degraded = reason

    def note(self, text: str) -> None:
        """A word about the run rather than from it."""
        self._print(f"! {text}", "yellow")

    # -- Events ----------------------------------------------------------------------------------------------------

    def _show_run_queued(self, event: Event) -> None:
        self._print(f"run {event['run']} of {self._agent}", "bold")
        if "position" in event:
            self._show_run_position(event)

    def _show_run_position(self, event: Event) -> None:
        ahead = event["position"]
        self._print(f"· queued, {ahead or 'none'} ahead", "dim", 1)

    def _show_status(self, event: Event) -> None:
        self._print(f"· {event['message']}", "dim", self._inside(event.get("span")))

    def _show_node_start(self, event: Event) -> None:
        depth = self._enter(event)
        inputs = f"({_arguments(event['inputs'])})" if event.get("inputs") else ""
        self._print(f"▸ {event['node']}{inputs}", "cyan", depth)

    def _show_node_end(self, event: Event) -> None:
        depth = self._depths.pop(event["span"], 1)
        patch = f": {_arguments(event['patch'])}" if event.get("patch") else ""
        self._print(f"✓ {event['node']} {_seconds(event)}{patch}", "green", depth)

    def _show_node_error(self, event: Event) -> None:
        depth = self._depths.pop(event["span"], 1)
        self._print(f"✗ {event['node']} {_seconds(event)}: {event['error']['message']}", "red", depth)

    def _show_lm_start(self, event: Event) -> None:
        self._depths[event["span"]] = self._inside(event.get("parent")) - 1

    def _show_lm_end(self, event: Event) -> None:
        depth = self._depths.pop(event["span"], 0)
        if "error" in event:
            self._print(f"✗ model {_seconds(event)}: {event['error']['message']}", "red", depth + 1)

    def _show_tool_start(self, event: Event) -> None:
        depth = self._enter(event)
        self._print(f"→ {event['tool']}({_arguments(event['args'])})", "blue", depth)

    def _show_tool_end(self, event: Event) -> None:
        depth = self._depths.pop(event["span"], 1)
        if "error" in event:
            self._print(f"✗ {event['tool']} {_seconds(event)}: {event['error']['message']}", "red", depth)
        else:
            result = short(event.get("result"), RESULT_WIDTH)
            self._print(f"← {event['tool']} {_seconds(event)}: {result}", "dim", depth)

    def _show_validation_error(self, event: Event) -> None:
        fields = f" ({', '.join(event['failed_fields'])})" if event.get("failed_fields") else ""
        tries = f"attempt {event['attempt']} of {event['max_retries'] + 1}"
        text = f"! {event['node']}, {tries}, does not fit{fields}: {event['error']}"
        self._print(text, "yellow", self._inside(event["span"]))

    def _show_step_limit(self, event: Event) -> None:
        self._print(f"! {event['message']}", "yellow", 1)

    def _show_message_end(self, event: Event) -> None:
        message = _find(self._state["messages"], event["message"])
        self._print_message(message or {"message": event["message"], "span": "", "field": "text", **event})

    def _show_message_retracted(self, event: Event) -> None:
        message = _find(self._state["messages"], event["message"])
        field, span = (message["field"], message["span"]) if message is not None else ("text", None)
        self._print(f"! {field} is void: {event['reason']}", "yellow", self._inside(span))

    def _show_state(self, event: Event) -> None:
        self._print(f"· state: {_arguments(event['patch'])}", "dim", 1)

    def _show_custom(self, event: Event) -> None:
        self._print(f"· {event['name']}: {short(event['value'], RESULT_WIDTH)}", "dim", 1)

    def _show_cancel_requested(self, event: Event) -> None:
        self._print("· cancelling …", "yellow", 1)

    def _show_run_end(self, event: Event) -> None:
        self._finish(event)

    _show_run_error = _show_run_cancelled = _show_run_end

    def _finish(self, event: Event) -> None:
        if event["event"] == "run_end":
            self._print_result(event.get("result"))
        sign, word, style = _ENDINGS[event["event"]]
        reason = event["error"]["message"] if "error" in event else event.get("reason")
        usage = f", {_tokens(event['usage'])}" if event.get("usage") else ""
        self._print(f"{sign} {word} in {_seconds(event)}{usage}" + (f": {reason}" if reason else ""), f"bold {style}")

    def _catch_up(self) -> None:
        """What the skipped events would have shown and is still known: texts, and the end."""
        state = self._state
        for message in state["messages"]:
            if message["status"] == "done":
                self._print_message(message)
        if state["status"] in _ENDED_AS:
            duration = state["ended"] - state.get("started", state["created"])
            self._finish({**state, "event": _ENDED_AS[state["status"]], "duration": duration})

    # -- Printing --------------------------------------------------------------------------------------------------

    def _enter(self, event: Event) -> int:
        depth = self._inside(event.get("parent"))
        self._depths[event["span"]] = depth
        return depth

    def _inside(self, span: str | None) -> int:
        """How deep to show what belongs to `span`."""
        return self._depths.get(span or "", 0) + 1

    def _print_message(self, message: Event) -> None:
        if message["message"] not in self._printed:
            self._printed.add(message["message"])
            self._print_field(message["field"], message["text"], self._inside(message["span"]))

    def _print_result(self, result: Any) -> None:
        """The result, but for the texts that were just shown whole."""
        if result is None:
            return
        if not isinstance(result, dict):
            self._print_field("result", result, 0)
            return
        shown = {(m["field"], m["text"].strip()) for m in self._state["messages"] if m["status"] == "done"}
        for field, value in result.items():
            if not (isinstance(value, str) and (field, value.strip()) in shown):
                self._print_field(field, value, 0)

    def _print_field(self, field: str, value: Any, depth: int) -> None:
        text = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)).strip()
        if "\n" in text or len(text) > RESULT_WIDTH:
            self._print(f"{field}:", "bold", depth)
            self._print(text, "", depth + 1)
        else:
            self._print(f"{field}: {text}", "", depth, bold=len(field) + 1)

    def _print(self, text: str, style: str, depth: int = 0, *, bold: int = 0) -> None:
        """Print lines, indented; the first `bold` characters in bold."""
        clean = Text(_clean(text), style=style)
        clean.stylize("bold", 0, bold)
        if self._console.is_terminal:
            self._console.print(Padding(clean, (0, 0, 0, 2 * depth), expand=False), highlight=False)
        else:
            lines = clean.plain.split("\n")
            self._console.out("\n".join(f"{'  ' * depth}{line}".rstrip() for line in lines), highlight=False)

    # -- What is in progress ---------------------------------------------------------------------------------------

    def __rich__(self) -> RenderableType:
        """What is in progress at this moment."""
        state = self._state
        if state["status"] in _ENDED_AS:
            return Text()
        streaming = [message for message in state["messages"] if message["status"] == "open"][-MAX_STREAMING:]
        running = [span for span in state["spans"] if _is_step(span)][-MAX_RUNNING:]
        return Group(*self._streaming(streaming, len(running)), *map(self._step, running), self._status())

    def _streaming(self, messages: list[Event], others: int) -> Iterator[RenderableType]:
        room = max(3, (self._console.height - others - 4) // max(1, len(messages)) - 1)
        for message in messages:
            indent = 2 * self._inside(message["span"])
            width = max(20, self._console.width - indent - 2)
            lines = Text(_clean(message["text"][-TAIL_CHARS:])).wrap(self._console, width)
            yield Padding(Text(f"{_clean(message['field'])}:", style="bold"), (0, 0, 0, indent))
            yield Padding(Text("\n").join(list(lines)[-room:]), (0, 0, 0, indent + 2))

    def _step(self, span: Event) -> RenderableType:
        progress = span.get("progress", {})
        words = [_clean(span["name"])]
        if "progress" in progress:
            total = f" of {progress['total']:g}" if "total" in progress else ""
            words.append(f"{progress['progress']:g}{total}")
        if "message" in progress:
            words.append(short(progress["message"], ARGS_WIDTH))
        return Text(f"  {' '.join(words)} …", style="blue", no_wrap=True, overflow="ellipsis")

    def _status(self) -> RenderableType:
        state = self._state
        passed = time.monotonic() - self._started
        position = f", {state['position']} ahead" if "position" in state else ""
        message = f" · {short(state['status_message'], ARGS_WIDTH)}" if state.get("status_message") else ""
        text = f"{state['status']}{position} {passed:.0f} s{message} · Ctrl-C cancels"
        self._spinner.update(text=Text(text, style="dim", no_wrap=True, overflow="ellipsis"))
        return self._spinner


@dataclass(frozen=True)
class AgentsView:
    """The agents of a hub, as `GET /v1/agents` describes them; for `console.print`."""

    document: Mapping[str, Any]
    url: str

    def __rich__(self) -> RenderableType:
        agents = self.document["agents"]
        model = self.document.get("model", {})
        offline = " (offline)" if model.get("offline") else ""
        head = Text(f"{len(agents)} agent{'s' * (len(agents) != 1)} at {self.url}", style="dim")
        head.append(f", model {_clean(str(model.get('name', 'unknown')))}{offline}")
        return Group(head, *(part for agent in agents for part in self._agent(agent)))

    def _agent(self, agent: Mapping[str, Any]) -> Iterable[RenderableType]:
        yield Text()
        yield Text(_clean(agent["name"]), style="bold cyan")
        if agent.get("description"):
            yield Padding(Text(_clean(agent["description"].strip())), (0, 0, 0, 2), expand=False)
        if not agent.get("available", True):
            reason = _clean(" ".join(str(agent.get("reason", "")).split()))
            yield Text(f"  not available at the moment{': ' if reason else ''}{reason}", style="yellow")
        schema = agent.get("input", {})
        fields = schema.get("properties", {})
        if not fields:
            yield Text("  no input", style="dim")
            return
        table = Table.grid(padding=(0, 2))
        for wraps in (False, False, False, True):
            table.add_column(no_wrap=not wraps)
        for name, field in fields.items():
            need = "required" if name in schema.get("required", ()) else _default(field)
            words = _clean(" ".join(str(field.get("description", "")).split()))
            kind = _clean(type_name(schema, field))
            table.add_row(Text(_clean(name), style="bold"), Text(kind), Text(need, style="dim"), Text(words))
        yield Padding(table, (0, 0, 0, 2), expand=False)


def short(value: Any, width: int) -> str:
    """`value` on one line of at most `width` characters, none of them a control character."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _clean(" ".join(text[: 4 * width].split()))
    return text if len(text) <= width else text[: width - 1] + "…"


def _arguments(values: Mapping[str, Any]) -> str:
    parts = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items())
    return short(", ".join(parts), ARGS_WIDTH)


def _default(field: Mapping[str, Any]) -> str:
    return f"default {short(json.dumps(field['default']), 40)}" if "default" in field else "optional"


def _find(messages: list[dict[str, Any]], id: str) -> dict[str, Any] | None:
    return next((message for message in reversed(messages) if message["message"] == id), None)


def _is_step(span: Event) -> bool:
    return bool(span["status"] == "running" and span["kind"] != "node")


def _seconds(event: Event) -> str:
    seconds = event["duration"]
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _tokens(usage: Mapping[str, Any]) -> str:
    cost = f", ${usage['cost']:.4f}" if "cost" in usage else ""
    return f"{usage['input_tokens']:,} tokens in, {usage['output_tokens']:,} out{cost}"


def _clean(text: str) -> str:
    return text.translate(_CONTROL)

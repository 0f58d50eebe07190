"""`GET /v1/agents`: schemas are built once, whether an agent can run is asked each time."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from agentcast.agents.base import AgentSpec, Emitter
from tests.support.agents import Anything, FunctionAgent, agent
from tests.support.hub import open_hub

built: list[str] = []


class Counted(BaseModel):
    text: str

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        built.append(cls.__name__)
        return super().model_json_schema(*args, **kwargs)


@dataclass(frozen=True)
class Moody(FunctionAgent):
    """Cannot run while there is a reason."""

    reasons: list[str]

    @property
    def unavailable(self) -> str | None:
        return self.reasons[-1] if self.reasons else None


async def nothing(input: Counted, emit: Emitter) -> None:
    pass


@agent("plain")
async def plain(input: Anything, emit: Emitter) -> None:
    pass


async def test_schemas_are_built_once_and_availability_is_asked_each_time() -> None:
    built.clear()
    graph = {"nodes": [{"name": "one"}], "edges": [], "entry": "one"}
    output = {"type": "object", "properties": {"n": {"type": "integer"}}}
    spec = AgentSpec(name="moody", description="m", input_model=Counted, output_schema=output, graph=graph)
    moody = Moody(spec, nothing, [])
    always = {
        "name": "moody",
        "description": "m",
        "input": BaseModel.model_json_schema.__func__(Counted),  # type: ignore[attr-defined]
        "output": output,
        "timeout": 600.0,
        "max_concurrent": 32,
        "graph": graph,
    }
    seen = []
    async with open_hub(moody, plain) as hub, hub.http() as http:
        for reasons in ([], ["down"], ["down", "still down"], []):
            moody.reasons[:] = reasons
            listed, other = (await http.get("/v1/agents")).json()["agents"]
            seen.append({name: listed.pop(name) for name in ("available", "reason") if name in listed})
            assert listed == always
            assert other["available"] is True
            assert "graph" not in other
    assert seen == [
        {"available": True},
        {"available": False, "reason": "down"},
        {"available": False, "reason": "still down"},
        {"available": True},
    ]
    assert built == ["Counted"]

"""Conversations on a hub: `dspy.History` and media, from JSON on the wire to the model's prompt."""

from typing import Any

import dspy

from agentcast.agents.registry import Registry
from tests.support.hub import open_hub
from tests.support.lms import chat, lm_of
from tests.support.log import Log

URL = "https://example.org/a.png"


class Chat(dspy.Signature):  # type: ignore[misc]  # dspy is untyped
    """Talk about a picture."""

    photo: dspy.Image | None = dspy.InputField(default=None)
    question: str = dspy.InputField()
    history: dspy.History = dspy.InputField()
    answer: str = dspy.OutputField()


async def test_turns_that_have_ended_well_are_shown_to_the_next_one(log: Log) -> None:
    log.expect("of agent chat failed")
    asked: list[Any] = []

    def reply(prompt: str) -> str:
        return chat(answer=f"A{len(asked)}")

    class Seeing(dspy.Predict):  # type: ignore[misc]
        async def aforward(self, **inputs: Any) -> Any:
            asked.append(inputs)
            if inputs["question"] == "Fail!":
                raise ValueError("no answer")
            return await super().aforward(**inputs)

    agent: Any = Registry().add("chat", Seeing(Chat), lm=lm_of(reply))
    async with open_hub(agent) as hub, hub.client() as client, hub.http() as http:
        (listed,) = (await http.get("/v1/agents")).json()["agents"]
        assert sorted(listed["input"]["properties"]) == ["photo", "question"]
        assert listed["input"]["required"] == ["question"]
        for question in ("One?", "Fail!", "Two?"):
            await client.end(await client.start("chat", {"question": question, "photo": URL}, thread="t"))
        await client.end(await client.start("chat", {"question": "Else?"}, thread="u"))
        refused = await http.post("/v1/runs", json={"agent": "chat", "input": {"question": "x", "history": {}}})
        wrong = await http.post("/v1/runs", json={"agent": "chat", "input": {"question": "x", "photo": "/etc/passwd"}})
    photo = dspy.Image(URL)
    assert [each["history"].messages for each in asked] == [
        [],
        [{"photo": photo, "question": "One?", "answer": "A1"}],
        [{"photo": photo, "question": "One?", "answer": "A1"}],
        [],
    ]
    assert [each["photo"] for each in asked] == [photo, photo, photo, None]
    for response, field in ((refused, "history"), (wrong, "photo")):
        assert response.status_code == 422
        assert field in response.text

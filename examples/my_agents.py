import dspy

from agentcast import Emitter, Registry
from agentcast.events import Status

registry = Registry()

# 1. Any DSPy program.
registry.add("summarizer", dspy.ChainOfThought("text -> summary"))


# 2. A ReAct agent: a signature and its tools. Tools may be sync or async.
def word_count(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


@registry.react(tools=[word_count])
class Editor(dspy.Signature):
    """Answer questions about a text."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


# 3. Any async function with typed parameters.
@registry.agent
async def countdown(start: int, emit: Emitter) -> str:
    """Count down to lift-off."""
    for number in range(start, 0, -1):
        await emit.send(Status(message=f"{number}…"))
    return "lift-off"

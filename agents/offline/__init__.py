"""The offline model: a language model by rules, so that everything runs without a key or a network.

It follows DSPy's prompt formats, uses the tools that a ReAct prompt lists, and answers with verbatim quotes and sums;
it says in its answers what it is. `engine` is the way in; `prompt` reads, `acting` and `answering` decide.

Nothing in here may know agents, runs or events: it sees a prompt and returns a text.
"""

import dspy

from agentcast.agents.offline.engine import DELAY_VARIABLE, MODEL, AsyncOfflineEngine, OfflineEngine

__all__ = ["DELAY_VARIABLE", "MODEL", "AsyncOfflineEngine", "OfflineEngine", "offline_lm"]


def offline_lm() -> dspy.LM:
    """The offline model, ready for `dspy.context(lm=…)`."""
    return dspy.LM(MODEL, engine=OfflineEngine(), async_engine=AsyncOfflineEngine(), cache=False)

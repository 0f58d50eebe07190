"""Setting DSPy up. Each case is a process of its own: DSPy can be configured once in a process."""

import json
import os
import subprocess
import sys
from typing import Any

QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "AGENTCAST_OFFLINE_DELAY": "0", "OPENAI_API_KEY": "unused-key"}
PRELUDE = """
import json, sys
import agentcast.agents.llm as llm
def report(**facts): print(json.dumps(facts))
"""


def process(code: str, **variables: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("AGENTCAST", "OPENAI"))}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment | QUIET | variables,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_default_is_offline_with_everything_that_grows_switched_off():
    facts = process(
        """
info = llm.configure()
again = llm.configure("offline")
import dspy
dspy.Predict("question -> answer")(question="What is 1 + 1?")
from dspy.clients.base_lm import GLOBAL_HISTORY
report(name=info.name, offline=info.offline, same=info is again, cache=dspy.settings.lm.cache,
       trace=dspy.settings.trace, history=len(dspy.settings.lm.history) + len(GLOBAL_HISTORY),
       adapter=type(dspy.settings.adapter).__name__, litellm="litellm" in sys.modules)
"""
    )
    assert facts == {
        "name": "offline",
        "offline": True,
        "same": True,
        "cache": False,
        "trace": [],
        "history": 0,
        "adapter": "ChatAdapter",
        "litellm": False,
    }


def test_model_comes_from_the_environment_and_a_native_one_needs_no_litellm():
    facts = process(
        "info = llm.configure(); import dspy;"
        "lm = dspy.settings.lm;"
        "report(name=info.name, offline=info.offline, lm=lm.model, cache=lm.cache, litellm='litellm' in sys.modules)",
        AGENTCAST_LM="openai/gpt-4o-mini",
    )
    assert facts == {
        "name": "openai/gpt-4o-mini",
        "offline": False,
        "lm": "openai/gpt-4o-mini",
        "cache": False,
        "litellm": False,
    }


def test_wrong_model_is_an_error_at_start():
    problems = {
        "openai/": "has a provider prefix but no model id after it",
        "nowhere/model-1": "no provider is known by that name",
        "gpt5": "no provider is known by that name",
    }
    facts = process(
        f"""
import os
facts = {{}}
for name in {list(problems)!r}:
    os.environ["AGENTCAST_LM"] = name
    try: llm.configure()
    except llm.ModelError as error: facts[name] = dict(model=error.model, problem=error.problem, text=str(error))
report(**facts)
"""
    )
    for model, problem in problems.items():
        assert facts[model]["model"] == model
        assert problem in facts[model]["problem"]
        assert facts[model]["text"].startswith(f"AGENTCAST_LM={model!r}: ")
        assert "'openai/gpt-5-mini'" in facts[model]["text"]


def test_missing_litellm_is_reported():
    facts = process(
        """
sys.modules["litellm"] = None
try: llm.make_lm("nowhere/model-1")
except llm.ModelError as error: report(problem=error.problem)
"""
    )
    assert facts["problem"] == "this provider needs the package litellm: pip install litellm"


def test_another_model_in_the_same_process_is_refused():
    facts = process(
        """
import anyio
async def configure(name): return llm.configure(name)
anyio.run(configure, "offline")
same = anyio.run(configure, "offline")
try: anyio.run(configure, "openai/gpt-4o-mini")
except llm.ModelError as error: report(same=same.name, problem=error.problem)
"""
    )
    assert facts == {"same": "offline", "problem": "this process already uses offline"}

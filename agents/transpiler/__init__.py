"""Programs out of graphs: `AgentTranspiler.compile(graph)` gives a `dspy.Module` that runs it.

    program = AgentTranspiler.compile(graph, output_model=Report)
    report = await program.aforward(topic="…")           # a Report
    async for event in program.astream(topic="…"): …     # dicts, step by step

and out of typed functions and modules, with `@self_correcting`.

A program is shared by all its runs and holds nothing of them (G8). What is in a graph, and the rules by which it runs,
are `agentcast.agents.graph`'s; here is what does the work: language models that correct themselves, tools, functions,
modules. This package must not know agents or registries.
"""

from agentcast.agents.transpiler.correcting import SelfCorrecting, self_correcting
from agentcast.agents.transpiler.program import AgentTranspiler, Program, ProgramStream
from agentcast.agents.transpiler.running import RunMetadata

__all__ = ["AgentTranspiler", "Program", "ProgramStream", "RunMetadata", "SelfCorrecting", "self_correcting"]

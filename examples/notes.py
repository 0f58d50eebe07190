import asyncio

from pydantic import BaseModel, Field

from agentcast import END, AgentTranspiler, Graph, Registry, StatefulNode, configure


class Article(BaseModel):
    article: str


class Summary(BaseModel):
    summary: str = Field(min_length=10, description="What the article says, in a sentence or two.")


class Size(BaseModel):
    words: int


class Sized(Summary, Size):
    pass


class Verdict(BaseModel):
    short: bool


def clean(given: Article) -> dict[str, str]:
    return {"article": " ".join(given.article.split())}


def count(given: Article) -> dict[str, int]:
    return {"words": len(given.article.split())}


def check(given: Sized) -> Verdict:
    return Verdict(short=len(given.summary) < 300 or len(given.summary.split()) < given.words)


graph = Graph(description="Summarize an article.")
graph.add_node(StatefulNode("clean", Article, Article, fn=clean))
graph.add_node(StatefulNode("summarize", Article, Summary, instructions="Summarize the article."))  # a language model
graph.add_node(StatefulNode("count", Article, Size, fn=count))
graph.add_node(StatefulNode("check", Sized, Verdict, fn=check))
graph.add_edge("clean", "summarize")  # both at once …
graph.add_edge("clean", "count")
graph.add_edge("summarize", "check")  # … and both are waited for
graph.add_edge("count", "check")
graph.add_conditional_edges("check", lambda state: state.short, {True: END, False: "summarize"})
graph.set_entry_point("clean")

program = AgentTranspiler.compile(graph, output_model=Sized)  # or an error that names all that is wrong
registry = Registry()
registry.add("notes", program)


async def main() -> None:
    async for event in program.astream(article="One hub serves many clients. They all see every event."):
        if event["event"] == "node_end":
            print(event["node"], "has set", event["patch"])
        elif event["event"] == "validation_error":  # the model sees what is wrong, and tries again
            print(event["node"], "failed:", event["error"])
        elif event["event"] == "finished":
            print(event["prediction"].summary)


if __name__ == "__main__":
    configure()
    asyncio.run(main())

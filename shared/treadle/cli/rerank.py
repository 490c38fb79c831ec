"""`treadle rerank`: documents by their relevance to a query."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from treadle.cli.asking import Address, Model
from treadle.cli.task_command import (
    AsJson,
    File,
    Lines,
    Out,
    Truncate,
    WithText,
    is_given,
    run_task,
)
from treadle.cli.task_records import Query, queries
from treadle.cli.task_run import Task
from treadle.cli.task_tables import show_ranking
from treadle.client import Ranking, RerankRequest
from treadle.errors import invalid_field


def rerank(
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="[QUERY DOCUMENT...]", help="What to ask; - reads JSONL from standard input."),
    ] = None,
    file: File = None,
    out: Out = None,
    with_text: WithText = False,
    as_json: AsJson = False,
    model: Model = "",
    top_n: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the best documents.", show_default="all")
    ] = None,
    raw_scores: Annotated[
        bool, typer.Option("--raw-scores", help="The head's own numbers, as they are.")
    ] = False,
    truncate: Truncate = False,
    address: Address = "",
) -> None:
    """Order documents by their relevance to a query, best first.

    A file, or standard input, is JSONL: a query and its documents a line. index counts a line's documents
    from 0.

    Examples:

      treadle rerank "How do I weave?" "A loom holds threads." "Bread needs flour."

      treadle rerank --file queries.jsonl --top-n 3 --out ranked.jsonl
    """

    def make(name: str) -> Task[Query, Ranking]:
        async def requests(batches: AsyncIterable[Sequence[Query]]) -> AsyncIterator[RerankRequest]:
            async for [(query, documents)] in batches:
                yield RerankRequest(
                    query=query,
                    documents=documents,
                    model=name,
                    top_n=top_n,
                    truncate=truncate,
                    raw_scores=raw_scores,
                )

        return Task(
            "rerank",
            queries(),
            lambda client, batches, window: client.rerank_stream(requests(batches), window=window),
            _rows,
            _fields,
            show_ranking,
        )

    given: list[Query] | None = None
    if text and is_given(text, file):
        query, *documents = text
        if not documents:
            raise invalid_field("documents", "give documents after the query, or --file with JSONL")
        given = [(query, tuple(documents))]
    else:
        is_given(text, file)
    lines = Lines(file, "jsonl", out, with_text, as_json, batch_size=1)
    run_task(make, given, lines, task_name="rerank", model=model, address=address)


def _rows(answer: Ranking) -> Iterator[dict[str, object]]:
    yield {"documents": [asdict(one) for one in answer.documents]}


def _fields(value: Query) -> dict[str, object]:
    query, documents = value
    # "documents" are the result's.
    return {"query": query, "texts": documents}

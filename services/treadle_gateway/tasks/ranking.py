"""Rerank: by a head that reads query and document together, or else by their embeddings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from treadle.errors import invalid_field
from treadle_gateway.artifact import TaskFacts
from treadle_gateway.encoded import EncodeOptions
from treadle_gateway.tasks.embedding import default_pooling
from treadle_gateway.tasks.prompted import encode_prompted
from treadle_gateway.tasks.result_bytes import floats
from treadle_gateway.tasks.task import RerankTask
from treadle_gateway.tasks.texts import TextEncoder
from treadle_gateway.tasks.work import EmbedWork, Plan, Ranking, RankWork, WorkInput

_QUERY_PROMPTS = ("query",)
_DOCUMENT_PROMPTS = ("document", "passage")


async def plan(task: RerankTask, encoder: TextEncoder) -> Plan:
    """The work; raises InvalidArgument."""
    read = partial(_read, len(task.documents), task.top_n)
    facts = encoder.model.artifact.facts
    if "embed" in facts.tasks:
        # What two vectors of length 1 have in common is their cosine.
        work = EmbedWork(default_pooling(facts), facts.normalize or facts.similarity != "dot")
        return Plan(await _texts(task, facts, encoder), RankWork(embed=work), read)
    activation = "" if task.raw_scores else facts.rank_activation
    return Plan(await _pairs(task, encoder), RankWork(activation), read)


async def _pairs(task: RerankTask, encoder: TextEncoder) -> list[WorkInput]:
    """Query and document together, the document cut where that is wanted."""
    await _check_query(task.query, encoder)
    texts = [(task.query, document) for document in task.documents]
    options = EncodeOptions(encoder.cut(task.truncate, second_only=True), type_ids=encoder.has_types)
    encoded = await encoder.encode(texts, options, _pair_field)
    return [encoder.work_input(f"documents[{number}]", one) for number, one in enumerate(encoded)]


async def _check_query(query: str, encoder: TextEncoder) -> None:
    """Raises InvalidArgument for a query that leaves no room: a pair of it and nothing takes it all."""
    (alone,) = await encoder.encode([(query, "")], EncodeOptions(), lambda _: "query")
    if encoder.max_length and len(alone.ids) >= encoder.max_length:
        raise invalid_field(
            "query",
            f"has {len(alone.ids)} tokens, special ones included, which leaves no room for a document: query "
            f"and document together have at most {encoder.max_length}. It is never cut; shorten it",
        )


def _pair_field(theirs: str) -> str:
    found = re.match(r"inputs\[(\d+)\]\.(text|pair)$", theirs)
    if found is None:
        return "documents"
    return "query" if found[2] == "text" else f"documents[{found[1]}]"


async def _texts(task: RerankTask, facts: TaskFacts, encoder: TextEncoder) -> list[WorkInput]:
    """The query first, then the documents, each behind what the folder puts before it."""
    query = await encode_prompted(
        encoder,
        _prompt(facts, _QUERY_PROMPTS),
        [task.query],
        ["query"],
        truncate=False,
        way_out="it is never cut; shorten it",
    )
    return query + await encode_prompted(
        encoder,
        _prompt(facts, _DOCUMENT_PROMPTS),
        task.documents,
        [f"documents[{number}]" for number in range(len(task.documents))],
        truncate=task.truncate,
    )


def _prompt(facts: TaskFacts, names: Sequence[str]) -> str:
    for name in (*names, facts.default_prompt_name):
        if name in facts.prompts:
            return facts.prompts[name]
    return ""


def _read(documents: int, top_n: int | None, data: bytes) -> Ranking:
    numbers = floats(data, documents)
    order = sorted(range(documents), key=numbers.__getitem__, reverse=True)
    return Ranking([(index, numbers[index]) for index in order[:top_n]])

"""The tasks beside generation, for code without an event loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Unpack

from treadle.client.answer import BatchItem
from treadle.client.async_client import AsyncClient
from treadle.client.batch import Items
from treadle.client.loop_thread import LoopThread
from treadle.client.source_thread import on_a_loop
from treadle.client.task_answer import Classifications, Embeddings, Ranking, Scores, TaggedTexts
from treadle.client.task_methods import TASK_WINDOW
from treadle.client.task_request import (
    ClassifyOptions,
    ClassifyRequest,
    EmbedOptions,
    EmbedRequest,
    RerankOptions,
    RerankRequest,
    Scored,
    ScoreRequest,
    TagOptions,
    TagRequest,
    TaskOptions,
    Text,
    Texts,
)


class SyncTaskMethods:
    """The tasks of AsyncClient; a stream is a plain iterator.

    What it is fed from may wait, and may ask this same client: it is taken in a thread of its own.
    """

    _client: AsyncClient
    _loop: LoopThread

    def embed(self, texts: Texts, **options: Unpack[EmbedOptions]) -> Embeddings:
        """One vector a text, in one request."""
        return self._loop.run(self._client.embed(texts, **options))

    def classify(self, texts: Texts, **options: Unpack[ClassifyOptions]) -> Classifications:
        """The labels of each text or pair, in one request."""
        return self._loop.run(self._client.classify(texts, **options))

    def tag(self, texts: Texts, **options: Unpack[TagOptions]) -> TaggedTexts:
        """The labelled spans of each text, in one request."""
        return self._loop.run(self._client.tag(texts, **options))

    def rerank(self, query: str, documents: Sequence[str], **options: Unpack[RerankOptions]) -> Ranking:
        """The documents by their relevance to the query, best first."""
        return self._loop.run(self._client.rerank(query, documents, **options))

    def score(self, inputs: Iterable[Scored], **options: Unpack[TaskOptions]) -> Scores:
        """The log-probability of each continuation after its context, in one request."""
        return self._loop.run(self._client.score(inputs, **options))

    def embed_stream(
        self, items: Items[Text | EmbedRequest], *, window: int = TASK_WINDOW, **options: Unpack[EmbedOptions]
    ) -> Iterator[BatchItem[Embeddings]]:
        """An outcome an item, in their order; see AsyncClient."""
        return self._loop.iterate(self._client.embed_stream(on_a_loop(items), window=window, **options))

    def classify_stream(
        self,
        items: Items[Text | ClassifyRequest],
        *,
        window: int = TASK_WINDOW,
        **options: Unpack[ClassifyOptions],
    ) -> Iterator[BatchItem[Classifications]]:
        """As `embed_stream`."""
        return self._loop.iterate(self._client.classify_stream(on_a_loop(items), window=window, **options))

    def tag_stream(
        self, items: Items[Text | TagRequest], *, window: int = TASK_WINDOW, **options: Unpack[TagOptions]
    ) -> Iterator[BatchItem[TaggedTexts]]:
        """As `embed_stream`."""
        return self._loop.iterate(self._client.tag_stream(on_a_loop(items), window=window, **options))

    def rerank_stream(
        self, items: Items[RerankRequest], *, window: int = TASK_WINDOW
    ) -> Iterator[BatchItem[Ranking]]:
        """As `embed_stream`."""
        return self._loop.iterate(self._client.rerank_stream(on_a_loop(items), window=window))

    def score_stream(
        self,
        items: Items[Scored | ScoreRequest],
        *,
        window: int = TASK_WINDOW,
        **options: Unpack[TaskOptions],
    ) -> Iterator[BatchItem[Scores]]:
        """As `embed_stream`."""
        return self._loop.iterate(self._client.score_stream(on_a_loop(items), window=window, **options))

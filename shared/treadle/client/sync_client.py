"""The same client for code without an event loop: each call runs on a loop in a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Unpack

from treadle.client.answer import Answer, BatchItem, Chunk, Prompt, ServedModel
from treadle.client.async_client import AsyncClient
from treadle.client.batch import Items
from treadle.client.inference_connection import DEFAULT_ADDRESS
from treadle.client.loop_thread import LoopThread
from treadle.client.request import GenerationOptions, GenerationRequest
from treadle.client.source_thread import on_a_loop
from treadle.client.stream import AnswerStream
from treadle.client.sync_tasks import SyncTaskMethods
from treadle.security import Credentials


class SyncAnswerStream:
    """An AnswerStream to iterate without an event loop; closing it early cancels the request."""

    def __init__(self, stream: AnswerStream, loop: LoopThread) -> None:
        self._stream = stream
        self._loop = loop

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = self._loop.run(self._next())
        if chunk is None:
            raise StopIteration
        return chunk

    async def _next(self) -> Chunk | None:
        return await anext(self._stream, None)

    def __enter__(self) -> SyncAnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drops the connection; nothing more comes."""
        self._loop.run(self._stream.aclose())

    @property
    def request_id(self) -> str:
        """The request's id, for `attach` and `cancel`."""
        return self._stream.request_id

    @property
    def prompt(self) -> Prompt | None:
        """The prompt's facts, from the first chunk on."""
        return self._stream.prompt

    @property
    def answer(self) -> Answer:
        """The whole answer; raises FailedPrecondition before the stream's end."""
        return self._stream.answer

    @property
    def cursor(self) -> str:
        """After the last chunk that was received."""
        return self._stream.cursor


class Client(SyncTaskMethods):
    """Asks a gateway; see AsyncClient, whose methods these are. Safe to use from several threads."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        model: str = "",
        tenant: str = "",
        timeout_s: float = 600.0,
        reconnects: int = 6,
        credentials: Credentials | None = None,
    ) -> None:
        """`model`, `tenant` and `timeout_s` hold for requests that do not say their own."""
        self._client = AsyncClient(
            address,
            model=model,
            tenant=tenant,
            timeout_s=timeout_s,
            reconnects=reconnects,
            credentials=credentials,
        )
        self._loop = LoopThread()
        self._closed = False

    @property
    def address(self) -> str:
        """ "host:port" of the gateway."""
        return self._client.address

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel and ends the thread."""
        if not self._closed:
            self._closed = True
            self._loop.run(self._client.close())
            self._loop.close()

    def generate(self, prompt: str | None = None, **options: Unpack[GenerationOptions]) -> Answer:
        """Runs one request to its end. `options` are the fields of GenerationRequest."""
        return self._loop.run(self._client.generate(prompt, **options))

    def stream(self, prompt: str | None = None, **options: Unpack[GenerationOptions]) -> SyncAnswerStream:
        """Streams one answer: iterate over it for chunks."""
        return SyncAnswerStream(self._client.stream(prompt, **options), self._loop)

    def attach(self, request_id: str, cursor: str = "", *, tenant: str = "") -> SyncAnswerStream:
        """Picks up a request's chunks after `cursor`, or from its start."""
        return SyncAnswerStream(self._client.attach(request_id, cursor, tenant=tenant), self._loop)

    def cancel(self, request_id: str, *, tenant: str = "") -> bool:
        """Ends a request wherever it is; False when it had ended before."""
        return self._loop.run(self._client.cancel(request_id, tenant=tenant))

    def batch(self, requests: Items[GenerationRequest], *, window: int = 256) -> Iterator[BatchItem[Answer]]:
        """Runs many requests; yields each outcome when it is ready, in any order."""
        return self._loop.iterate(self._client.batch(on_a_loop(requests), window=window))

    def models(self) -> list[ServedModel]:
        """What can be asked for now."""
        return self._loop.run(self._client.models())

"""The same client for code without an event loop: each call runs on a loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from types import TracebackType
from typing import Any, TypeVar, Unpack

from treadle.client.answer import Answer, BatchItem, Chunk, Prompt, ServedModel
from treadle.client.async_client import DEFAULT_ADDRESS, AsyncClient
from treadle.client.batch import Requests
from treadle.client.request import GenerationOptions
from treadle.client.stream import AnswerStream
from treadle.security import Credentials

_T = TypeVar("_T")
_UNWIND_S = 2.0


class _LoopThread:
    """An event loop in a thread; `run` waits for a coroutine, and cancels it when interrupted."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="treadle-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()
        ended = threading.Event()
        task: asyncio.Task[None] | None = None

        async def finish() -> None:
            try:
                outcome.set_result(await coroutine)
            except BaseException as error:
                outcome.set_exception(error)

        def start() -> None:
            nonlocal task
            task = self._loop.create_task(finish())
            task.add_done_callback(close)

        def stop() -> None:
            if task is None:
                close()
            else:
                task.cancel()

        def close(_: object = None) -> None:
            coroutine.close()  # one that was cancelled before its first step never ran
            ended.set()

        # An interrupt may come at any instruction, also as the loop is being told to start.
        try:
            self._loop.call_soon_threadsafe(start)
            return outcome.result()
        except BaseException:
            # An interrupted generator must have unwound before anybody closes it.
            self._loop.call_soon_threadsafe(stop)
            ended.wait(_UNWIND_S)
            raise

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SyncAnswerStream:
    """An AnswerStream to iterate without an event loop; closing it early cancels the request."""

    def __init__(self, stream: AnswerStream, loop: _LoopThread) -> None:
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


class Client:
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
        self._loop = _LoopThread()
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

    def batch(self, requests: Requests, *, window: int = 256) -> Iterator[BatchItem]:
        """Runs many requests; yields each outcome when it is ready, in any order."""
        outcomes = self._client.batch(requests, window=window)

        async def following(items: AsyncIterator[BatchItem]) -> BatchItem | None:
            return await anext(items, None)

        try:
            while (item := self._loop.run(following(outcomes))) is not None:
                yield item
        finally:
            self._loop.run(outcomes.aclose())

    def models(self) -> list[ServedModel]:
        """What can be asked for now."""
        return self._loop.run(self._client.models())

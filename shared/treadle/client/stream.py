"""A stream of one answer that outlives its connection.

The request's log lies with the suite, and every chunk carries a cursor into it. When the connection is
lost, the stream attaches again after the last chunk that it received, through whichever gateway the
channel finds: no token is doubled, none is lost.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Protocol

import grpc

from treadle.api.inference.v1 import generation_pb2
from treadle.client.answer import Answer, Chunk, Prompt
from treadle.client.convert import answer_from_chunks, chunk_from_proto, prompt_from_proto
from treadle.client.reconnect import Reconnects
from treadle.errors import DataLoss, FailedPrecondition


class ChunkCall(Protocol):
    """A call of GenerateStream or of Attach: both answer with messages that hold a chunk."""

    def __aiter__(self) -> AsyncIterator[ChunkResponse]: ...

    def cancel(self) -> bool: ...


class ChunkResponse(Protocol):
    """What both calls answer with."""

    @property
    def chunk(self) -> generation_pb2.GenerateChunk: ...


class AnswerStream:
    """Iterates over an answer's chunks; `prompt` is there from the first, `answer` after the last.

    Leaving the block of `async with`, or `aclose`, before the end drops the connection, which cancels the
    request unless it was asked with `detach`.
    """

    def __init__(
        self, request_id: str, open_call: Callable[[str, float], ChunkCall], reconnects: Reconnects
    ) -> None:
        """`open_call(cursor, timeout_s)` opens a call that goes on after the cursor ("": from the start)."""
        self.request_id = request_id
        self.prompt: Prompt | None = None
        self.cursor = ""
        """After the last chunk that was received."""
        self._open_call = open_call
        self._reconnects = reconnects
        self._received: list[Chunk] = []
        self._next_index: dict[int, int] = {}
        self._starts_at_zero = True
        self._answer: Answer | None = None
        self._chunks = self._iterate()

    @property
    def answer(self) -> Answer:
        """The whole answer; raises FailedPrecondition before the stream's end."""
        if self._answer is None:
            raise FailedPrecondition("the answer is complete only after the stream's last chunk")
        return self._answer

    @property
    def reconnections(self) -> int:
        """How often the connection was lost and found again."""
        return self._reconnects.total

    def resume_after(self, cursor: str) -> AnswerStream:
        """Starts after a chunk that somebody received before; only before the first chunk."""
        self.cursor = cursor
        self._starts_at_zero = not cursor
        return self

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> Chunk:
        return await self._chunks.__anext__()

    async def aclose(self) -> None:
        """Drops the connection; nothing more comes."""
        await self._chunks.aclose()

    async def __aenter__(self) -> AnswerStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def collect(self) -> Answer:
        """Reads to the end and gives the whole answer."""
        async for _ in self:
            pass
        return self.answer

    async def _iterate(self) -> AsyncGenerator[Chunk, None]:
        finished: generation_pb2.Finished | None = None
        while True:
            call = self._open_call(self.cursor, self._reconnects.left_s())
            try:
                async for response in call:
                    self._reconnects.progress()
                    self.cursor = response.chunk.cursor
                    kind = response.chunk.WhichOneof("chunk")
                    if kind == "tokens":
                        yield self._accept(response.chunk)
                    elif kind == "started":
                        self.prompt = prompt_from_proto(response.chunk.started)
                    elif kind == "finished":
                        finished = response.chunk.finished
            except grpc.aio.AioRpcError as error:
                if finished is None:
                    await self._reconnects.pause(error)
                    continue
            finally:
                call.cancel()
            if finished is None:
                raise DataLoss("the stream ended before the answer did", reason="STREAM_INCOMPLETE")
            prompt = self.prompt or Prompt(
                self.request_id, "", "", finished.usage.prompt_tokens, finished.usage.cached_tokens, 0, ""
            )
            self._answer = answer_from_chunks(prompt, self._received, finished)
            return

    def _accept(self, message: generation_pb2.GenerateChunk) -> Chunk:
        """The chunk, having checked that it goes on where the one before ended."""
        chunk = chunk_from_proto(message.tokens, message.cursor)
        expected = self._next_index.get(chunk.choice, 0 if self._starts_at_zero else chunk.index)
        if chunk.index != expected:
            raise DataLoss(
                f"token {expected} of choice {chunk.choice} was to come next, but {chunk.index} came",
                reason="TOKENS_OUT_OF_ORDER",
            )
        self._next_index[chunk.choice] = chunk.index + len(chunk.token_ids)
        self._received.append(chunk)
        return chunk

"""What one client of the gateway was told, chunk by chunk, and the check that it is a whole answer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from treadle.api.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from treadle.errors import TreadleError
from treadle.rpc import from_rpc_error

TIMEOUT_S = 240.0


class ChunkResponse(Protocol):
    @property
    def chunk(self) -> generation_pb2.GenerateChunk: ...


@dataclass(frozen=True)
class Told:
    """A whole answer; two of the same request are equal, whatever happened on the way."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: int
    stop_string: str
    prompt_tokens: int
    output_tokens: int


@dataclass
class Record:
    """Everything that one client received, in its order."""

    chunks: list[generation_pb2.GenerateChunk] = field(default_factory=list)
    error: TreadleError | None = None
    longest_gap_s: float = 0.0
    """The longest time without news, from the call on."""

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return sum(len(chunk.tokens.token_ids) for chunk in self.chunks)

    @property
    def cursor(self) -> str:
        """Of the last chunk."""
        return self.chunks[-1].cursor if self.chunks else ""

    async def listen(self, call: AsyncIterator[ChunkResponse]) -> Record:
        """Takes down a call to its end, be it a bad one."""
        heard_at = time.monotonic()
        try:
            async for response in call:
                now = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now - heard_at)
                heard_at = now
                self.chunks.append(response.chunk)
        except grpc.aio.AioRpcError as error:
            self.error = from_rpc_error(error)
        return self

    def told(self) -> Told:
        """The answer, after the check: started, every index once and in order, finished, nothing else."""
        assert self.error is None, f"it failed after {self.num_tokens} tokens: {self.error!r}"
        kinds = [chunk.WhichOneof("chunk") for chunk in self.chunks]
        assert kinds[0] == "started", kinds[:3]
        assert kinds[-1] == "finished", kinds[-3:]
        assert set(kinds[1:-1]) <= {"tokens"}
        assert len({chunk.cursor for chunk in self.chunks}) == len(self.chunks)
        token_ids: list[int] = []
        for chunk in self.chunks[1:-1]:
            assert chunk.tokens.index == len(token_ids)
            token_ids += chunk.tokens.token_ids
        finished = self.chunks[-1].finished
        choice, usage = finished.choices[0], finished.usage
        assert usage.output_tokens == len(token_ids)
        assert usage.prompt_tokens == self.chunks[0].started.prompt_tokens
        return Told(
            tuple(token_ids),
            "".join(chunk.tokens.text for chunk in self.chunks[1:-1]),
            choice.finish_reason,
            choice.stop_string,
            usage.prompt_tokens,
            usage.output_tokens,
        )


def own_channel(address: str) -> grpc.aio.Channel:
    """A connection that no other client shares: channels of one process share them otherwise."""
    return grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])


def start(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, asked: generation_pb2.Generation
) -> AsyncIterator[ChunkResponse]:
    """A call of GenerateStream."""
    request = inference_pb2.GenerateStreamRequest(generation=asked)
    return stub.GenerateStream(request, timeout=TIMEOUT_S)


def attach(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, asked: generation_pb2.Generation, cursor: str = ""
) -> AsyncIterator[ChunkResponse]:
    """A call of Attach."""
    request = inference_pb2.AttachRequest(tenant=asked.tenant, request_id=asked.request_id, cursor=cursor)
    return stub.Attach(request, timeout=TIMEOUT_S)


async def undisturbed(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, asked: generation_pb2.Generation
) -> Told:
    """The request's answer when nothing happens, under an id of its own."""
    alone = generation_pb2.Generation()
    alone.CopyFrom(asked)
    alone.request_id = ""
    return (await Record().listen(start(stub, alone))).told()

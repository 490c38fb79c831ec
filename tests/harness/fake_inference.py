"""A gateway and a tokenizer in this process that answer tasks by rules a test can compute itself."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import struct
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from treadle.api.inference.v1 import inference_pb2 as pb
from treadle.api.inference.v1 import inference_pb2_grpc
from treadle.api.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from treadle.errors import (
    Cancelled,
    FailedPrecondition,
    ResourceExhausted,
    TreadleError,
    Unavailable,
    invalid_field,
)
from treadle.rpc import RpcServer, to_status

WIDTH = 8
BOS = 256
MODELS = {
    "minilm": ["embed", "rerank"],
    "sst": ["classify"],
    "ner": ["tag"],
    "gpt": ["generate", "score"],
}
INFERENCE = "treadle.api.inference.v1.InferenceService"
TOKENIZER = "treadle.api.tokenizer.v1.TokenizerService"


def vector_of(text: str, width: int = WIDTH) -> list[float]:
    """A text's vector, of length 1, as float32 has it."""
    raw = [byte / 255 - 0.5 for byte in hashlib.sha256(text.encode()).digest()[:width]]
    length = math.sqrt(math.fsum(number * number for number in raw))
    return list(struct.unpack(f"<{width}f", struct.pack(f"<{width}f", *(n / length for n in raw))))


def logprob_of(before: int, token: int) -> float:
    """A token's log-probability after the one before it."""
    return -(1 + (7 * before + 3 * token) % 16) / 8


def positive(text: str) -> float:
    """The probability of the label "POSITIVE"."""
    return hashlib.sha256(text.encode()).digest()[0] / 256


@dataclass
class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """Every model of MODELS; a text with "BAD" is refused, one with "FULL" as often as `num_full` says.

    A call loses its connection after as many items as the next of `losses` says. `hold_after` items are
    answered in all, then none until `released`. A request that was read on a call that it then lost, and not
    answered, is cancelled: whoever asks for it again is told so.
    """

    losses: list[int] = field(default_factory=list)
    drains: list[int] = field(default_factory=list)
    """As `losses`, but the call lasts, and its further items are told to go elsewhere."""
    num_lost: int = 0
    """How many calls of one request each are lost, and their requests cancelled."""
    num_full: int = 0
    hold_after: int | None = None
    released: asyncio.Event = field(default_factory=asyncio.Event)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    computed: Counter[str] = field(default_factory=Counter)
    """How often each request was asked, by its id."""
    sizes: list[int] = field(default_factory=list)
    """The inputs of each request that was asked."""
    cancelled: set[str] = field(default_factory=set)
    num_calls: int = 0
    num_answered: int = 0

    def _check(self, task: str, request: Any, texts: list[str]) -> dict[str, str]:
        self.computed[request.context.request_id] += 1
        self.sizes.append(len(texts))
        able = MODELS.get(request.context.model)
        if able is None or task not in able:
            raise FailedPrecondition(
                f"{request.context.model!r} cannot {task}; it can {able}", reason="TASK_NOT_SUPPORTED"
            )
        for index, text in enumerate(texts):
            if not text or "BAD" in text:
                raise invalid_field(f"inputs[{index}].text", "must not be empty or bad")
            if "FULL" in text and self.num_full > 0:
                self.num_full -= 1
                raise ResourceExhausted("the lane is full", reason="LANE_FULL", retry_after_s=0.01)
        return {"artifact_digest": f"sha256:{request.context.model}", "profile": "p"}

    def _embed(self, request: Any) -> Any:
        texts = [one.text for one in request.inputs]
        facts = self._check("embed", request, texts)
        width = request.dimensions or WIDTH
        numbers = [number for text in texts for number in vector_of(text)[:width]]
        tensor = pb.Tensor(
            shape=[len(texts), width], dtype="F32", data=struct.pack(f"<{len(numbers)}f", *numbers)
        )
        return pb.EmbedResponse(embeddings=tensor, prompt_tokens=_words(texts), **facts)

    def _classify(self, request: Any) -> Any:
        texts = [one.text + one.pair for one in request.inputs]
        facts = self._check("classify", request, texts)
        found = []
        for text in texts:
            labels = [("POSITIVE", positive(text)), ("NEGATIVE", 1 - positive(text))]
            labels.sort(key=lambda pair: -pair[1])
            scores = [{"label": label, "score": score} for label, score in labels]
            found.append(pb.Classification(labels=scores[: request.top_k or None]))
        return pb.ClassifyResponse(classifications=found, prompt_tokens=_words(texts), **facts)

    def _tag(self, request: Any) -> Any:
        texts = [one.text for one in request.inputs]
        facts = self._check("tag", request, texts)
        found = []
        for text in texts:
            place, spans = 0, []
            for word in text.split():
                start = text.index(word, place)
                place = start + len(word)
                if word[0].isupper():
                    spans.append({"start": start, "end": place, "label": "NAME", "score": 0.75})
            found.append(pb.TaggedText(spans=spans))
        return pb.TagResponse(texts=found, prompt_tokens=_words(texts), **facts)

    def _rerank(self, request: Any) -> Any:
        facts = self._check("rerank", request, [request.query, *request.documents])
        query = set(request.query.split())
        scores = [len(query & set(document.split())) for document in request.documents]
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n or None]
        ranked = [{"index": index, "score": scores[index]} for index in best]
        return pb.RerankResponse(documents=ranked, prompt_tokens=_words(request.documents), **facts)

    def _score(self, request: Any) -> Any:
        inputs = [(_ids_of(one, "context"), _ids_of(one, "continuation")) for one in request.inputs]
        facts = self._check("score", request, [one.continuation or "ids" for one in request.inputs])
        scores = []
        for context, continuation in inputs:
            before = [*(context or [BOS])[-1:], *continuation]
            logprobs = [logprob_of(*pair) for pair in zip(before, continuation, strict=False)]
            scores.append(
                pb.ContinuationScore(
                    token_ids=continuation, logprobs=logprobs, total_logprob=math.fsum(logprobs)
                )
            )
        read = sum(len(context) + len(continuation) for context, continuation in inputs)
        return pb.ScoreResponse(scores=scores, prompt_tokens=read, **facts)

    def _alone(self, request: Any, answer: Any) -> Any:
        request_id = request.context.request_id
        if self.num_lost > 0:
            self.num_lost -= 1
            self.cancelled.add(request_id)
            raise Unavailable("the connection is lost")
        if request_id in self.cancelled:
            raise Cancelled("the client went away")
        return answer(request)

    async def Embed(self, request, context):
        return self._alone(request, self._embed)

    async def Classify(self, request, context):
        return self._alone(request, self._classify)

    async def Tag(self, request, context):
        return self._alone(request, self._tag)

    async def Rerank(self, request, context):
        return self._alone(request, self._rerank)

    async def Score(self, request, context):
        return self._alone(request, self._score)

    async def _stream(self, requests: Any, answer: Any, kind: Any) -> AsyncIterator[Any]:
        self.num_calls += 1
        allowed = self.losses.pop(0) if self.losses else None
        drained = self.drains.pop(0) if self.drains else None
        index = 0
        async for item in requests:
            request_id = item.request.context.request_id
            if index == allowed:
                self.cancelled.add(request_id)
                raise Unavailable("the gateway drains", reason="DRAINING", retry_after_s=0.01)
            if self.num_answered == self.hold_after:
                self.held.set()
                await self.released.wait()
            response = kind(index=index, request_id=request_id)
            try:
                if request_id in self.cancelled:
                    raise Cancelled("the client went away")
                if drained is not None and index >= drained:
                    raise Unavailable("the gateway stops", reason="DRAINING", retry_after_s=0.01)
                response.response.CopyFrom(answer(item.request))
            except TreadleError as error:
                response.error.CopyFrom(to_status(error))
            yield response
            self.num_answered += 1
            index += 1

    async def EmbedStream(self, request_iterator, context):
        async for response in self._stream(request_iterator, self._embed, pb.EmbedStreamResponse):
            yield response

    async def ClassifyStream(self, request_iterator, context):
        async for response in self._stream(request_iterator, self._classify, pb.ClassifyStreamResponse):
            yield response

    async def TagStream(self, request_iterator, context):
        async for response in self._stream(request_iterator, self._tag, pb.TagStreamResponse):
            yield response

    async def RerankStream(self, request_iterator, context):
        async for response in self._stream(request_iterator, self._rerank, pb.RerankStreamResponse):
            yield response

    async def ScoreStream(self, request_iterator, context):
        async for response in self._stream(request_iterator, self._score, pb.ScoreStreamResponse):
            yield response

    async def ListModels(self, request, context):
        models = [
            pb.ServedModel(
                model=name, artifact_digest=f"sha256:{name}", ready_workers=1, tasks=tasks, max_model_len=64
            )
            for name, tasks in MODELS.items()
        ]
        return pb.ListModelsResponse(models=models)


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """A token a byte; special tokens are BOS at the beginning, where `bos` says so."""

    def __init__(self, *, bos: bool = True) -> None:
        self.bos = bos

    async def Encode(self, request, context):
        special = [BOS] if self.bos and request.add_special_tokens else []
        return tokenizer_pb2.EncodeResponse(
            tokenizer_digest="sha256:bytes",
            encodings=[{"ids": special + list(one.text.encode())} for one in request.inputs],
        )

    async def Decode(self, request, context):
        texts = [bytes(i for i in one.ids if i < BOS).decode(errors="replace") for one in request.inputs]
        return tokenizer_pb2.DecodeResponse(tokenizer_digest="sha256:bytes", texts=texts)


@contextlib.asynccontextmanager
async def serving(inference: FakeInference, tokenizer: FakeTokenizer | None = None) -> AsyncIterator[str]:
    """Both on one loopback port: "host:port"."""
    server = RpcServer("127.0.0.1:0")
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, inference, INFERENCE)
    server.add(
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server, tokenizer or FakeTokenizer(), TOKENIZER
    )
    async with server.running(0.1):
        await server.set_ready(True)
        try:
            yield f"127.0.0.1:{server.port}"
        finally:
            inference.released.set()


def _words(texts: Any) -> int:
    return sum(len(text.split()) for text in texts)


def _ids_of(one: Any, name: str) -> list[int]:
    ids = getattr(one, f"{name}_token_ids").ids
    return list(ids) or list(getattr(one, name).encode())

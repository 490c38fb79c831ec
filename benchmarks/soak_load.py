"""Short requests of every kind, a third of them cancelled at random moments."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc

from treadle.api.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from treadle.rpc import from_rpc_error

BATCH = 8
"""Items of one BatchGenerate; each counts as a request."""
JOBS_A_CONNECTION = 20
"""After so many jobs a client leaves and another one comes."""
TIMEOUT_S = 300.0
_LONG = 256
"""Tokens asked for where the request is to be cancelled: it cannot end before."""

Kind = Literal["generate", "stream", "chat", "batch"]
Cut = Literal["", "client", "rpc"]
"""Who ends the request before its time: nobody, its client by going away, or a call of Cancel."""

WORDS = (
    "loom thread weaver river city red blue seven quickly slowly under over because and the a of to with "
    "morning evening stone glass winter summer small large open closed north south paper silver"
).split()


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    ended: Counter[str] = field(default_factory=Counter)
    """Complete answers, by kind."""
    cancelled: Counter[str] = field(default_factory=Counter)
    """Cut off before their end, by kind and by whom."""
    tokens: int = 0
    failures: list[str] = field(default_factory=list)
    """Requests that nobody cancelled and that did not end well, and answers that are wrong."""

    @property
    def done(self) -> int:
        """Requests of which it is known what became of them."""
        return self.ended.total() + self.cancelled.total() + len(self.failures)


@dataclass(frozen=True, slots=True)
class Job:
    """One call: `size` requests, all of them cancelled or none."""

    kind: Kind
    cut: Cut
    seed: int

    @property
    def size(self) -> int:
        """Requests in it."""
        return BATCH if self.kind == "batch" else 1


def jobs(count: int, seed: int) -> Iterator[Job]:
    """Jobs of `count` requests together (a few more where the last is a batch), a third of them to be cut."""
    rng = random.Random(seed)
    issued = cut = 0
    while issued < count:
        kind: Kind = rng.choices(("generate", "stream", "chat", "batch"), (36, 36, 18, 3))[0]
        size = BATCH if kind == "batch" else 1
        # Evened out, so that every stretch of the load has its third.
        wanted = cut + size <= (issued + size) / 3 + rng.uniform(-BATCH, BATCH)
        by: Cut = "" if not wanted else "client" if kind == "batch" else rng.choice(("client", "rpc"))
        issued += size
        cut += size if by else 0
        yield Job(kind, by, rng.getrandbits(32))


class Load:
    """Runs jobs against a gateway, so many at once."""

    def __init__(self, address: str, *, model: str = "smollm2", concurrency: int = 48) -> None:
        self.tally = Tally()
        self._address = address
        self._model = model
        self._concurrency = concurrency

    async def run(self, todo: Iterator[Job]) -> None:
        """Returns when every job's end is known."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._client(todo))

    async def _client(self, todo: Iterator[Job]) -> None:
        more = True
        while more:
            # A connection of its own: channels of one process share them otherwise.
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(self._address, options=options) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                for _ in range(JOBS_A_CONNECTION):
                    if (job := next(todo, None)) is None:
                        more = False
                        break
                    await self._one(stub, job)

    async def _one(self, stub: inference_pb2_grpc.InferenceServiceAsyncStub, job: Job) -> None:
        rng = random.Random(job.seed)
        run: Callable[[Any, Job, random.Random], Awaitable[None]] = {
            "generate": self._generate,
            "stream": self._stream,
            "chat": self._stream,
            "batch": self._batch,
        }[job.kind]
        try:
            await run(stub, job, rng)
        except grpc.aio.AioRpcError as error:
            if job.cut and error.code() is grpc.StatusCode.CANCELLED:
                self._cancelled(job)
            else:
                known = from_rpc_error(error)
                self.tally.failures.append(f"{job}: {known.code} {known.reason}: {known.message}")

    def _cancelled(self, job: Job) -> None:
        self.tally.cancelled[f"{job.kind} by {job.cut}"] += 1

    def _asked(self, job: Job, rng: random.Random) -> generation_pb2.Generation:
        """Few words and few tokens, with any of the options."""
        text = " ".join(
            rng.choices(WORDS, k=rng.randint(2, 12) if rng.random() < 0.98 else rng.randint(60, 120))
        )
        asked = generation_pb2.Generation(
            model=self._model,
            request_id=f"soak-{uuid.UUID(int=rng.getrandbits(128))}" if job.cut or rng.random() < 0.5 else "",
            sampling=rng.choice(
                (
                    {"temperature": 0.0},
                    {"temperature": 0.8, "top_p": 0.9},
                    {"temperature": 1.0, "top_k": 40, "seed": job.seed},
                    {"temperature": 0.7, "repetition_penalty": 1.1, "logit_bias": {11: -1.0}},
                )
            ),
            stopping={"max_new_tokens": _LONG if job.cut else rng.randint(1, 6), "ignore_eos": bool(job.cut)},
            output={"logprobs": 2} if rng.random() < 0.2 else {},
        )
        if not job.cut and rng.random() < 0.1:
            asked.stopping.stop_strings.append(rng.choice(("e", "the", "\n")))
        if job.kind == "chat":
            asked.chat.messages.add(role="user", content=text)
        elif rng.random() < 0.25:
            asked.text = f"The same beginning, which many requests share word by word for some while: {text}"
        else:
            asked.text = text
        return asked

    async def _generate(self, stub: Any, job: Job, rng: random.Random) -> None:
        asked = self._asked(job, rng)
        call = stub.Generate(inference_pb2.GenerateRequest(generation=asked), timeout=TIMEOUT_S)
        if job.cut:
            await self._cut_after(rng.uniform(0, 1.5), call, stub, asked.request_id, job)
            return
        answer = await call
        self._check(job, asked, answer.choices[0].token_ids, answer.usage)

    async def _cut_after(self, pause_s: float, call: Any, stub: Any, request_id: str, job: Job) -> None:
        """Cancels a unary call that runs; raises what it ended with."""
        waiting = asyncio.ensure_future(_settled(call))
        await asyncio.wait({waiting}, timeout=pause_s)
        if job.cut == "client":
            call.cancel()
        else:
            await _cancel(stub, request_id)
        code = await waiting
        if code is grpc.StatusCode.CANCELLED:
            self._cancelled(job)
        else:
            self.tally.failures.append(f"{job}: was to be cancelled and ended with {code}")

    async def _stream(self, stub: Any, job: Job, rng: random.Random) -> None:
        asked = self._asked(job, rng)
        call = stub.GenerateStream(inference_pb2.GenerateStreamRequest(generation=asked), timeout=TIMEOUT_S)
        after = rng.randint(0, 5) if job.cut else -1
        ids: list[int] = []
        usage = None
        chunks = 0
        if after == 0:
            await asyncio.sleep(rng.uniform(0, 0.5))
            if await self._cut(call, stub, asked.request_id, job):
                return
        async for response in call:
            chunks += 1
            kind = response.chunk.WhichOneof("chunk")
            if kind == "tokens":
                if response.chunk.tokens.index != len(ids):
                    self.tally.failures.append(f"{job}: index {response.chunk.tokens.index} at {len(ids)}")
                    return
                ids += response.chunk.tokens.token_ids
            elif kind == "finished":
                usage = response.chunk.finished.usage
            if chunks == after and await self._cut(call, stub, asked.request_id, job):
                return
        if job.cut:
            self.tally.failures.append(f"{job}: was to be cancelled and ended well")
        else:
            self._check(job, asked, ids, usage)

    async def _cut(self, call: Any, stub: Any, request_id: str, job: Job) -> bool:
        """Cancels a stream; True where that was its end, False where the suite is to say so."""
        if job.cut == "rpc":
            await _cancel(stub, request_id)
            return False
        call.cancel()
        self._cancelled(job)
        return True

    async def _batch(self, stub: Any, job: Job, rng: random.Random) -> None:
        items = [self._asked(job, rng) for _ in range(BATCH)]

        async def requests() -> AsyncIterator[inference_pb2.BatchGenerateRequest]:
            for item in items:
                yield inference_pb2.BatchGenerateRequest(generation=item)

        call = stub.BatchGenerate(requests(), timeout=TIMEOUT_S)
        if job.cut:
            await asyncio.sleep(rng.uniform(0, 1.5))
            call.cancel()
            self.tally.cancelled[f"batch by {job.cut}"] += BATCH
            return
        answered = 0
        try:
            async for response in call:
                answered += 1
                if response.HasField("error"):
                    self.tally.failures.append(f"{job}: {response.error}")
                    continue
                answer = response.response
                self._check(job, items[response.index], answer.choices[0].token_ids, answer.usage)
        finally:
            if answered < BATCH:
                lost = f"{job}: {BATCH - answered} items without an answer"
                self.tally.failures += [lost] * (BATCH - answered)

    def _check(self, job: Job, asked: generation_pb2.Generation, ids: Any, usage: Any) -> None:
        """A complete answer has as many tokens as it says, and no more than were asked for."""
        if (
            usage is None
            or usage.output_tokens != len(ids)
            or not 0 < len(ids) <= asked.stopping.max_new_tokens
        ):
            self.tally.failures.append(f"{job}: {len(ids)} tokens, usage {usage}")
            return
        self.tally.ended[job.kind] += 1
        self.tally.tokens += len(ids)


async def _settled(call: Any) -> grpc.StatusCode:
    """How a unary call ended; raises nothing."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.OK


async def _cancel(stub: Any, request_id: str) -> None:
    """Cancels a request by its id; before it is queued there is nothing to cancel yet, so it asks again."""
    while True:
        try:
            await stub.Cancel(inference_pb2.CancelRequest(request_id=request_id), timeout=TIMEOUT_S)
            return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            await asyncio.sleep(0.02)

"""What does the tokenizer service add to the library it is made of? 1,000 prompts, until their ids are there.

A client in this process sends them to a tokenizer process over gRPC, in requests of 64 with four on their
way, and reads the ids out of the answers; the bare library encodes the same prompts in this process
(encode_batch, all cores) and its ids are read, too. They take turns. Prompts are cut from a text, 16 to 512
words each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence

from harness import models
from harness.prompts import default_text
from harness.rows import against
from harness.script import Record, run
from tokenizers import Tokenizer

from treadle.api.tokenizer.v1 import tokenizer_pb2 as pb
from treadle.api.tokenizer.v1 import tokenizer_pb2_grpc
from treadle.local import Home
from treadle.local.ports import free_ports
from treadle.process import child_command
from treadle.rpc import open_channel

PROMPTS, QUICK_PROMPTS = 1_000, 128
REQUEST = 64
IN_FLIGHT = 4
_WORDS = (16, 512)
_TIMEOUT_S = 60.0


def measure(record: Record) -> None:
    """Service and library take turns over the same prompts, others in every turn."""
    asyncio.run(_measure(record))


async def _measure(record: Record) -> None:
    options = record.options
    count = QUICK_PROMPTS if options.quick else PROMPTS
    backend = Tokenizer.from_file(str(models.folder() / "tokenizer.json"))
    ours: list[float] = []
    bare: list[float] = []
    async with _running() as stub:
        for turn in ("warm-up", *range(options.runs)):
            prompts = _prompts(turn, count)
            begun = time.perf_counter()
            ids = await _by_service(stub, prompts)
            ours.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            expected = [encoding.ids for encoding in backend.encode_batch(prompts)]
            bare.append(time.perf_counter() - begun)
            assert ids == expected, "the service's ids are not the library's"
            tokens = sum(map(len, ids))
    del ours[0], bare[0]
    record.note(f"{count} prompts, {tokens} tokens in the last turn")
    record.runs |= {"service_s": ours, "library_s": bare}
    seconds, library = statistics.median(ours), statistics.median(bare)
    name = f"{count:,} prompts tokenised, s, in requests of {REQUEST}, against the bare library's"
    record.add(against(name, seconds, library, "<= 1.2"))


def _prompts(turn: int | str, count: int) -> list[str]:
    words = default_text().read_text().split(" ")
    places = random.Random(f"{turn}/{count}")
    starts = [(places.randrange(len(words) - _WORDS[1]), places.randint(*_WORDS)) for _ in range(count)]
    return [" ".join(words[start : start + length]) for start, length in starts]


async def _by_service(
    stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub, prompts: Sequence[str]
) -> list[list[int]]:
    free = asyncio.Semaphore(IN_FLIGHT)

    async def encode(start: int) -> list[list[int]]:
        inputs = [pb.EncodeInput(text=text) for text in prompts[start : start + REQUEST]]
        async with free:
            answer = await stub.Encode(
                pb.EncodeRequest(model=models.ALIAS, inputs=inputs), timeout=_TIMEOUT_S
            )
        return [list(encoding.ids) for encoding in answer.encodings]

    answers = await asyncio.gather(*(encode(start) for start in range(0, len(prompts), REQUEST)))
    return [ids for rows in answers for ids in rows]


@contextlib.asynccontextmanager
async def _running() -> AsyncIterator[tokenizer_pb2_grpc.TokenizerServiceAsyncStub]:
    """A tokenizer process and the registry that it asks, once it answers."""
    registry, tokenizer = (f"127.0.0.1:{port}" for port in free_ports(2))
    variables = {
        "TREADLE_REGISTRY_ADDRESS": registry,
        "TREADLE_REGISTRY_METRICS_ADDRESS": "",
        "TREADLE_TOKENIZER_ADDRESS": tokenizer,
        "TREADLE_TOKENIZER_METRICS_ADDRESS": "",
        "TREADLE_STORE": str(Home(models.home()).store),
    }
    async with contextlib.AsyncExitStack() as stack:
        for kind in ("registry", "tokenizer"):
            process = await asyncio.create_subprocess_exec(
                *child_command([sys.executable, "-m", f"treadle_{kind}"]),
                env=os.environ | variables,
                stderr=asyncio.subprocess.DEVNULL,
            )
            stack.push_async_callback(process.wait)
            stack.callback(process.terminate)
        channel = await stack.enter_async_context(open_channel(tokenizer))
        stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)  # type: ignore[assignment]
        request = pb.EncodeRequest(model=models.ALIAS, inputs=[pb.EncodeInput(text="warm")])
        await stub.Encode(request, timeout=_TIMEOUT_S, wait_for_ready=True)
        yield stub


if __name__ == "__main__":
    raise SystemExit(run("tokenizer_cost", __doc__, measure, runs=7))

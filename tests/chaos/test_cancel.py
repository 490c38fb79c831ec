"""Nobody waits for an answer any more: its blocks are free at once, wherever it is, and no other notices."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from functools import partial

import grpc
import pytest
from client_record import Record, own_channel, start, undisturbed
from engine_view import engine_state, until_engine_empty
from google.rpc import code_pb2
from live_streams import begin, keys_of, renamed
from service_process import ServiceProcess
from waiting import until

from treadle.api.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc

BYSTANDERS = 13
SOLO = {
    # Bystanders leave a long prompt two tokens a step.
    "TREADLE_ENGINE_MAX_NUM_BATCHED_TOKENS": "16",
    "TREADLE_WORKER_MAX_CLAIMED": str(BYSTANDERS + 2),
    "TREADLE_WORKER_LEASE_S": "1.5",
}
LONG_PROMPT = 12_000
"""Thousands of steps: it is in prefill until its gateway is known to be dead."""
TO_FREE = "treadle:cancel_to_free_seconds"
BOUND_S = 0.25
"""A step and 100 ms, as a bucket of the metric."""


def times_to_free(worker: ServiceProcess) -> dict[str, float]:
    """The metric's buckets, sum and count."""
    return {name: value for name, value in worker.metrics().items() if name.startswith(TO_FREE)}


@dataclass
class Victim:
    """A request that is to be given up, with a connection of its own."""

    asked: generation_pb2.Generation
    channel: grpc.aio.Channel
    record: Record
    task: asyncio.Task[Record]

    async def leave(self, cause: str) -> None:
        """Its client goes, or cancels it."""
        if cause == "client gone":
            await self.channel.close()
            return
        stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        request = inference_pb2.CancelRequest(request_id=self.asked.request_id)
        assert (await stub.Cancel(request, timeout=10)).cancelled


def begin_victim(address: str, asked: generation_pb2.Generation) -> Victim:
    channel, record = own_channel(address), Record()
    call = start(inference_pb2_grpc.InferenceServiceStub(channel), asked)
    return Victim(asked, channel, record, asyncio.create_task(record.listen(call)))


@pytest.mark.parametrize("cause", ["client gone", "Cancel", "gateway killed"])
async def test_what_nobody_waits_for_frees_its_blocks_at_once(stack, gateways, queue, ask, cause):
    name = cause.replace(" ", "-")
    bystander = ask("Love and time", 6000, "bystander", sampling={"repetition_penalty": 1.2})
    gateway = stack["gateway-1"]
    with stack.workers(1, SOLO) as (worker,):
        expected = await undisturbed(gateways[1], bystander)
        others = begin(
            [gateways[1]], [renamed(bystander, f"{name}-{number}") for number in range(BYSTANDERS)]
        )
        await until(lambda: all(record.num_tokens for record in others.records), "the others run")

        decode = begin_victim(gateway.address, ask("Death and night", 12_000, f"{name}-decode"))
        await until(lambda: decode.record.num_tokens > 0, "tokens come")
        ids = [1 + (7 * place) % 1000 for place in range(LONG_PROMPT)]
        prefill = begin_victim(gateway.address, ask(ids, 10, f"{name}-prefill"))
        await until(partial(in_engine, worker, BYSTANDERS + 2), "it is in prefill")
        in_lane = begin_victim(gateway.address, ask("Come away", 12_000, f"{name}-lane"))
        await until(partial(in_lanes, queue, BYSTANDERS + 3), "it is in its lane")
        assert await queue.pending() == {worker.name: BYSTANDERS + 2}
        before, counted = await engine_state(worker), times_to_free(worker)

        if cause != "gateway killed":
            # It goes while there is no room for it. Its entry stays until there is, and is then deleted.
            await in_lane.leave(cause)
            await until(partial(queue.has_ended, keys_of(in_lane.asked)), "it has ended in its lane")
        at = time.monotonic()
        if cause == "gateway killed":
            gateway.kill()
        else:
            await asyncio.gather(decode.leave(cause), prefill.leave(cause))
        await until(lambda: num_freed(worker, counted) >= 2, "two have freed their blocks")
        freed_s = time.monotonic() - at
        after = await engine_state(worker)
        assert not prefill.record.num_tokens
        # A dead gateway's third client may have been given the room, for one look.
        assert after.running + after.waiting - BYSTANDERS in ((0, 1) if cause == "gateway killed" else (0,))
        assert after.used_blocks <= BYSTANDERS * (bystander.stopping.max_new_tokens // 32 + 2)

        victims = [decode, prefill, in_lane]
        for victim in victims:
            with contextlib.suppress(asyncio.CancelledError):
                await victim.task
            await victim.channel.close()
        await asyncio.gather(*others.tasks)
        for record in others.records:
            assert record.told() == expected
        await queue.until_empty()
        await until_engine_empty(worker)
        for victim in victims:
            entries = [entry for _, entry in await queue.log(keys_of(victim.asked))]
            (end,) = [entry.terminal for entry in entries if entry.HasField("terminal")]
            assert end.error.code == code_pb2.CANCELLED
        assert await queue.num_tokens(keys_of(prefill.asked)) == 0
        if cause != "gateway killed":
            # Of a dead gateway's clients each gets one look before it is given up.
            assert (await engine_state(worker)).prompt_tokens == before.prompt_tokens, "the lane's was begun"
        counts = times_to_free(worker)
        num = num_freed(worker, counted)
        in_time = f"{TO_FREE}_bucket{{le={BOUND_S}}}"
        total_s = counts[f"{TO_FREE}_sum"] - counted[f"{TO_FREE}_sum"]
        print(
            f"{cause}: {num:.0f} cancelled in the engine, {1000 * total_s / num:.0f} ms each from knowing to "
            f"free; seen from outside {freed_s:.2f} s; {BYSTANDERS} others whole"
        )
        assert num >= 2
        assert counts[in_time] - counted[in_time] == num, "one took longer than a step and 100 ms"


async def in_lanes(queue, count: int) -> bool:
    return await queue.num_entries() == count


async def in_engine(worker: ServiceProcess, count: int) -> bool:
    return (await engine_state(worker)).running == count


def num_freed(worker: ServiceProcess, counted: dict[str, float]) -> float:
    """Cancelled requests whose blocks were freed since then."""
    return times_to_free(worker)[f"{TO_FREE}_count"] - counted[f"{TO_FREE}_count"]

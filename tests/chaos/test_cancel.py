"""Nobody waits for an answer any more: its blocks are free at once, wherever it is, and no other notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from client_record import Record, start, undisturbed
from engine_view import engine_state, until_engine_empty
from google.rpc import code_pb2
from live_streams import begin, keys_of, renamed
from service_process import ServiceProcess
from waiting import until

from treadle.api.inference.v1 import inference_pb2, inference_pb2_grpc
from treadle.rpc import open_channel

BYSTANDERS = 12
SOLO = {
    # Bystanders leave a long prompt three tokens a step.
    "TREADLE_ENGINE_MAX_NUM_BATCHED_TOKENS": "16",
    "TREADLE_WORKER_MAX_CLAIMED": str(BYSTANDERS + 2),
    "TREADLE_WORKER_LEASE_S": "1.5",
}
LONG_PROMPT = 8_000
TO_FREE = "treadle:cancel_to_free_seconds"
BOUND_S = 0.25
"""A step and 100 ms, as a bucket of the metric."""


def times_to_free(worker: ServiceProcess) -> dict[str, float]:
    """The metric's buckets, sum and count."""
    return {name: value for name, value in worker.metrics().items() if name.startswith(TO_FREE)}


@pytest.mark.parametrize("cause", ["client gone", "Cancel", "gateway killed"])
async def test_what_nobody_waits_for_frees_its_blocks_at_once(stack, gateways, queue, ask, cause):
    length = 800 if cause == "gateway killed" else 200
    bystander = ask("Love and time", length, "bystander", sampling={"repetition_penalty": 1.2})
    victims = {
        "decode": ask("Death and night", 4000, f"{cause}-decode".replace(" ", "-")),
        "prefill": ask(
            [1 + (7 * place) % 1000 for place in range(LONG_PROMPT)], 10, f"{cause}-prefill".replace(" ", "-")
        ),
        "lane": ask("Come away", 10, f"{cause}-lane".replace(" ", "-")),
    }
    leaving = stack["gateway-1"]
    with stack.workers(1, SOLO) as (worker,):
        expected = await undisturbed(gateways[1], bystander)
        others = begin([gateways[1]], [renamed(bystander, f"{number}") for number in range(BYSTANDERS)])
        async with open_channel(leaving.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            records = {phase: Record() for phase in victims}
            tasks = []
            for phase, asked in victims.items():
                tasks.append(asyncio.create_task(records[phase].listen(start(stub, asked))))
                if phase == "lane":
                    await until(lambda: in_lanes(queue, BYSTANDERS + 3), "it is in its lane")
                else:
                    await until(partial(has_owner, queue, asked), f"it is in {phase}")
            await until(lambda: records["decode"].num_tokens > 0, "tokens come")
            before, counted = await engine_state(worker), times_to_free(worker)
            assert await queue.pending() == {worker.name: BYSTANDERS + 2}
            assert not records["prefill"].num_tokens
            at = time.monotonic()
            await CAUSES[cause](leaving, channel, stub, victims)
            took_s = await until(lambda: frees(worker, 2, counted), "two have freed their blocks")
            after = await engine_state(worker)
            freed_s = time.monotonic() - at
            assert after.running + after.waiting == BYSTANDERS
            assert before.used_blocks - after.used_blocks > (before.used_blocks - BYSTANDERS) // 2
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*others.tasks)
        for record in others.records:
            assert record.told() == expected
        await queue.until_empty()
        await until_engine_empty(worker)
        assert (await engine_state(worker)).prompt_tokens == before.prompt_tokens, "the lane's was begun"
        for asked in victims.values():
            kinds = [entry.WhichOneof("entry") for _, entry in await queue.log(keys_of(asked))]
            assert kinds.count("terminal") == 1
            (end,) = [entry for _, entry in await queue.log(keys_of(asked)) if entry.HasField("terminal")]
            assert end.terminal.error.code == code_pb2.CANCELLED
        assert await queue.num_tokens(keys_of(victims["prefill"])) == 0
        counts = times_to_free(worker)
        num = counts[f"{TO_FREE}_count"] - counted[f"{TO_FREE}_count"]
        total = counts[f"{TO_FREE}_sum"] - counted[f"{TO_FREE}_sum"]
        late = num - (
            counts[f"{TO_FREE}_bucket{{le={BOUND_S}}}"] - counted[f"{TO_FREE}_bucket{{le={BOUND_S}}}"]
        )
        print(
            f"{cause}: {num:.0f} cancelled in the engine, {1000 * total / num:.0f} ms each from knowing to "
            f"free; seen from outside {freed_s:.2f} s ({took_s:.2f} s)"
        )
        assert num >= 2
        assert late == 0


async def in_lanes(queue, count: int) -> bool:
    return await queue.num_entries() == count


async def has_owner(queue, asked) -> bool:
    return bool(await queue.owner(keys_of(asked)))


def frees(worker: ServiceProcess, count: int, counted: dict[str, float]) -> bool:
    return times_to_free(worker)[f"{TO_FREE}_count"] >= counted[f"{TO_FREE}_count"] + count


async def _gone(gateway, channel, stub, victims) -> None:
    await channel.close()


async def _killed(gateway, channel, stub, victims) -> None:
    gateway.kill()


async def _cancelled(gateway, channel, stub, victims) -> None:
    for asked in victims.values():
        response = await stub.Cancel(inference_pb2.CancelRequest(request_id=asked.request_id), timeout=10)
        assert response.cancelled


CAUSES: dict[str, Callable[..., Awaitable[None]]] = {
    "client gone": _gone,
    "gateway killed": _killed,
    "Cancel": _cancelled,
}

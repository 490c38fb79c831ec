"""Tasks in the worker's I/O process, between a real Valkey and an engine that pretends."""

from __future__ import annotations

import asyncio

import pytest
from fake_engine import BROKEN
from google.rpc import code_pb2, error_details_pb2
from waiting import until

from treadle.api.inference.v1 import generation_pb2
from treadle.errors import Cancelled
from treadle.queue import control, dirty, keys, lanes
from treadle.queue.connection import connect_blocking
from treadle.queue.epochs import take
from treadle.queue.keys import RequestKeys
from treadle.queue.log import read_log
from treadle.rpc import to_status
from treadle_worker import intake

SLOW = 200
"""Steps of a task that something is to happen to meanwhile; it is ended, or takes that long."""
ENCODER = {"tasks": ("embed", "rank"), "generates": False}


def key(request_id: str) -> RequestKeys:
    return RequestKeys("default", request_id)


def reason(found) -> str:
    """The stable reason of an outcome's error."""
    info = error_details_pb2.ErrorInfo()
    for detail in found.terminal.error.details:
        if detail.Unpack(info):
            return info.reason
    return ""


@pytest.fixture
def computing(bench):
    """Waits until so many tasks are with the engine."""

    async def wait(one, count: int = 1) -> None:
        await until(lambda: one.engine.active == count, f"{count} with the engine, not {one.engine.active}")

    return wait


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(intake, "SWEEP_S", 0.1)


async def test_a_task_is_one_entry_and_leaves_its_lane(
    redis, redis_url, bench, ask_task, outcome, lanes_empty
):
    async with bench() as one:
        answer = await ask_task("t1")
        found = await outcome("t1")
        await lanes_empty()
        assert found.kinds == ["queued", "fence", "terminal"]
        result = found.terminal.task_result
        assert result.data == answer
        assert result.artifact_digest == "sha256:a"
        assert result.profile == one.worker.hosts[0].profile
        assert 0 < await redis.pttl(key("t1").log) <= 20_000
        assert not await redis.exists(key("t1").attached)
        (asked,) = one.engine.asked
        assert (asked.task, [item.first for item in asked.inputs]) == ("score", [1, 1, 1])
        assert asked.cache_salt == "default/"
        assert one.engine.added == []
        blocking = connect_blocking(redis_url, block_s=2)
        (news,) = await dirty.pop(blocking, "g1", block_s=2)
        await blocking.aclose()
        assert news.entry == (await read_log(redis, key("t1"))).entries[-1]
        tokens = sum(len(item.token_ids) for item in asked.inputs)
        assert one.counted("engine_task_inputs_total", task="score") == 3
        assert one.counted("engine_task_tokens_total", task="score") == tokens
        assert one.counted("request_queue_time_seconds_count") == 1
        assert one.counted("request_ends_total", outcome="finished") == 1


async def test_tasks_beside_generations_are_each_as_they_are_alone(
    bench, ask, ask_task, outcome, answer, lanes_empty
):
    async with bench() as one:
        tasks = {f"t{number}": await ask_task(f"t{number}", 1 + number % 7) for number in range(40)}
        prompts = {f"r{number}": await ask(f"r{number}", 5 + number % 11) for number in range(20)}
        for name, data in tasks.items():
            assert (await outcome(name)).terminal.task_result.data == data
        for number, (name, prompt) in enumerate(prompts.items()):
            assert (await outcome(name)).token_ids == answer(prompt, 5 + number % 11)
        await lanes_empty()
        print("at once:", one.engine.most_at_once)
        assert one.engine.most_at_once > 1
        assert (len(one.engine.asked), len(one.engine.added)) == (40, 20)
        assert one.counted("engine_task_inputs_total", task="score") == 120


async def test_what_the_engine_gives_up_fails_alone(bench, ask_task, outcome, lanes_empty):
    async with bench() as one:
        broken = {"inputs": [{"token_ids": [2, BROKEN], "first": 1}], "score": {}}
        await ask_task("bad", work=broken)
        good = {f"t{number}": await ask_task(f"t{number}") for number in range(5)}
        found = await outcome("bad")
        assert found.terminal.error.code == code_pb2.INTERNAL
        assert reason(found) == "ENGINE_ERROR"
        assert "it cannot be computed" in found.terminal.error.message
        for name, data in good.items():
            assert (await outcome(name)).terminal.task_result.data == data
        await lanes_empty()
        assert one.counted("request_ends_total", outcome="failed") == 1
        assert one.counted("request_ends_total", outcome="finished") == 5


async def test_what_the_engine_cannot_do_is_said_with_what_it_can(bench, ask, ask_task, outcome, lanes_empty):
    texts = [{"token_ids": [1, 2]}, {"token_ids": [3]}]
    async with bench(engine=ENCODER) as one:
        await ask("generation")
        await ask_task("score")
        await ask_task("later", work={"inputs": texts})
        await ask_task("classify", work={"inputs": texts, "classify": {"activation": "softmax"}})
        for name in ("generation", "score", "later", "classify"):
            found = await outcome(name)
            assert found.terminal.error.code == code_pb2.FAILED_PRECONDITION
            assert reason(found) == "TASK_NOT_SUPPORTED"
            assert found.terminal.error.message.endswith("it can: embed, rerank")
            assert found.kinds == ["queued", "fence", "terminal"]
        embedding = {"pooling": "mean", "normalize": True, "dimensions": 3}
        data = await ask_task("embed", work={"inputs": texts, "embed": embedding})
        assert (await outcome("embed")).terminal.task_result.data == data
        by_embeddings = {"inputs": texts, "rank": {"embed": {"pooling": "cls"}}}
        data = await ask_task("rank", work=by_embeddings)
        assert (await outcome("rank")).terminal.task_result.data == data
        await lanes_empty()
        assert one.engine.added == []
        assert [(one.task, one.pooling, one.normalize, one.dimensions) for one in one.engine.asked] == [
            ("embed", "mean", True, 3),
            ("rank", "cls", False, 0),
        ]
        assert one.counted("engine_task_inputs_total", task="rerank") == 2


BAD = {
    "none": {"inputs": []},
    "empty": {"inputs": [{"token_ids": [1, 2], "first": 1}, {"token_ids": []}]},
    "outside": {"inputs": [{"token_ids": [1, 257], "first": 1}]},
    "long": {"inputs": [{"token_ids": [1] * 100_001, "first": 1}]},
    "types": {"inputs": [{"token_ids": [1, 2], "type_ids": [0], "first": 1}]},
    "nothing before it": {"inputs": [{"token_ids": [1, 2], "first": 0}]},
    "nothing to score": {"inputs": [{"token_ids": [1, 2], "first": 2}]},
}


async def test_wrong_inputs_never_reach_the_engine(bench, ask_task, outcome, lanes_empty):
    async with bench() as one:
        for number, bad in enumerate(BAD.values()):
            await ask_task(f"t{number}", work=bad | {"score": {}})
        for number, name in enumerate(BAD):
            found = await outcome(f"t{number}")
            assert found.terminal.error.code == code_pb2.INVALID_ARGUMENT, name
            assert reason(found) == "TASK_REFUSED"
            print(f"{name}: {found.terminal.error.message}")
            assert found.terminal.error.message.startswith("inputs")
        await lanes_empty()
        assert one.engine.asked == []
        assert one.counted("request_ends_total", outcome="failed") == len(BAD)


async def test_a_deadline_holds_in_the_lane_and_while_it_is_computed(
    bench, ask_task, outcome, lanes_empty, computing
):
    await ask_task("late", timeout_ms=1)
    await asyncio.sleep(0.05)
    async with bench(step_s=0.01) as one:
        found = await outcome("late")
        assert found.terminal.error.code == code_pb2.DEADLINE_EXCEEDED
        assert one.engine.asked == []
        await ask_task("slow", SLOW, timeout_ms=300)
        await computing(one)
        found = await outcome("slow")
        assert found.terminal.error.code == code_pb2.DEADLINE_EXCEEDED
        await computing(one, 0)
        await lanes_empty()
        assert one.engine.aborted
        assert one.counted("request_ends_total", outcome="failed") == 2


async def test_a_task_is_cancelled_in_its_lane_and_while_it_is_computed(
    redis, bench, ask_task, outcome, lanes_empty, computing
):
    await ask_task("waits")
    await control.cancel(redis, key("waits"), to_status(Cancelled("asked")))
    async with bench(step_s=0.01) as one:
        await lanes_empty()
        assert one.engine.asked == []
        for number in range(4):
            await ask_task(f"t{number}", SLOW)
        await computing(one, 4)
        for number in range(4):
            assert await control.cancel(redis, key(f"t{number}"), to_status(Cancelled("asked")))
            found = await outcome(f"t{number}")
            assert found.terminal.error.code == code_pb2.CANCELLED
        await computing(one, 0)
        await lanes_empty()
        assert one.counted("request_ends_total", outcome="cancelled") == 4


async def test_a_task_whose_client_is_gone_is_ended_unless_it_is_detached(
    redis, bench, ask_task, outcome, computing, lanes_empty
):
    async with bench(step_s=0.01, lease_s=1.5) as one:
        await ask_task("gone", 240)
        detached = await ask_task("detached", 240, disconnect_mode=generation_pb2.DISCONNECT_MODE_DETACH)
        await computing(one, 2)
        await redis.delete(key("gone").attached)
        found = await outcome("gone")
        assert found.terminal.error.code == code_pb2.CANCELLED
        assert reason(found) == "CLIENT_GONE"
        assert (await outcome("detached")).terminal.task_result.data == detached
        await lanes_empty()
        assert len(one.engine.asked) == 2


async def test_a_task_that_another_owner_has_is_dropped_silently(
    redis, bench, ask_task, outcome, computing, lanes_empty, monkeypatch
):
    """A gateway that dies in the middle of a cancellation leaves a fence: the task is computed again."""
    monkeypatch.setattr(intake, "STRAY_MS", 200)
    async with bench(step_s=0.01) as one:
        data = await ask_task("t", 60)
        await computing(one)
        (taken,) = await take(redis, [key("t")], "")
        found = await outcome("t")
        assert found.terminal.task_result.data == data
        assert found.kinds == ["queued", "fence", "fence", "fence", "terminal"]
        assert taken.epoch == 2
        assert len(one.engine.asked) == 2
        await lanes_empty()


async def test_an_engine_that_dies_is_replaced_and_its_tasks_are_computed_again(
    bench, ask_task, outcome, computing, lanes_empty
):
    async with bench(step_s=0.01) as one:
        asked = {f"t{number}": await ask_task(f"t{number}", 60) for number in range(6)}
        await computing(one, 6)
        one.engine.die()
        for name, data in asked.items():
            found = await outcome(name)
            assert found.terminal.task_result.data == data
            assert found.kinds == ["queued", "fence", "fence", "terminal"]
        await lanes_empty()
        print("computed again:", len(one.engine.asked))
        assert len(one.engine.asked) == 6
        assert one.counted("request_ends_total", outcome="handed_back") == 6
        assert one.counted("request_queue_time_seconds_count") == 6, "takeovers are left out"


async def test_an_engine_that_died_wants_no_turn_while_its_tasks_are_handed_back(
    bench, ask_task, outcome, computing, monkeypatch
):
    begun, goes_on = asyncio.Event(), asyncio.Event()
    hand_back = lanes.hand_back

    async def slow(*arguments):
        begun.set()
        await goes_on.wait()
        return await hand_back(*arguments)

    monkeypatch.setattr(lanes, "hand_back", slow)
    async with bench(step_s=0.02) as one:
        run = one.worker.hosts[0].running
        data = await ask_task("t", 30, disconnect_mode=generation_pb2.DISCONNECT_MODE_DETACH)
        await computing(one)
        assert run.seat.wants
        one.engine.die()
        await asyncio.wait_for(begun.wait(), 10)
        assert not run.seat.wants
        goes_on.set()
        assert (await outcome("t")).terminal.task_result.data == data


async def test_what_a_drain_cannot_finish_goes_to_another_worker(
    bench, ask_task, outcome, computing, lanes_empty
):
    async with bench(step_s=0.02, name="leaves", grace_period_s=0.2) as leaving:
        asked = {f"t{number}": await ask_task(f"t{number}", 100) for number in range(4)}
        await computing(leaving, 4)
    async with bench(name="stays") as staying:
        for name, data in asked.items():
            assert (await outcome(name)).terminal.task_result.data == data
        await lanes_empty()
        handed_over = staying.worker.hosts[0].running.intake.num_taken_over
        print("handed over:", handed_over)
        assert handed_over == len(staying.engine.asked) == 4


async def test_a_drain_finishes_what_it_can(bench, ask_task, outcome, computing):
    async with bench(step_s=0.01) as one:
        data = await ask_task("t", 30)
        await computing(one)
        await one.worker.drain()
        assert (await outcome("t")).terminal.task_result.data == data


async def test_a_full_redis_delays_a_result_and_loses_nothing(redis, bench, ask_task, outcome, computing):
    async with bench(step_s=0.01) as one:
        data = await ask_task("t", 30)
        await computing(one)
        await redis.config_set("maxmemory", "1")
        await computing(one, 0)
        await asyncio.sleep(0.2)
        await redis.config_set("maxmemory", "0")
        assert (await outcome("t")).terminal.task_result.data == data
        assert len(one.engine.asked) == 1


async def test_an_encoder_is_given_tokens_for_some_steps_and_the_rest_waits(
    redis, bench, ask_task, outcome, lanes_empty
):
    """60 tasks of 21 tokens, with room for 200: never many more are held, and two workers share them."""
    for number in range(60):
        work = {"inputs": [{"token_ids": [5, number, *[7] * 19]}], "embed": {"pooling": "mean"}}
        await ask_task(f"t{number}", work=work)
    settings = {"step_s": 0.005, "engine": ENCODER, "max_claimed_tokens": 200}
    async with bench(**settings) as one, bench(name="other", **settings) as other:
        for number in range(60):
            assert (await outcome(f"t{number}")).terminal.HasField("task_result")
        await lanes_empty()
        held = [found.engine.most_tokens for found in (one, other)]
        shares = [len(found.engine.asked) for found in (one, other)]
        print(f"tokens held at most: {held}; tasks computed: {shares}")
        assert sum(shares) == 60
        assert 100 < max(held) <= 200
        assert min(shares) > 0


async def test_a_large_task_does_not_keep_small_ones_in_their_lanes(
    redis, bench, ask_task, outcome, computing
):
    async with bench(engine=ENCODER, max_claimed_tokens=200, step_s=0.05) as one:
        large = {"inputs": [{"token_ids": [SLOW, *[7] * 1_000]}], "embed": {"pooling": "mean"}}
        await ask_task("large", work=large)
        await computing(one)
        for number in range(3):
            small = {"inputs": [{"token_ids": [1, number]}], "embed": {"pooling": "mean"}}
            await ask_task(f"small{number}", work=small)
            assert (await outcome(f"small{number}", 5)).terminal.HasField("task_result")
        assert one.engine.active == 1
        assert len(one.engine.asked) == 4
        await control.cancel(redis, key("large"), to_status(Cancelled("asked")))


async def test_keys_of_a_task_live_as_long_as_it_is_computed(redis, bench, ask_task, computing, monkeypatch):
    monkeypatch.setattr("treadle_worker.lapses.RENEW_S", 0.0)
    async with bench(step_s=0.05, lease_s=1.5) as one:
        await ask_task("t", SLOW, disconnect_mode=generation_pb2.DISCONNECT_MODE_DETACH)
        await computing(one)
        await redis.pexpire(key("t").log, 60_000)

        async def renewed() -> bool:
            return await redis.pttl(key("t").log) > 60_000

        await until(renewed, "its log has its full life again", timeout_s=5)
        assert await redis.pttl(key("t").log) <= keys.ACTIVE_MS
        await control.cancel(redis, key("t"), to_status(Cancelled("asked")))

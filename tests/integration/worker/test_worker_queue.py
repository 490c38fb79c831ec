"""The worker's I/O process between a real Valkey and an engine that pretends."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from google.rpc import code_pb2
from waiting import until

from treadle.api.inference.v1 import generation_pb2
from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.errors import Cancelled
from treadle.queue import control, dirty, keys, submission, workers
from treadle.queue.connection import connect_blocking
from treadle.queue.epochs import take
from treadle.queue.keys import RequestKeys
from treadle.queue.log import read_log
from treadle.rpc import to_status
from treadle_worker import intake

LENGTH = generation_pb2.FINISH_REASON_LENGTH
EOS = 256


def key(request_id: str) -> RequestKeys:
    return RequestKeys("default", request_id)


async def test_a_request_becomes_a_whole_log_and_leaves_its_lane(
    redis, redis_url, bench, ask, outcome, answer, lanes_empty
):
    async with bench() as one:
        prompt = await ask("r1", 40)
        found = await outcome("r1")
        await lanes_empty()
        assert found.kinds[:3] == ["queued", "fence", "started"]
        assert found.token_ids == answer(prompt, 40)
        assert found.text == bytes(answer(prompt, 40)).decode(errors="replace")
        finished = found.terminal.finished
        assert finished.choices[0].finish_reason == LENGTH
        assert (finished.usage.prompt_tokens, finished.usage.output_tokens) == (len(prompt), 40)
        assert finished.usage.cached_tokens == 3
        assert 0 < await redis.pttl(key("r1").log) <= 60_000
        assert not await redis.exists(key("r1").attached)
        blocking = connect_blocking(redis_url, block_s=2)
        # All but the gateway's own and the fence.
        written, heard = (await read_log(redis, key("r1"))).entries[2:], []
        while len(heard) < len(written):
            news = await dirty.pop(blocking, "g1", block_s=2)
            assert news, f"{len(heard)} of {len(written)} entries came with news"
            heard += [one.entry for one in news]
        assert heard == written
        await blocking.aclose()
        (beat,) = await workers.heartbeats(redis)
        assert beat.consumer == one.worker.consumer
        assert beat.profiles[0].max_model_len == 100_000
        assert one.readiness[-1] is True
    assert one.readiness[-1] is False
    assert await workers.heartbeats(redis) == []


async def test_64_requests_at_once_are_each_as_they_are_alone(
    redis, bench, ask, outcome, answer, lanes_empty
):
    async with bench() as one:
        asked = {
            f"r{number}": (await ask(f"r{number}", 5 + number % 17), 5 + number % 17) for number in range(64)
        }
        for name, (prompt, length) in asked.items():
            assert (await outcome(name)).token_ids == answer(prompt, length)
        await lanes_empty()
        assert len(one.engine.added) == 64
        assert one.engine.most_at_once > 1
        print("at once:", one.engine.most_at_once)


async def test_a_stop_string_cuts_the_answer_and_stops_the_engine(bench, ask, outcome, answer):
    async with bench(step_s=0.003) as one:
        prompt = await ask("r0")
        whole = bytes(answer(prompt, 40)).decode(errors="replace")
        stop = whole[12:15]
        await ask("r1", 4000, stopping={"stop_strings": [stop]})
        reference = bytes(answer([2, *b"r1"], 4000)).decode(errors="replace")
        assert stop in reference
        found = await outcome("r1")
        assert found.text == reference[: reference.index(stop)]
        choice = found.terminal.finished.choices[0]
        assert choice.finish_reason == generation_pb2.FINISH_REASON_STOP_STRING
        assert choice.stop_string == stop
        assert bytes(found.token_ids).decode() == reference[: reference.index(stop) + len(stop)]
        assert found.terminal.finished.usage.output_tokens == len(found.token_ids)
        await until(lambda: one.engine.active == 0, "the engine has none")


async def test_a_stop_token_belongs_to_the_answer_but_not_to_its_text(bench, ask, outcome, answer):
    async with bench():
        prompt = await ask("r1", 20, stopping={"stop_token_ids": [EOS]})
        found = await outcome("r1")
    assert found.token_ids == [*answer(prompt, 20)[:18], EOS]
    assert found.text == bytes(answer(prompt, 20)[:18]).decode(errors="replace")
    assert found.terminal.finished.choices[0].stop_token_id == EOS


async def test_a_deadline_that_passed_in_the_lane_never_reaches_the_engine(
    redis, bench, ask, outcome, first_tokens, lanes_empty
):
    await ask("late", timeout_ms=1)
    await asyncio.sleep(0.05)
    async with bench() as one:
        found = await outcome("late")
        assert found.terminal.error.code == code_pb2.DEADLINE_EXCEEDED
        assert found.kinds == ["queued", "fence", "terminal"]
        assert one.engine.added == []
        await lanes_empty()


async def test_a_deadline_ends_a_running_request(redis, bench, ask, outcome, lanes_empty):
    async with bench(step_s=0.005) as one:
        await ask("r1", 5_000, timeout_ms=500)
        found = await outcome("r1")
        assert found.terminal.error.code == code_pb2.DEADLINE_EXCEEDED
        assert found.token_ids
        await until(lambda: one.engine.active == 0, "the engine has none")
        await lanes_empty()


async def test_cancelling_a_running_request_stops_the_engine(
    redis, bench, ask, outcome, first_tokens, lanes_empty
):
    async with bench(step_s=0.005) as one:
        await ask("r1", 5_000)
        await first_tokens("r1", 3)
        assert await control.cancel(redis, key("r1"), to_status(Cancelled("asked")))
        found = await outcome("r1")
        assert found.terminal.error.code == code_pb2.CANCELLED
        await until(lambda: one.engine.active == 0, "the engine has none")
        await lanes_empty()


async def test_a_request_cancelled_in_its_lane_never_reaches_the_engine(
    redis, bench, ask, outcome, lanes_empty
):
    await ask("r1", 100)
    await control.cancel(redis, key("r1"), to_status(Cancelled("asked")))
    async with bench() as one:
        await lanes_empty()
        assert one.engine.added == []
    # The late claimer's fence stands behind the end, and changes nothing.
    assert (await outcome("r1")).kinds == ["queued", "fence", "terminal", "fence"]
    assert await redis.pttl(key("r1").log) <= keys.RETENTION_MS


async def test_a_request_whose_client_is_gone_is_ended_unless_it_is_detached(
    redis, bench, ask, outcome, first_tokens
):
    async with bench(step_s=0.003, lease_s=1.5) as one:
        await ask("gone", 5_000)
        await ask("detached", 5_000, disconnect_mode=generation_pb2.DISCONNECT_MODE_DETACH)
        await first_tokens("gone")
        await redis.delete(key("gone").attached)
        found = await outcome("gone")
        assert found.terminal.error.code == code_pb2.CANCELLED
        await until(lambda: one.engine.active == 1, "the engine has one")
        await first_tokens("detached", 20)
        await control.cancel(redis, key("detached"), to_status(Cancelled("asked")))


async def test_a_second_gateway_is_told_of_what_was_written_before_it_watched(
    redis, redis_url, bench, ask, first_tokens
):
    async with bench(step_s=0.05) as one:
        await ask("r1", 5_000)
        await first_tokens("r1")
        blocking = connect_blocking(redis_url, block_s=5)
        await control.watch(redis, key("r1"), "g2")
        assert dirty.News(key("r1")) in await dirty.pop(blocking, "g2", block_s=5)
        await blocking.aclose()
        await control.cancel(redis, key("r1"), to_status(Cancelled("asked")))
        await until(lambda: one.engine.active == 0, "the engine has none")


async def test_no_more_is_claimed_than_there_is_room_and_the_high_lane_goes_first(redis, bench, ask, outcome):
    for number in range(6):
        await ask(f"n{number}", 20)
    for number in range(3):
        await ask(f"h{number}", 20, priority=generation_pb2.PRIORITY_HIGH)
    async with bench(max_claimed=2) as one:
        for name in (*(f"n{number}" for number in range(6)), *(f"h{number}" for number in range(3))):
            await outcome(name)
        assert one.engine.most_at_once == 2
        order = [request.request_id.partition(":")[2][0] for request in one.engine.added]
        assert order[:2] == ["h", "h"]
        assert len(order) == 9


async def test_a_request_that_is_twice_in_its_lane_runs_once(
    redis, bench, ask, outcome, first_tokens, lanes_empty
):
    async with bench(step_s=0.003) as one:
        await ask("r1", 200)
        await first_tokens("r1")
        (lane,) = await redis.keys("treadle:lane:*")
        ((_, entry),) = await redis.xrange(lane)
        await redis.xadd(lane, entry)
        async with bench(name="other") as other:
            await outcome("r1")
            await lanes_empty()
            assert len(one.engine.added) + len(other.engine.added) == 1


async def test_an_entry_that_another_worker_lives_by_goes_to_that_worker(
    redis, bench, ask, outcome, first_tokens, answer, monkeypatch, lanes_empty
):
    monkeypatch.setattr(intake, "STRAY_MS", 100)
    monkeypatch.setattr(intake, "SWEEP_S", 0.1)
    async with bench(step_s=0.01) as one, bench(name="other") as other:
        prompt = await ask("r1", 200)
        await first_tokens("r1")
        (lane,) = await redis.keys("treadle:lane:*")
        ((entry_id, _),) = await redis.xrange(lane)
        owner = (await redis.get(key("r1").owner)).decode()
        late = next(name.worker.consumer for name in (one, other) if name.worker.consumer != owner)
        # As one that was given the entry, was stopped past its lease, and wakes.
        await redis.xclaim(lane, keys.GROUP, late, 0, [entry_id])

        async def it_is_back() -> bool:
            return bool(await redis.xpending_range(lane, keys.GROUP, "-", "+", 1, consumername=owner))

        await until(it_is_back, "it is its owner's again", timeout_s=5)
        assert (await outcome("r1")).token_ids == answer(prompt, 200)
        assert len(one.engine.added) + len(other.engine.added) == 1
        await lanes_empty()


async def test_a_request_that_nobody_spoke_for_while_it_waited_gets_one_look(
    redis, bench, ask, outcome, first_tokens
):
    await ask("gone", 5_000)
    await redis.delete(key("gone").attached)
    async with bench(step_s=0.003, lease_s=6.0):
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert (await outcome("gone")).terminal.error.code == code_pb2.CANCELLED
        assert loop.time() - began < 3.5


async def test_an_unreadable_entry_is_deleted_and_a_later_schema_is_left(
    redis, bench, ask, outcome, lanes_empty
):
    await ask("r1", 5)
    (lane,) = await redis.keys("treadle:lane:*")
    await redis.xadd(lane, {b"d": b"\xff\xff"})
    await redis.xadd(lane, {b"d": LaneEntry(version=99, request_id="new").SerializeToString()})
    async with bench() as one:
        await outcome("r1")
        claimer = one.worker.hosts[0].running.claimer
        await until(lambda: bool(claimer.too_new), "the later schema is seen")
        await lanes_empty(1)


async def test_an_expired_log_is_no_request_any_more(redis, bench, ask, lanes_empty):
    await ask("r1", 5)
    await redis.delete(key("r1").log)
    async with bench() as one:
        await lanes_empty()
        assert one.engine.added == []
    assert not await redis.exists(key("r1").log)


async def test_an_engine_that_dies_is_replaced_and_its_requests_go_on(
    redis, bench, ask, outcome, first_tokens, answer, lanes_empty
):
    async with bench(step_s=0.004) as one:
        asked = {f"r{number}": await ask(f"r{number}", 150) for number in range(8)}
        for name in asked:
            await first_tokens(name, 5)
        one.engine.die()
        for name, prompt in asked.items():
            found = await outcome(name)
            assert found.token_ids == answer(prompt, 150)
            assert found.text == bytes(answer(prompt, 150)).decode(errors="replace")
            assert found.kinds.count("fence") == 2
        await lanes_empty()
        assert len(one.engines) == 2
        resumed = [request for request in one.engine.added if request.output_token_ids]
        assert len(resumed) == 8
        assert one.worker.hosts[0].running.claimer.num_resumed == 8
        print("resumed:", len(resumed))


async def test_what_a_drain_cannot_finish_goes_to_another_worker(
    redis, bench, ask, outcome, first_tokens, answer, monkeypatch, lanes_empty
):
    monkeypatch.setattr(intake, "SWEEP_S", 0.1)
    async with bench(step_s=0.01, name="leaves", grace_period_s=0.2) as leaving:
        asked = {f"r{number}": await ask(f"r{number}", 100) for number in range(4)}
        for name in asked:
            await first_tokens(name, 3)
    assert leaving.readiness[-1] is False
    async with bench(name="stays") as staying:
        for name, prompt in asked.items():
            assert (await outcome(name)).token_ids == answer(prompt, 100)
        await lanes_empty()
        handed_over = staying.worker.hosts[0].running.intake.num_taken_over
        assert handed_over == 4
        print("handed over:", handed_over)


async def test_a_drain_finishes_what_it_can_and_takes_no_more(redis, bench, ask, outcome, first_tokens):
    async with bench(step_s=0.003, name="w") as one:
        await ask("r1", 100)
        await first_tokens("r1")
        await one.worker.drain()
        assert (await outcome("r1")).terminal.finished.usage.output_tokens == 100
        (beat,) = await workers.heartbeats(redis)
        assert workers.ready_for([beat], beat.profiles[0].profile) == []
        await ask("r2", 5)
        await asyncio.sleep(0.4)
        assert [request.request_id for request in one.engine.added] == ["default:r1@1"]


async def test_broken_connections_lose_nothing(redis, bench, ask, outcome, answer, monkeypatch, lanes_empty):
    monkeypatch.setattr(intake, "STRAY_MS", 200)
    monkeypatch.setattr(intake, "SWEEP_S", 0.1)
    async with bench(step_s=0.004):
        asked = {}
        killed = 0
        for number in range(30):
            asked[f"r{number}"] = await ask(f"r{number}", 60)
            killed += await redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(0.02)
        for name, prompt in asked.items():
            found = await outcome(name)
            assert found.token_ids == answer(prompt, 60), name
        await lanes_empty()
        assert killed > 3
        print("connections broken:", killed)


async def test_a_request_that_was_fenced_and_never_ended_is_taken_again(
    redis, bench, ask, outcome, first_tokens, answer, lanes_empty, monkeypatch
):
    monkeypatch.setattr(intake, "STRAY_MS", 200)
    monkeypatch.setattr(intake, "SWEEP_S", 0.1)
    async with bench(step_s=0.004) as one:
        prompt = await ask("r1", 150)
        await first_tokens("r1", 5)
        # As a gateway that dies in the middle of a cancellation.
        (taken,) = await take(redis, [key("r1")], "")
        found = await outcome("r1")
        assert found.token_ids == answer(prompt, 150)
        assert found.kinds.count("fence") == 3
        assert taken.epoch == 2
        assert len(one.engine.added) == 2
        await lanes_empty()


async def test_a_full_redis_delays_and_loses_nothing(redis, bench, ask, outcome, first_tokens, answer):
    async with bench(step_s=0.003):
        prompt = await ask("r1", 200)
        await first_tokens("r1", 3)
        await redis.config_set("maxmemory", "1")
        await asyncio.sleep(0.3)
        before = len(await redis.xrange(key("r1").log))
        await asyncio.sleep(0.3)
        assert len(await redis.xrange(key("r1").log)) == before
        await redis.config_set("maxmemory", "0")
        found = await outcome("r1")
        assert found.token_ids == answer(prompt, 200)
        assert len(found.kinds) < 190  # what gathered meanwhile went into one entry


async def test_renewed_attachment_and_long_life_of_keys(redis, bench, ask, first_tokens, monkeypatch):
    monkeypatch.setattr("treadle_worker.lapses.RENEW_S", 0.0)
    async with bench(step_s=0.01, lease_s=1.5) as one:
        await ask("r1", 5_000)
        await first_tokens("r1")
        await redis.pexpire(key("r1").log, 60_000)
        async with asyncio.timeout(5):
            while await redis.pttl(key("r1").log) <= 60_000:
                await submission.renew_attached(redis, "g1", [key("r1")])
                await asyncio.sleep(0.01)
        assert one.engine.active == 1
        await control.cancel(redis, key("r1"), to_status(Cancelled("asked")))


def test_the_io_process_has_no_torch():
    program = "import sys, treadle_worker.__main__; print('torch' in sys.modules, len(sys.modules) > 100)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]

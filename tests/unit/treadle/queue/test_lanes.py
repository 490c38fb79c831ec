from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from treadle.api.inference.v1.generation_pb2 import PRIORITY_HIGH, PRIORITY_LOW
from treadle.api.worker.v1.queue_pb2 import WORKER_STATE_LOADING, WORKER_STATE_READY, Heartbeat
from treadle.queue import keys, lanes, workers
from treadle.queue.keys import RequestKeys
from treadle.queue.submission import submit

LANE = keys.lane("p-1", "normal", "default")


def heartbeat(consumer: str, state: int = WORKER_STATE_READY) -> Heartbeat:
    return Heartbeat(consumer=consumer, state=state, profiles=[{"profile": "p-1", "state": state}])


async def test_lanes_are_found_high_priority_first(redis: Redis, lane_entry):
    for name, fields in {
        "a": {"priority": PRIORITY_LOW},
        "b": {},
        "c": {"priority": PRIORITY_HIGH},
        "d": {"tenant": "b:x"},
    }.items():
        await submit(redis, lane_entry(name, **fields), lane_limit=10)
    found = await lanes.find(redis, "p-1")
    assert [keys.lane_priority(lane) for lane in found] == ["high", "normal", "normal", "low"]


async def test_waiting_entries_wake_a_blocked_reader(redis: Redis, blocking: Redis, lane_entry):
    assert await lanes.await_new(blocking, [LANE], "w1", block_ms=10) == []  # makes the group
    for number in range(3):
        await submit(redis, lane_entry(f"r{number}"), lane_limit=10)
    assert len(await lanes.await_new(blocking, [LANE], "w1", block_ms=1000)) == 1
    assert len(await lanes.take_new(redis, LANE, "w2", 1)) == 1
    assert len(await lanes.take_new(redis, LANE, "w2", 5)) == 1
    assert await lanes.take_new(redis, LANE, "w2", 5) == []


async def test_only_the_dead_are_taken_over_and_one_wins(redis: Redis, lane_entry):
    for number in range(4):
        await submit(redis, lane_entry(f"r{number}"), lane_limit=10)
    await workers.beat(redis, heartbeat("w1"))
    await lanes.take_new(redis, LANE, "w1", 4)
    assert await lanes.orphaned(redis, LANE, "w2") == {}
    await workers.leave(redis, "w1")
    assert await lanes.orphaned(redis, LANE, "w2") == {"w1": 4}
    assert await lanes.take_over(redis, LANE, "w1", "w2", 10) == []  # not idle for a lease yet
    await asyncio.sleep(0.01)
    won = await lanes.take_over(redis, LANE, "w1", "w2", 3, lease_ms=1)
    rest = await lanes.take_over(redis, LANE, "w1", "w3", 3, lease_ms=1)
    assert (len(won), len(rest)) == (3, 1)


async def test_what_is_handed_back_is_claimable_at_once_and_has_no_owner(redis: Redis, lane_entry):
    await submit(redis, lane_entry(), lane_limit=10)
    await workers.beat(redis, heartbeat("w1"))
    (delivery,) = await lanes.take_new(redis, LANE, "w1", 4)
    request = RequestKeys("default", "r1")
    await redis.set(request.owner, "w1")
    held = [(request, delivery.lane, delivery.entry_id)]
    assert await lanes.hand_back(redis, "w1", held) == 1
    assert await redis.get(request.owner) is None
    assert await lanes.orphaned(redis, LANE, "w2") == {keys.NOBODY: 1}
    assert [d.entry_id for d in await lanes.take_over(redis, LANE, keys.NOBODY, "w2", 9)] == [
        delivery.entry_id
    ]
    # An owner that wakes late takes nothing back.
    assert await lanes.hand_back(redis, "w1", held) == 0
    assert await lanes.take_stray(redis, LANE, "w2", {delivery.entry_id}, idle_ms=0) == []
    (stray,) = await lanes.take_stray(redis, LANE, "w2", set(), idle_ms=0)
    assert stray == delivery
    pipe = redis.pipeline(transaction=False)
    lanes.finish(pipe, LANE, delivery.entry_id)
    assert await pipe.execute() == [1, 1]
    assert await redis.xlen(LANE) == 0


async def test_long_dead_consumers_are_forgotten_but_never_one_that_holds(
    redis: Redis, lane_entry, monkeypatch
):
    await submit(redis, lane_entry(), lane_limit=10)
    await lanes.take_new(redis, LANE, "holder", 1)
    await lanes.take_new(redis, LANE, "empty", 1)
    await redis.xgroup_createconsumer(LANE, keys.GROUP, "empty")
    assert await lanes.forget_dead(redis, LANE) == []
    monkeypatch.setattr(lanes, "FORGET_CONSUMER_MS", 0)
    assert await lanes.forget_dead(redis, LANE) == ["empty"]


async def test_heartbeats_tell_who_is_ready_and_the_dead_are_removed(redis: Redis):
    await workers.beat(redis, heartbeat("w1"))
    await workers.beat(redis, heartbeat("w2", WORKER_STATE_LOADING))
    await workers.beat(redis, heartbeat("w3"))
    await redis.delete(keys.beat("w3"))
    beats = await workers.heartbeats(redis)
    assert [beat.consumer for beat in beats] == ["w1", "w2"]
    assert [beat.consumer for beat in workers.ready_for(beats, "p-1")] == ["w1"]
    assert workers.ready_for(beats, "p-2") == []
    assert await redis.smembers(keys.WORKERS) == {b"w1", b"w2"}
    await workers.leave(redis, "w1")
    assert await workers.living(redis, ["w1", "w2"]) == {"w2"}


async def _fill(redis: Redis, lane_entry, *names: str, **fields) -> list[str]:
    """Puts requests into a lane; returns its entries' ids."""
    for name in names:
        await submit(redis, lane_entry(name, **fields), lane_limit=100)
    lane = keys.lane("p-1", "normal", fields.get("tenant", "default"))
    return [entry_id.decode() for entry_id, _ in await redis.xrange(lane)]


def added_ms(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])


async def test_there_is_no_backlog_where_nothing_waits(redis: Redis, lane_entry):
    nothing = lanes.Backlog(0, 0)
    assert await lanes.backlog(redis, []) == nothing
    assert await lanes.backlog(redis, [LANE, keys.lane("p-9", "high", "x")]) == nothing
    assert not await redis.exists(LANE), "who looks makes no lane"
    await _fill(redis, lane_entry, "r1", "r2")
    deliveries = await lanes.take_new(redis, LANE, "w1", 9)
    assert await lanes.backlog(redis, [LANE]) == nothing, "what a worker holds does not wait"
    await lanes.remove(redis, deliveries)
    assert await redis.xlen(LANE) == 0
    assert await lanes.backlog(redis, [LANE]) == nothing


async def test_the_backlog_is_what_was_never_delivered(redis: Redis, lane_entry):
    ids = await _fill(redis, lane_entry, "r1")
    await asyncio.sleep(0.005)
    ids = await _fill(redis, lane_entry, "r2", "r3", "r4")
    assert added_ms(ids[1]) > added_ms(ids[0])
    assert await lanes.backlog(redis, [LANE]) == lanes.Backlog(4, added_ms(ids[0]))
    (first,) = await lanes.take_new(redis, LANE, "w1", 1)
    assert await lanes.backlog(redis, [LANE]) == lanes.Backlog(3, added_ms(ids[1]))
    # It ends, is taken over, or handed back: never does it wait again.
    await workers.beat(redis, heartbeat("w1"))
    assert await lanes.hand_back(redis, "w1", [(RequestKeys("default", "r1"), LANE, first.entry_id)]) == 1
    assert await lanes.backlog(redis, [LANE]) == lanes.Backlog(3, added_ms(ids[1]))
    await lanes.remove(redis, [first])
    assert await lanes.backlog(redis, [LANE]) == lanes.Backlog(3, added_ms(ids[1]))


async def test_the_backlog_is_right_after_entries_were_deleted(redis: Redis, lane_entry):
    """Cancelled ones leave while they wait, and then Redis itself does not know the group's lag any more."""
    ids = await _fill(redis, lane_entry, *(f"r{number}" for number in range(6)))
    await lanes.take_new(redis, LANE, "w1", 2)
    await redis.xdel(LANE, ids[3])
    (group,) = await redis.xinfo_groups(LANE)
    assert group["lag"] is None
    assert await lanes.backlog(redis, [LANE]) == lanes.Backlog(3, added_ms(ids[2]))
    await redis.xdel(LANE, ids[2], ids[5])
    assert await lanes.backlog(redis, [LANE]) == lanes.Backlog(1, added_ms(ids[4]))
    await redis.xdel(LANE, ids[4])
    assert await lanes.backlog(redis, [LANE]) == lanes.Backlog(0, 0)
    assert await redis.xlen(LANE) == 2


async def test_the_backlog_of_several_lanes_is_their_sum_and_their_oldest(redis: Redis, lane_entry):
    for tenant, count in (("c", 3), ("a", 1), ("b", 2), ("empty", 0)):
        await _fill(redis, lane_entry, *(f"{tenant}{number}" for number in range(count)), tenant=tenant)
        await asyncio.sleep(0.003)
    named = {tenant: keys.lane("p-1", "normal", tenant) for tenant in ("a", "b", "c", "empty")}
    oldest = {
        tenant: added_ms((await redis.xrange(lane))[0][0].decode())
        for tenant, lane in named.items()
        if tenant != "empty"
    }
    assert oldest["c"] < oldest["a"] < oldest["b"]
    every = list(named.values())
    assert await lanes.backlog(redis, every) == lanes.Backlog(6, oldest["c"])
    assert await lanes.backlog(redis, every[:2]) == lanes.Backlog(3, oldest["a"])
    await lanes.take_new(redis, named["c"], "w1", 3)
    found = await lanes.backlog(redis, every)
    assert found == lanes.Backlog(3, oldest["a"])
    print(f"{found.waiting} wait in {len(every)} lanes after 3 were taken")

"""A worker dies, is stopped, or loses its engine: its requests go on elsewhere, and nobody can tell."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from client_record import Told, undisturbed
from engine_view import engine_state, until_engine_empty
from live_streams import Live, begin, check_whole, renamed
from queue_view import QueueView
from service_process import ServiceProcess
from waiting import until

from treadle.api.inference.v1 import generation_pb2
from treadle.api.inference.v1.generation_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP_STRING
from treadle.queue.keys import RequestKeys

CROWD = 16
WORDS = "king queen night sword heart good my thy sweet fair love death time away come never still".split()
ROUNDS = [
    "decode",
    "prefill",
    "decode",
    "decode",
    "prefill",
    "decode",
    "decode",
    "prefill",
    "decode",
    "decode",
]
DEFAULTS = {"TREADLE_WORKER_LEASE_S": "15", "TREADLE_WORKER_GATHER_S": "0.125"}
"""What a worker has where nothing is set."""


@dataclass(frozen=True)
class Crowd:
    """Requests, and what each is told when nothing happens."""

    asked: list[generation_pb2.Generation]
    expected: list[Told]


async def make_crowd(stub, ask, kind: str) -> Crowd:
    """Greedy ones and drawn ones, a third with a stop string that comes; long prompts for "prefill"."""
    rng = random.Random(kind)
    asked = []
    for number in range(CROWD):
        if kind == "prefill":
            prompt, length = [rng.randrange(1, 1024) for _ in range(rng.randint(1200, 1800))], 40
        else:
            prompt, length = " ".join(rng.choices(WORDS, k=rng.randint(3, 40))), 250
        greedy = {"temperature": 0.0, "repetition_penalty": 1.2}
        drawn = {"temperature": 1.0, "top_k": 50, "seed": number}
        sampling = drawn if number % 2 else greedy
        asked.append(ask(prompt, length, f"{kind}-{number}", sampling=sampling))
    expected = list(await asyncio.gather(*(undisturbed(stub, one) for one in asked)))
    for number in range(1, CROWD, 3):
        asked[number].stopping.stop_strings.append(stop_string_in(expected[number].text))
    with_stop = range(1, CROWD, 3)
    again = await asyncio.gather(*(undisturbed(stub, asked[number]) for number in with_stop))
    for number, told in zip(with_stop, again, strict=True):
        assert told.finish_reason == FINISH_REASON_STOP_STRING
        assert expected[number].text.startswith(told.text)
        expected[number] = told
    assert sum(told.finish_reason == FINISH_REASON_LENGTH for told in expected) >= CROWD // 2
    return Crowd(asked, expected)


def stop_string_in(text: str) -> str:
    """Four characters that come for the first time well behind the text's beginning."""
    for place in range(len(text) * 6 // 10, len(text) - 4):
        stop = text[place : place + 4]
        if "\ufffd" not in stop and text.index(stop) >= len(text) // 2:
            return stop
    raise AssertionError(f"nothing new in the second half of {text!r}")


async def held_by(queue: QueueView, live: Live, worker: ServiceProcess) -> list[RequestKeys]:
    """What the worker has and has not ended."""
    owned = await queue.owned(live.keys)
    return [request for request, owner in owned.items() if owner == worker.name]


async def until_both_hold(queue: QueueView, live: Live, workers: Sequence[ServiceProcess]) -> None:
    """Waits until each of the workers has some of the crowd."""
    names = {worker.name for worker in workers}

    async def they_do() -> bool:
        return set((await queue.owned(live.keys)).values()) == names

    await until(they_do, f"{names} share the crowd")


@dataclass(frozen=True)
class Outcome:
    """What one death did."""

    held: int
    """Requests that the lost worker had."""
    in_prefill: int
    """Those of them that had no token yet."""
    taken_over: int
    longest_gap_s: float


async def lose_a_worker(
    live: Live, crowd: Crowd, victim: ServiceProcess, gateways, queue: QueueView
) -> Outcome:
    """Kills the worker, starts it again, and sees every stream through."""
    victim.kill()
    held = await held_by(queue, live, victim)
    in_prefill = [request for request in held if not await queue.num_tokens(request)]
    victim.start()
    await check_whole(live, crowd.expected, gateways)
    fences = {request: await queue.fences(request) for request in live.keys}
    assert held, "it had nothing to lose"
    assert all(len(fences[request]) >= 2 for request in held)
    await queue.until_empty()
    return Outcome(
        len(held),
        len(in_prefill),
        sum(len(consumers) - 1 for consumers in fences.values()),
        max(record.longest_gap_s for record in live.records),
    )


async def a_holder(queue: QueueView, live: Live, workers: Sequence[ServiceProcess], rng) -> ServiceProcess:
    """One of the workers that have something to lose."""
    holders = set((await queue.owned(live.keys)).values())
    return rng.choice([worker for worker in workers if worker.name in holders])


async def stop_in_prefill(
    queue: QueueView, live: Live, workers: Sequence[ServiceProcess], rng
) -> ServiceProcess:
    """A worker, stopped as it holds a request that has no token yet: dying, it loses a prefill."""
    while True:
        worker = await a_holder(queue, live, workers, rng)
        worker.signal_group(signal.SIGSTOP)
        for request in await held_by(queue, live, worker):
            if not await queue.num_tokens(request):
                return worker
        worker.signal_group(signal.SIGCONT)


def some_tokens(crowd: Crowd, rng: random.Random) -> int:
    """A moment of a crowd's life: the first token of each, up to 40% of all."""
    return rng.randint(CROWD, sum(told.output_tokens for told in crowd.expected) * 4 // 10)


@pytest.mark.slow
async def test_ten_kills_at_random_moments_lose_nothing(stack, gateways, queue, ask, rng):
    crowds = {kind: await make_crowd(gateways[0], ask, kind) for kind in ("decode", "prefill")}
    for number in range(len(ROUNDS)):
        # Workers that know the lane share a burst.
        await undisturbed(gateways[0], ask("Hello", 1, tenant=f"round{number}"))
    began = time.monotonic()
    outcomes = []
    for number, kind in enumerate(ROUNDS):
        crowd = crowds[kind]
        asked = [renamed(one, f"round{number}") for one in crowd.asked]
        for one in asked:
            # Another tenant each time: nothing is in its prefix cache.
            one.tenant = f"round{number}"
        live = begin(gateways, asked)
        await until_both_hold(queue, live, stack.of("worker"))
        if kind == "decode":
            await live.until_tokens(some_tokens(crowd, rng))
            victim = await a_holder(queue, live, stack.of("worker"), rng)
        else:
            await live.until_tokens(rng.randint(0, CROWD // 4))
            victim = await stop_in_prefill(queue, live, stack.of("worker"), rng)
        outcome = await lose_a_worker(live, crowd, victim, gateways, queue)
        assert kind == "decode" or outcome.in_prefill > 0
        outcomes.append(outcome)
        print(f"round {number}, {kind}: {victim.name} lost: {outcome}")
        victim.until_ready()
    takeovers = sum(outcome.taken_over for outcome in outcomes)
    assert takeovers > 0
    gaps = [round(outcome.longest_gap_s, 1) for outcome in outcomes]
    print(
        f"{len(ROUNDS)} kills, {CROWD} of {CROWD} streams whole each time; {takeovers} takeovers; "
        f"longest gaps {gaps} s; {time.monotonic() - began:.0f} s in all"
    )


@pytest.mark.slow
async def test_the_default_lease_and_the_death_of_an_engine(stack, gateways, queue, ask, rng):
    crowd = await make_crowd(gateways[0], ask, "decode")
    with stack.workers(2, DEFAULTS) as workers:
        # An engine dies under a living I/O process: its requests are free at once, no lease is waited for.
        live = begin(gateways, [renamed(one, "engine") for one in crowd.asked])
        await until_both_hold(queue, live, workers)
        await live.until_tokens(some_tokens(crowd, rng))
        victim = await a_holder(queue, live, workers, rng)
        held = await held_by(queue, live, victim)
        (engine,) = victim.children()
        engine.kill()
        await check_whole(live, crowd.expected, gateways)
        fences = {request: await queue.fences(request) for request in live.keys}
        taken_over = sum(len(consumers) - 1 for consumers in fences.values())
        gap = max(record.longest_gap_s for record in live.records)
        print(
            f"engine killed under {victim.name} with {len(held)} requests: {taken_over} taken over, "
            f"longest gap {gap:.1f} s"
        )
        assert taken_over > 0
        assert gap < 12, "a lease was waited for"
        (handed,) = [line["count"] for line in victim.log() if line["message"] == "handed requests back"]
        assert handed == taken_over
        await queue.until_empty()
        victim.until_ready()
        assert victim.children() != [engine]

        # A worker dies altogether.
        live = begin(gateways, [renamed(one, "lease") for one in crowd.asked])
        await until_both_hold(queue, live, workers)
        await live.until_tokens(some_tokens(crowd, rng))
        victim = await a_holder(queue, live, workers, rng)
        outcome = await lose_a_worker(live, crowd, victim, gateways, queue)
        print(f"{victim.name} lost, with the default lease of 15 s: {outcome}")
        assert outcome.longest_gap_s > 8


async def test_a_worker_that_was_stopped_past_its_lease_writes_nothing_more(stack, gateways, queue, ask, rng):
    crowd = await make_crowd(gateways[0], ask, "decode")
    live = begin(gateways, [renamed(one, "stopped") for one in crowd.asked])
    await until_both_hold(queue, live, stack.of("worker"))
    await live.until_tokens(some_tokens(crowd, rng))
    victim = await a_holder(queue, live, stack.of("worker"), rng)
    victim.signal_group(signal.SIGSTOP)
    held = await held_by(queue, live, victim)
    (consumer,) = {(await queue.fences(request))[0] for request in held}

    async def others_have_all() -> bool:
        return consumer not in [(await queue.fences(request))[-1] for request in held]

    await until(others_have_all, "its requests are taken over")
    before = {request: await queue.log(request) for request in held}
    victim.signal_group(signal.SIGCONT)
    await check_whole(live, crowd.expected, gateways)
    foreign = 0
    for request in held:
        own = {id_.epoch for id_, entry in before[request] if entry.fence.consumer == consumer}
        later = (await queue.log(request))[len(before[request]) :]
        foreign += sum(id_.epoch in own for id_, _ in later)
        assert (await queue.fences(request)).count(consumer) == 1
    assert foreign == 0
    await queue.until_empty()
    await until_engine_empty(victim)
    print(
        f"stopped with {len(held)} requests, which others took; it woke and wrote {foreign} entries of them"
    )


async def test_what_a_stopped_worker_was_given_is_not_lost_when_it_wakes(stack, gateways, queue, ask, redis):
    """It is stopped as it waits for work, and work comes: another takes that over. When it wakes it finds the
    entry, of whose request it knows nothing; then the other one dies."""
    # Drawn: what does not repeat itself cannot be guessed, and takes its time.
    asked = ask("Never fear the night", 4000, sampling={"temperature": 1.0, "seed": 1})
    expected = await undisturbed(gateways[0], asked)
    stopped, other = stack.of("worker")
    given = 0
    for number in range(40):
        stopped.signal_group(signal.SIGSTOP)
        one = renamed(asked, f"given{number}")
        live = begin(gateways, [one])
        (request,) = live.keys
        await until(queue.pending, "somebody is given it", every_s=0.002)
        if stopped.name in await queue.pending():
            given += 1
            break
        stopped.signal_group(signal.SIGCONT)
        await check_whole(live, [expected], gateways)
        await queue.until_empty()
    print(f"given to the stopped worker at try {number + 1}")
    assert given == 1

    async def other_runs_it() -> bool:
        return await queue.owner(request) == other.name and live.num_tokens >= 10

    await until(other_runs_it, "the other takes it over")
    stopped.signal_group(signal.SIGCONT)
    await engine_state(stopped)  # it is awake
    await asyncio.sleep(0.5)
    assert await queue.pending() == {other.name: 1}, "the entry is not where its request is"
    assert not await queue.has_ended(request), "too quick to lose anything"
    other.kill()
    await check_whole(live, [expected], gateways)
    owners = [consumer.rpartition("-")[0] for consumer in await queue.fences(request)]
    assert owners == [other.name, stopped.name]
    await queue.until_empty()

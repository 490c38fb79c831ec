"""A client leaves, or loses its gateway, and comes back through another one: nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import random

from client_record import Record, Told, attach, start, undisturbed
from live_streams import begin, check_whole, keys_of, renamed

from treadle.api.inference.v1 import generation_pb2

STREAMS = 48
DETACH = {"mode": generation_pb2.DISCONNECT_MODE_DETACH}


async def listen_to(record: Record, call, count: int) -> bool:
    """Takes down so many chunks and leaves; False where the answer ended before."""
    left = count
    async for response in call:
        record.chunks.append(response.chunk)
        left -= 1
        if response.chunk.HasField("finished"):
            return False
        if not left:
            call.cancel()
            return True
    raise AssertionError("the call ended before the answer")


async def test_detached_streams_are_picked_up_through_another_gateway(gateways, queue, ask, rng):
    """Each is cut once or twice at random places, and comes back by turns through either gateway."""
    asked = [
        ask(
            f"Sweet number {number}",
            rng.randint(100, 500),
            f"cut-{number}",
            sampling={"temperature": 1.0, "top_k": 40, "seed": number},
            disconnect=DETACH,
        )
        for number in range(STREAMS)
    ]
    cuts = 0

    async def come_and_go(one: generation_pb2.Generation, chance: random.Random) -> Told:
        nonlocal cuts
        record, here = Record(), chance.randrange(2)
        call = start(gateways[here], one)
        for _ in range(chance.randint(1, 2)):
            if not await listen_to(record, call, chance.randint(1, one.stopping.max_new_tokens // 2)):
                return record.told()
            cuts += 1
            await asyncio.sleep(chance.choice([0, 0, 0.2, 1.0]))
            here = 1 - here
            call = attach(gateways[here], one, record.cursor)
        await record.listen(call)
        again = await Record().listen(attach(gateways[1 - here], one))
        assert again.chunks == record.chunks, "from the start it is another story"
        return record.told()

    told = await asyncio.gather(*(come_and_go(one, random.Random(rng.random())) for one in asked))
    expected = await asyncio.gather(*(undisturbed(gateways[0], one) for one in asked))
    assert list(told) == list(expected)
    assert cuts > STREAMS // 2
    for one in asked:
        assert len(await queue.fences(keys_of(one))) == 1, "it was run twice"
    await queue.until_empty()
    print(f"{STREAMS} detached streams cut {cuts} times, {STREAMS} whole and identical")


async def test_the_death_of_a_gateway_costs_its_clients_a_reconnection(stack, gateways, queue, ask, rng):
    """Requests that end with their client live on, as the client is back before its gateway's word lapses."""
    asked = ask("Fair heart", 2000, "reconnect", sampling={"temperature": 1.0, "seed": 5})
    expected = await undisturbed(gateways[0], asked)
    live = begin([gateways[0]], [renamed(asked, f"{number}") for number in range(16)])
    await live.until_all_begun()
    await live.until_tokens(rng.randint(16, 16 * 200))
    stack["gateway-1"].kill()
    await asyncio.gather(*live.tasks)
    lost = [record for record in live.records if record.error is not None]
    for record in lost:
        record.error = None
    before = sum(record.num_tokens for record in lost)
    await asyncio.gather(
        *(
            record.listen(attach(gateways[1], one, record.cursor))
            for one, record in zip(live.asked, live.records, strict=True)
            if record in lost
        )
    )
    assert lost
    await check_whole(live, [expected] * len(live.asked), gateways[1:])
    await queue.until_empty()
    print(f"{len(lost)} streams lost their gateway after {before} tokens together, and are whole")

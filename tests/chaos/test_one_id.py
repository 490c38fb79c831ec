"""One request_id, one run: however often, and through whichever gateway, it is sent."""

from __future__ import annotations

import asyncio

from client_record import Record, attach, start, undisturbed
from engine_view import engine_state
from live_streams import keys_of

TIMES = 100


async def test_the_same_id_a_hundred_times_at_once_runs_once(stack, gateways, queue, ask):
    asked = ask("Thy sweet heart", 120, "one-of-many", sampling={"temperature": 1.0, "seed": 11})
    expected = await undisturbed(gateways[0], asked)
    before = [await engine_state(worker) for worker in stack.of("worker")]
    records = await asyncio.gather(
        *(Record().listen(start(gateways[number % 2], asked)) for number in range(TIMES))
    )
    after = [await engine_state(worker) for worker in stack.of("worker")]
    assert [record.told() for record in records] == [expected] * TIMES
    assert all(record.chunks == records[0].chunks for record in records), "cursors included"
    assert len(await queue.fences(keys_of(asked))) == 1
    made = sum(now.output_tokens - then.output_tokens for then, now in zip(before, after, strict=True))
    taken = sum(now.prompt_tokens - then.prompt_tokens for then, now in zip(before, after, strict=True))
    assert (taken, made) == (expected.prompt_tokens, expected.output_tokens)

    # And long after its end, as long as its answer is kept.
    again = await Record().listen(start(gateways[1], asked))
    assert again.chunks == records[0].chunks

    refused = 0
    for other in (
        ask("Thy sweet heart", 121, "one-of-many", sampling={"temperature": 1.0, "seed": 11}),
        ask("Thy sweet hearts", 120, "one-of-many", sampling={"temperature": 1.0, "seed": 11}),
        ask("Thy sweet heart", 120, "one-of-many", sampling={"temperature": 1.0, "seed": 12}),
    ):
        for gateway in gateways:
            error = (await Record().listen(start(gateway, other))).error
            assert error is not None
            assert (error.code, error.reason) == ("ALREADY_EXISTS", "REQUEST_ID_TAKEN")
            refused += 1
    assert (await Record().listen(attach(gateways[0], asked))).chunks == records[0].chunks
    # Another tenant's is another request.
    foreign = ask("Thy sweet heart", 121, "one-of-many", tenant="other")
    assert (await Record().listen(start(gateways[0], foreign))).told().output_tokens == 121
    await queue.until_empty()
    print(
        f"sent {TIMES} times at once: 1 execution ({made} tokens made), {TIMES} identical streams; "
        f"{refused} of {refused} with another payload refused"
    )

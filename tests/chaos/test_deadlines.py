"""A request whose time is up while it waits never reaches an engine."""

from __future__ import annotations

import asyncio
import time

from client_record import Record, attach, start
from engine_view import engine_state
from google.rpc import code_pb2
from live_streams import begin, keys_of
from waiting import until

from treadle.api.inference.v1 import generation_pb2

FULL = {"TREADLE_WORKER_MAX_CLAIMED": "2"}


async def test_time_that_is_up_in_the_lane_is_told_at_once_and_never_reaches_prefill(
    stack, gateways, queue, ask
):
    with stack.workers(1, FULL) as (worker,):
        drawn = {"temperature": 1.0, "seed": 1}
        busy = begin(
            gateways[1:],
            [ask(f"Never still {number}", 5000, f"busy-{number}", sampling=drawn) for number in range(2)],
        )
        await busy.until_tokens(10)
        before = await engine_state(worker)
        # One whose client waits; one that is detached and whose gateway is gone: only its worker ends it.
        waits = ask("Sweet night", 20, "late-waits", timeout={"nanos": 400_000_000})
        detached = ask(
            "Fair night",
            20,
            "late-detached",
            timeout={"seconds": 1},
            disconnect={"mode": generation_pb2.DISCONNECT_MODE_DETACH},
        )
        left = asyncio.create_task(Record().listen(start(gateways[0], detached)))
        asked_at = time.monotonic()
        told = await Record().listen(start(gateways[0], waits))
        late_s = time.monotonic() - asked_at - 0.4
        assert told.error is not None
        assert told.error.code == "DEADLINE_EXCEEDED"
        assert not told.chunks
        assert late_s < 0.5
        assert await queue.num_entries() == 4
        stack["gateway-1"].kill()
        await left
        assert time.monotonic() - asked_at < 1, "its own gateway ended it"
        await until(lambda: time.monotonic() - asked_at > 1.1, "its time is up")
        assert not await queue.has_ended(keys_of(detached))
        assert sum(state.done() for state in busy.tasks) == 0, "there was room, so it was begun"
        await asyncio.gather(*busy.tasks)
        await queue.until_empty()
        after = await engine_state(worker)
        assert after.prompt_tokens == before.prompt_tokens, "the engine heard of it"
        end = (await Record().listen(attach(gateways[1], detached))).error
        assert end is not None
        assert end.code == "DEADLINE_EXCEEDED"
        for asked in (waits, detached):
            kinds = [entry.WhichOneof("entry") for _, entry in await queue.log(keys_of(asked))]
            assert set(kinds) == {"queued", "fence", "terminal"}
            (last,) = [entry for _, entry in await queue.log(keys_of(asked)) if entry.HasField("terminal")]
            assert last.terminal.error.code == code_pb2.DEADLINE_EXCEEDED
        print(
            f"2 of 2 expired in the lane, told {1000 * late_s:.0f} ms after the deadline; "
            f"{after.prompt_tokens - before.prompt_tokens} tokens of theirs were prefilled"
        )

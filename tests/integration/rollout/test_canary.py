"""Two artifacts under one alias: each gets its share, and one id always the same one."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

from rollout_stack import ALIAS, Load, ask

from treadle.deployments.watching import to_deployment
from treadle_gateway.routing import drawn

ASKED = 400
AT_ONCE = 16


async def test_a_canary_gets_its_share_by_the_requests_ids(rollout, prompts, rng):
    (worker,) = rollout.workers(1)
    worker.until_ready()
    targets = [{"artifact_digest": rollout.a, "weight": 80}, {"artifact_digest": rollout.b, "weight": 20}]
    await rollout.call("SetDeployment", deployment={"alias": ALIAS, "targets": targets})
    await rollout.settled_on(rollout.a, rollout.b)
    served = to_deployment(await rollout.deployment()).serving
    ids = [f"canary-{rng.getrandbits(64):x}" for _ in range(ASKED)]
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(number: int):
        async with turns:
            return await ask(rollout, prompts[number % len(prompts)], ALIAS, ids[number], 2)

    answers = await asyncio.gather(*(one(number) for number in range(ASKED)))
    assert not [answer.failure for answer in answers if answer.failure]
    count = Counter(answer.digest for answer in answers)
    share, bound = count[rollout.b] / ASKED, 4 * math.sqrt(0.2 * 0.8 / ASKED)
    print(f"{count[rollout.b]} of {ASKED} answers were the canary's of 0.2: {share:.3f}, within {bound:.3f}")
    assert abs(share - 0.2) < bound
    assert [answer.digest for answer in answers] == [drawn(served, one)[0].artifact_digest for one in ids]
    # The canary is everything now; nobody who asks meanwhile is told anything but an answer.
    load = Load(rollout, prompts)
    async with load.running(4):
        await rollout.call("PromoteAlias", name=ALIAS, model=rollout.b)
        await rollout.settled_on(rollout.b)
        await load.until_more(20, rollout.b)
    assert not [answer.failure for answer in load.answers if answer.failure]

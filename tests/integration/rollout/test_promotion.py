"""An alias moves under load, and back, and no request notices."""

from __future__ import annotations

from collections import Counter

import pytest
from rollout_stack import ALIAS, Load, Rollout, ask
from waiting import until

CLIENTS = 16


async def alone(rollout: Rollout, prompts: list[str]) -> dict[tuple[str, str], str]:
    """What each model answers to each prompt, by a worker that serves nothing else meanwhile."""
    (worker,) = rollout.workers(1, f"{rollout.a},{rollout.b}", TREADLE_WORKER_DEPLOYMENTS="false")
    worker.until_ready()
    found = {}
    for digest in (rollout.a, rollout.b):
        for prompt in prompts:
            answer = await ask(rollout, prompt, digest)
            assert not answer.failure
            assert answer.digest == digest
            found[digest, prompt] = answer.text
    rollout.end([worker])
    return found


@pytest.mark.slow
@pytest.mark.timeout(280)
async def test_a_promotion_and_its_roll_back_under_load_fail_nothing(rollout, queue, prompts):
    expected = await alone(rollout, prompts)
    assert all(expected[rollout.a, prompt] != expected[rollout.b, prompt] for prompt in prompts)
    workers = rollout.workers(2)
    for worker in workers:
        worker.until_ready()
    engines = {child.pid for worker in workers for child in worker.children()}
    load = Load(rollout, prompts)
    async with load.running(CLIENTS):
        await load.until_more(40, rollout.a)
        promoted = await rollout.call("PromoteAlias", name=ALIAS, model=rollout.b)
        assert promoted.alias.artifact_digest == rollout.a
        assert promoted.deployment.replicas == 2
        await rollout.settled_on(rollout.b)
        await load.until_more(60, rollout.b)
        # Of the old model nothing is left on either worker.
        await until(
            lambda: not engines & {child.pid for worker in workers for child in worker.children()},
            "the old engines are gone",
            60,
        )
        assert sum(len(worker.children()) for worker in workers) == 2
        assert await rollout.listed() == {(ALIAS, rollout.b): 2}
        await rollout.call("RollBackAlias", name=ALIAS)
        await rollout.settled_on(rollout.a)
        await load.until_more(60, rollout.a)
        await until(lambda: sum(len(one.children()) for one in workers) == 2, "one engine a worker", 60)
    failed = [one for one in load.answers if one.failure]
    wrong = [one for one in load.answers if not one.failure and one.text != expected[one.digest, one.prompt]]
    count = Counter(one.digest for one in load.answers)
    print(
        f"{len(load.answers)} answers to {CLIENTS} clients: {count[rollout.a]} of the old, "
        f"{count[rollout.b]} of the new, {len(failed)} failed, {len(wrong)} of neither"
    )
    assert not failed, failed[:3]
    assert not wrong, wrong[:3]
    assert count[rollout.a] >= 100
    assert count[rollout.b] >= 60
    await queue.until_empty()
    assert await rollout.states(rollout.b) == []
    assert await rollout.states(rollout.a) == ["READY", "READY"]

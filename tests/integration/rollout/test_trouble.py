"""Roll-outs that meet a registry that dies, a worker that dies, and a model that cannot be loaded."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from damage import flip
from rollout_stack import ALIAS, LEASE_S, Load, ask
from waiting import until


@pytest.mark.slow
async def test_requests_go_on_without_the_registry_and_changes_are_followed_when_it_is_back(rollout, prompts):
    (worker,) = rollout.workers(1)
    worker.until_ready()
    load = Load(rollout, prompts)
    async with load.running(4):
        await load.until_more(20)
        rollout.stack["registry-1"].kill()
        began = len(load.answers)
        # Longer than the leases last.
        await asyncio.sleep(1.5 * LEASE_S)
        without = len(load.answers) - began
        rollout.stack.restore()
        await rollout.call("PromoteAlias", name=ALIAS, model=rollout.b)
        await rollout.settled_on(rollout.b)
        await load.until_more(20, rollout.b)
    failed = [answer for answer in load.answers if answer.failure]
    print(f"{without} answers while the registry was away, {len(failed)} of {len(load.answers)} failed")
    assert without > 0
    assert not failed, failed[:3]


@pytest.mark.slow
async def test_an_alias_waits_for_the_worker_that_is_ready_and_not_for_the_one_that_died(rollout, prompts):
    first, second = rollout.workers(2)
    for worker in (first, second):
        worker.until_ready()
    # It hears of nothing until the other one is dead.
    second.signal_group(signal.SIGSTOP)
    promoted = await rollout.call("PromoteAlias", name=ALIAS, model=rollout.b)
    assert promoted.deployment.replicas >= 1

    async def loading() -> bool:
        return await rollout.states(rollout.b) == ["LOADING"]

    await until(loading, "the first worker loads", 30)
    first.kill()
    assert await rollout.meaning() == rollout.a
    assert await rollout.serving() == [rollout.a]
    second.signal_group(signal.SIGCONT)
    await rollout.settled_on(rollout.b)
    deployment = await rollout.deployment()
    ready = sum(one.ready_workers for one in deployment.status if one.artifact_digest == rollout.b)
    print(f"1 worker killed while it loaded, the alias moved when {ready} other was ready")
    assert ready == 1
    assert (await ask(rollout, prompts[0], ALIAS)).digest == rollout.b


@pytest.mark.slow
async def test_what_cannot_be_loaded_is_seen_to_have_failed_and_changes_nothing(rollout, prompts):
    broken = rollout.spare
    location = (await rollout.call("ResolveModel", model=broken)).artifact.location
    flip(Path(location) / "model.safetensors")
    (worker,) = rollout.workers(1)
    worker.until_ready()
    load = Load(rollout, prompts)
    async with load.running(4):
        await rollout.call("PromoteAlias", name=ALIAS, model=broken)

        async def failed() -> bool:
            return await rollout.states(broken) == ["FAILED"]

        await until(failed, "the worker says that it failed", 60)
        deployment = await rollout.deployment()
        (status,) = [one for one in deployment.status if one.artifact_digest == broken]
        print(f"failed workers: {status.failed_workers}, because: {status.error.message}")
        assert status.failed_workers == 1
        assert "damaged" in status.error.message
        assert not deployment.settled
        assert await rollout.meaning() == rollout.a
        await load.until_more(20, rollout.a)
        await rollout.call("PromoteAlias", name=ALIAS, model=rollout.a)
        await rollout.settled_on(rollout.a)

        async def gone() -> bool:
            return await rollout.states(broken) == []

        await until(gone, "the worker has let go of it", 30)
        await load.until_more(20, rollout.a)
    assert load.answers
    assert not [answer for answer in load.answers if answer.failure]
    assert {answer.digest for answer in load.answers} == {rollout.a}


@pytest.mark.slow
async def test_a_deployment_nobody_named_is_taken_up_by_as_many_as_are_wanted(rollout, prompts):
    workers = rollout.workers(2, models="")
    for worker in workers:
        worker.until_ready()
    target = {"artifact_digest": rollout.b, "configuration": {"dtype": "float32"}}
    wanted = {"alias": "other", "targets": [target], "warm_up_prompts": ["my king"]}
    await rollout.call("SetDeployment", deployment=wanted)
    await rollout.settled_on(rollout.b, alias="other")
    assert await rollout.states(rollout.b) == ["READY"]
    assert sorted(len(worker.children()) for worker in workers) == [0, 1]
    assert (await ask(rollout, prompts[0], "other")).digest == rollout.b
    (status,) = (await rollout.deployment("other")).status
    assert (status.ready_workers, status.configuration.dtype) == (1, "float32")
    (holder,) = [worker for worker in workers if worker.children()]
    (other,) = [worker for worker in workers if worker is not holder]
    holder.kill()
    seconds = await until(lambda: len(other.children()) == 1, "the other one takes it up", 60)
    print(f"taken up {seconds:.1f} s after the death, with leases of {LEASE_S:g} s")

    async def ready() -> bool:
        return await rollout.states(rollout.b) == ["READY"]

    await until(ready, "the other one is ready", 60)
    assert not (await ask(rollout, prompts[0], "other")).failure
    await rollout.call("DeleteDeployment", alias="other")
    await until(lambda: not other.children(), "its engine is gone", 60)

    async def released() -> bool:
        return not await rollout.leases()

    await until(released, "its lease is released", 30)

"""A worker whose registry says now this, now that: models are taken up, shared, warmed up and let go."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import fake_engine as fake
import pytest
from fake_registry import FakeRegistry
from waiting import until

from treadle.errors import FailedPrecondition, NotFound
from treadle.models.profile import ServingProfile
from treadle.queue.workers import heartbeats
from treadle_worker.config import EngineConfig, WorkerConfig
from treadle_worker.jobs import Artifact
from treadle_worker.models import retirement
from treadle_worker.worker import Worker

LEASE_S = 1.5


@dataclass
class Followed:
    """A running worker, the registry that it follows, and the engines that it started, oldest first."""

    worker: Worker
    registry: FakeRegistry
    engines: list[fake.FakeEngine] = field(default_factory=list)

    def hosts(self) -> dict[str, str]:
        """Artifacts with their hosts' states."""
        return {host.artifact.digest: host.state for host in self.worker.hosts}

    async def until_hosts(self, **states: str) -> None:
        wanted = {f"sha256:{name}": state for name, state in states.items()}
        await until(lambda: self.hosts() == wanted, f"{wanted}, not {self.hosts()}", 15)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(retirement, "SEEN_S", 0.1)
    monkeypatch.setattr(retirement, "LINGER_S", 0.2)


@pytest.fixture
def registry(folder: Path) -> FakeRegistry:
    stored = fake.stored_folder(folder)
    artifacts = {
        f"sha256:{name}": Artifact(
            f"sha256:{name}",
            f"sha256:c-{name}",
            "sha256:t",
            replace(stored, artifact_digest=f"sha256:{name}"),
        )
        for name in "abc"
    }
    return FakeRegistry(artifacts, {"toy": "sha256:a"})


@pytest.fixture
def following(redis_url: str, registry: FakeRegistry):
    @contextlib.asynccontextmanager
    async def running(make_engine=fake.FakeEngine, **settings) -> AsyncIterator[Followed]:
        async def start_engine(folder: Path, config: EngineConfig) -> fake.FakeEngine:
            found.engines.append(make_engine())
            return found.engines[-1]

        async def set_ready(ready: bool) -> None:
            pass

        defaults = {"name": "w", "models": ("toy",), "TREADLE_REDIS_URL": redis_url, "lease_s": LEASE_S}
        worker = Worker(
            WorkerConfig(**(defaults | settings)),
            EngineConfig(),
            registry=registry,
            watch=registry.watch,
            start_engine=start_engine,
            set_ready=set_ready,
        )
        found = Followed(worker, registry)
        async with worker.running():
            yield found

    return running


async def test_a_named_alias_is_followed_and_the_old_goes_when_the_new_serves(following, registry):
    async with following() as one:
        await one.until_hosts(a="ready")
        await until(lambda: registry.state_of("sha256:a") == ["ready"], "the lease says so")
        registry.deploy("toy", ["sha256:b"], ["sha256:a"])
        await one.until_hosts(a="ready", b="ready")
        await until(lambda: registry.state_of("sha256:b") == ["ready"], "the registry knows")
        # The lease on the old one is what it was: a deployment that names it is no other work.
        assert registry.num_acquired == 2
        registry.deploy("toy", ["sha256:b"], ["sha256:b"])
        await one.until_hosts(b="ready")
        await until(lambda: registry.state_of("sha256:a") == [], "the old lease is released")
        assert one.engines[0]._dead
        assert ("sha256:a", "toy", "draining") in registry.told
        assert one.worker.state == "ready"
    assert registry.given == {}


async def test_a_heartbeat_says_ready_before_the_lease_does(following, registry, redis, monkeypatch):
    seen = []
    renew = registry.renew_lease

    async def watched(lease_id, served, **fields):
        if served.state == "ready":
            beats = await heartbeats(redis)
            seen.append([one.artifact_digest for beat in beats for one in beat.profiles if one.max_model_len])
        await renew(lease_id, served, **fields)

    monkeypatch.setattr(registry, "renew_lease", watched)
    async with following():
        await until(lambda: registry.state_of("sha256:a") == ["ready"], "the lease says ready")
    assert seen[0] == ["sha256:a"]


async def test_requests_that_came_late_are_served_by_the_old(following, registry, ask, outcome, monkeypatch):
    monkeypatch.setattr(retirement, "SEEN_S", 0.0)
    profile = ServingProfile("sha256:c-a", "bfloat16").id
    async with following() as one:
        await one.until_hosts(a="ready")
        registry.deploy("toy", ["sha256:b"], ["sha256:b"])
        await one.until_hosts(a="draining", b="ready")
        await ask("late", 40, profile=profile)
        assert len((await outcome("late")).token_ids) == 40
        # One that runs for longer than the rest of the way out takes.
        monkeypatch.setattr(retirement, "LINGER_S", 0.0)
        await ask("long", 900, profile=profile)
        await until(lambda: one.engines[0].active == 1, "the long one runs")
        assert len((await outcome("long")).token_ids) == 900
        await one.until_hosts(b="ready")
        assert one.engines[1].added == []


async def test_a_model_that_is_wanted_again_goes_on_with_its_engine(following, registry, monkeypatch):
    monkeypatch.setattr(retirement, "LINGER_S", 30.0)
    async with following() as one:
        await one.until_hosts(a="ready")
        registry.deploy("toy", ["sha256:b"], ["sha256:b"])
        await one.until_hosts(a="draining", b="ready")
        registry.deploy("toy", ["sha256:a"], ["sha256:b"])
        await one.until_hosts(a="ready", b="ready")
        await until(lambda: registry.state_of("sha256:a") == ["ready"], "the registry knows")
        assert len(one.engines) == 2


async def test_equal_weights_and_tokenizer_share_an_engine(following, registry, folder):
    other = replace(registry.artifacts["sha256:a"], digest="sha256:template")
    registry.artifacts["sha256:template"] = other
    async with following() as one:
        await one.until_hosts(a="ready")
        registry.deploy("toy", ["sha256:template"], ["sha256:a"])
        await until(lambda: registry.state_of("sha256:template") == ["ready"], "it is ready at once")
        registry.deploy("toy", ["sha256:template"], ["sha256:template"])
        await one.until_hosts(template="ready")
        await until(lambda: registry.state_of("sha256:a") == [], "the old lease is released")
        assert len(one.engines) == 1


async def test_equal_weights_with_another_tokenizer_are_refused(following, registry):
    other = replace(registry.artifacts["sha256:a"], digest="sha256:x", tokenizer_digest="sha256:t2")
    registry.artifacts["sha256:x"] = other
    async with following() as one:
        await one.until_hosts(a="ready")
        registry.deploy("toy", ["sha256:x"], ["sha256:a"])
        await until(lambda: registry.state_of("sha256:x") == ["failed"], "it says that it cannot")
        (served,) = [served for served in registry.given.values() if served.state == "failed"]
        assert served.error.reason == "PROFILE_TAKEN"
        await one.until_hosts(a="ready")


async def test_others_deployments_are_taken_up_while_there_is_room(following, registry):
    async with following(models=(), max_deployed_models=3) as one:
        assert one.worker.state == "ready"
        for name in "abc":
            registry.deploy(f"alias-{name}", [f"sha256:{name}"], [])
        await until(lambda: list(one.hosts().values()) == ["ready", "ready"], "two are ready")
        assert registry.num_acquired == 2
        (left,) = {"sha256:a", "sha256:b", "sha256:c"} - one.hosts().keys()
        gone = next(iter(one.hosts()))
        registry.withdraw(f"alias-{gone.removeprefix('sha256:')}")
        await until(
            lambda: one.hosts().get(left) == "ready" and gone not in one.hosts(), "the third has room"
        )


async def test_what_others_serve_already_is_not_loaded(following, registry):
    async with following(models=()) as one, following(models=(), name="v") as other:
        registry.deploy("x", ["sha256:a"], [])
        await until(lambda: registry.state_of("sha256:a") == ["ready"], "one of them is ready")
        registry.deploy("x", ["sha256:a"], [], replicas=2)
        await until(lambda: registry.state_of("sha256:a") == ["ready", "ready"], "both are")
        assert one.hosts() == other.hosts() == {"sha256:a": "ready"}
        # The one that came second goes when fewer are wanted.
        second = registry.holders["lease-2"]
        registry.deploy("x", ["sha256:a"], ["sha256:a"], replicas=1)
        (leaving, staying) = (one, other) if one.worker.consumer == second else (other, one)
        await leaving.until_hosts()
        await until(lambda: registry.state_of("sha256:a") == ["ready"], "its lease is released")
        await staying.until_hosts(a="ready")


async def test_a_lease_that_was_taken_by_another_ends_only_when_that_one_is_ready(following, registry, redis):
    async with following(models=()) as one:
        registry.deploy("x", ["sha256:a"], [])
        await one.until_hosts(a="ready")
        taken = next(iter(registry.given.values()))
        registry.lapse()
        registry.given["another's"] = replace(taken, state="loading")
        host = one.worker.hosts[0]
        refused = partial(_refused, one)
        await until(refused, "it has asked and was refused", 10)
        assert host.state == "ready"
        async with following(name="v", models=("sha256:a",)):
            await until(lambda: one.hosts() == {}, "it goes, for another one is ready", 15)


def _refused(one: Followed) -> bool:
    return any(holding.keeper.refusal is not None for holding in one.worker.models.holdings)


async def test_a_registry_that_is_away_stops_nothing(following, registry, ask, outcome):
    profile = ServingProfile("sha256:c-a", "bfloat16").id
    async with following() as one:
        await one.until_hosts(a="ready")
        await until(lambda: registry.state_of("sha256:a") == ["ready"], "the lease says so")
        registry.leave()
        await ask("meanwhile", 40, profile=profile)
        assert len((await outcome("meanwhile")).token_ids) == 40
        registry.lapse()
        registry.away = False
        registry.deploy("toy", ["sha256:b"], ["sha256:a"])
        await one.until_hosts(a="ready", b="ready")
        await until(lambda: registry.state_of("sha256:a") == ["ready"], "another lease is acquired", 10)


class Answering(fake.FakeEngine):
    """Refuses the second warm-up prompt where it is told to."""

    refuses = False

    async def send(self, commands) -> None:
        if self.refuses and any(command.request_id == "warm-up-2" for command in commands):
            raise fake.Unavailable("no room", reason="ENGINE_GONE")
        await super().send(commands)


@pytest.mark.parametrize("refuses", [False, True])
async def test_warm_up_prompts_are_answered_before_it_is_ready(following, registry, monkeypatch, refuses):
    monkeypatch.setattr(Answering, "refuses", refuses)
    registry.deploy("toy", ["sha256:a"], [], warm_up_prompts=["Hello", "you"])
    async with following(make_engine=Answering) as one:
        if refuses:
            await until(lambda: registry.state_of("sha256:a") == ["failed"], "it says that it failed")
            (served,) = registry.given.values()
            assert served.error.reason == "WARM_UP_FAILED"
            assert "warm-up prompt 2" in served.error.message
            monkeypatch.setattr(Answering, "refuses", False)
        await one.until_hosts(a="ready")
        added = one.engines[-1].added
        assert [bytes(request.prompt_token_ids) for request in added] == [b"Hello", b"you"]
        assert all(request.sampling.max_new_tokens <= 16 for request in added)


class Encoder(fake.FakeEngine):
    """Cannot compute what has a tilde in it."""

    def __init__(self) -> None:
        super().__init__(tasks=("embed", "rank"), generates=False)


async def test_a_model_that_does_not_generate_is_warmed_up_with_its_first_task(following, registry):
    prompts = ["\1Hello", "\1you"]
    registry.deploy("toy", ["sha256:a"], [], warm_up_prompts=prompts)
    async with following(make_engine=Encoder) as one:
        await one.until_hosts(a="ready")
        (engine,) = one.engines
        assert [(asked.task, asked.pooling) for asked in engine.asked] == [("embed", "mean")] * 2
        texts = [bytes(text.token_ids).decode() for asked in engine.asked for text in asked.inputs]
        assert texts == prompts
        assert engine.added == []


async def test_a_task_that_fails_fails_the_warm_up(following, registry):
    registry.deploy("toy", ["sha256:a"], [], warm_up_prompts=["\1", "\1~"])
    async with following(make_engine=Encoder):
        await until(lambda: registry.state_of("sha256:a") == ["failed"], "it says that it failed")
        (served,) = registry.given.values()
        assert served.error.reason == "WARM_UP_FAILED"
        assert "warm-up prompt 2" in served.error.message


async def test_unknown_artifacts_are_asked_for_again(following, registry):
    artifact = registry.artifacts.pop("sha256:a")
    async with following() as one:
        await until(lambda: registry.state_of("sha256:a") == ["loading"], "its lease is there")
        assert one.worker.state == "loading"
        registry.artifacts["sha256:a"] = artifact
        await one.until_hosts(a="ready")


async def test_a_model_is_loaded_and_unloaded_by_hand(following, registry):
    async with following(deployments=False) as one:
        await one.until_hosts(a="ready")
        by_hand = one.worker.by_hand
        holding = await by_hand.load("sha256:b")
        profile = holding.host.profile
        assert one.hosts() == {"sha256:a": "ready", "sha256:b": "ready"}
        with pytest.raises(FailedPrecondition) as caught:
            await by_hand.unload(one.worker.hosts[0].profile)
        assert caught.value.reason == "MODEL_WANTED"
        await by_hand.unload(profile)
        assert one.hosts() == {"sha256:a": "ready"}
        with pytest.raises(NotFound):
            await by_hand.unload(profile)
        with pytest.raises(NotFound):
            await by_hand.load("nothing")
        registry.point("deployed", "sha256:c")
        registry.deploy("deployed", ["sha256:c"], [], warm_up_prompts=[""])
        with pytest.raises(FailedPrecondition, match="warm-up prompt 1"):
            await by_hand.load("deployed")
        await one.until_hosts(a="ready")


async def test_an_encoder_is_served_in_float32_once_it_is_known(following, registry, redis):
    """Named by a digest, so that nothing is known of it before: a decoder's dtype is never served."""
    registry.artifacts["sha256:a"] = replace(registry.artifacts["sha256:a"], is_encoder=True)
    async with following(models=("sha256:a", "sha256:b")) as one:
        await one.until_hosts(a="ready", b="ready")
        await until(
            lambda: registry.state_of("sha256:a") == ["ready"], "its lease says so, and is the only one"
        )
        profiles = {host.artifact.digest: host.profile for host in one.worker.hosts}
        assert profiles == {
            "sha256:a": ServingProfile("sha256:c-a", "float32").id,
            "sha256:b": ServingProfile("sha256:c-b", "bfloat16").id,
        }
        said = {served.artifact_digest: served.configuration.dtype for served in registry.given.values()}
        assert said == {"sha256:a": "float32", "sha256:b": "bfloat16"}
        assert len(one.engines) == 2
        beats = await heartbeats(redis)
        assert {profile.dtype for beat in beats for profile in beat.profiles} == {"float32", "bfloat16"}


async def test_engines_of_one_worker_take_turns(following, registry, ask, outcome):
    async with following(partial(fake.FakeEngine, 0.004), models=("sha256:a", "sha256:b")) as one:
        await one.until_hosts(a="ready", b="ready")
        (device,) = one.worker._links.turns.devices.values()
        profiles = [ServingProfile(f"sha256:c-{name}", "bfloat16").id for name in "ab"]
        before = device.num_handovers
        asked = [(f"{profile}-{number}", profile) for profile in profiles for number in range(3)]
        for request_id, profile in asked:
            await ask(request_id, 200, profile=profile)
        for request_id, _ in asked:
            assert len((await outcome(request_id)).token_ids) == 200
        handovers = device.num_handovers - before
        seats = [host.running.seat for host in one.worker.hosts]
        print(f"{handovers} hand-overs; used {[round(seat.used_s, 2) for seat in seats]} s")
        assert handovers > 2
        assert all(seat.used_s > 0 and seat.waited_s > 0 for seat in seats)
        assert [engine.has_turn for engine in one.engines].count(True) == 1
        # The one that has the turn dies: the other one goes on, and so does the one that comes after it.
        holder = next(engine for engine in one.engines if engine.has_turn)
        for profile in profiles:
            await ask(f"{profile}-again", 300, profile=profile)
        await until(lambda: all(engine.active for engine in one.engines), "both have something to do")
        holder.die()
        for profile in profiles:
            assert len((await outcome(f"{profile}-again")).token_ids) == 300

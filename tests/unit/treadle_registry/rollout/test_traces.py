"""Thousands of random operations, deaths among them: what must hold after every one of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rollout_parts import BFLOAT16, INT8, RolloutParts, digest_of

from treadle.errors import TreadleError
from treadle_registry.eviction import plan_eviction
from treadle_registry.rollout.deployment import Deployment, Target
from treadle_registry.rollout.lease import Configuration, Lease, Serving, ServingState, serving_leases
from treadle_registry.rollout.leasing import LeaseRequest
from treadle_registry.store.blob_use import Share

DIGESTS = [digest_of(number) for number in range(5)]
ALIASES = ["prod", "next", "old"]
CONFIGURATIONS = [Configuration(), BFLOAT16, INT8]
READY = ServingState.READY


class Trace:
    """Does what chance says, and remembers which artifacts an alias may mean."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.parts, self.rng = RolloutParts(folder, DIGESTS), rng
        self.leases: list[Lease] = []
        self.ready: dict[str, set[str]] = {alias: set() for alias in ALIASES}
        """Artifacts that a worker was ready for under an alias, or that it was pointed at while unserved."""
        self.served: dict[str, list[Target]] = {}
        self.told: dict[tuple[str, str], object] = {}
        self.counts: Counter[str] = Counter()

    def step(self) -> None:
        """One operation, and every promise."""
        operation = self.rng.choices(
            [
                self.deploy,
                self.promote,
                self.roll_back,
                self.set_alias,
                self.acquire,
                self.renew,
                self.release,
                self.wait,
                self.undeploy,
                self.restart,
                self.evict,
            ],
            [6, 4, 2, 3, 20, 25, 4, 6, 1, 1, 3],
        )[0]
        name = operation.__name__
        try:
            operation()
            self.counts[name] += 1
        except TreadleError as error:
            self.counts[f"{name}: {error.reason}"] += 1
        self.check()

    def alias(self) -> str:
        return self.rng.choice(ALIASES)

    def digest(self) -> str:
        return self.rng.choice(DIGESTS)

    def deploy(self) -> None:
        targets = tuple(
            Target(self.digest(), self.rng.choice(CONFIGURATIONS), self.rng.choice([0, 1, 9]))
            for _ in range(self.rng.choice([1, 1, 2]))
        )
        self.parts.deploying.set_deployment(Deployment(self.alias(), targets, self.rng.randint(1, 3)))

    def promote(self) -> None:
        self._freely(lambda alias: self.parts.deploying.promote(alias, self.digest()))

    def roll_back(self) -> None:
        self._freely(lambda alias: self.parts.deploying.roll_back(alias, steps=self.rng.choice([1, 1, 2])))

    def set_alias(self) -> None:
        self._freely(lambda alias: self.parts.deploying.set_alias(alias, self.digest()))

    def _freely(self, move: Callable[[str], object]) -> None:
        """A move that may be at once where nobody serves the alias."""
        alias = self.alias()
        rollouts = self.parts.rollouts
        self.parts.leasing.lapse()
        unserved = rollouts.deployment(alias) is None and not serving_leases(
            rollouts.leases_under(alias).values()
        )
        move(alias)
        if unserved:
            self.ready[alias].add(self.parts.means(alias))

    def acquire(self) -> None:
        alias, state = self.alias(), self.rng.choice([*ServingState])
        configuration = self.rng.choice(CONFIGURATIONS[1:])
        serving = None if self.rng.random() < 0.1 else Serving(configuration, state, alias)
        lasting_s = self.rng.choice([5.0, 60.0])
        lease = self.parts.leasing.acquire(
            LeaseRequest(self.digest(), "w", time_to_live_s=lasting_s, serving=serving)
        )
        self._given(lease)
        self.leases.append(lease)

    def renew(self) -> None:
        lease = self.rng.choice(self.leases)
        before = self.parts.rollouts.book.get(lease.lease_id)
        serving = lease.serving and Serving(
            lease.serving.configuration, self.rng.choice([*ServingState]), lease.alias
        )
        renewed = self.parts.leasing.renew(lease.lease_id, None, serving)
        assert before is not None
        if before.state is ServingState.DRAINING:
            self._given(renewed)
        elif renewed.state is READY:
            self.ready[renewed.alias].add(renewed.digest)

    def _given(self, lease: Lease) -> None:
        """Nobody is given a place that is not there."""
        if lease.state is READY:
            self.ready[lease.alias].add(lease.digest)
        deployment = self.parts.rollouts.deployment(lease.alias) if lease.alias else None
        if deployment is None:
            return
        if lease.state is None or not lease.state.takes_a_place:
            return
        target = deployment.target_of(lease)
        assert target is not None
        under = self.parts.rollouts.leases_under(lease.alias).values()
        taken = [other for other in under if other.state is not ServingState.DRAINING and target.fits(other)]
        assert len(taken) <= deployment.replicas
        self.counts["places given"] += 1

    def release(self) -> None:
        lease = self.rng.choice(self.leases)
        self.parts.leasing.release(lease.lease_id)

    def wait(self) -> None:
        self.parts.now += self.rng.choice([1.0, 4.0, 30.0])

    def undeploy(self) -> None:
        self.parts.deploying.delete_deployment(self.alias())

    def restart(self) -> None:
        self.check()
        before = {alias: self.parts.rollouts.view(alias) for alias in ALIASES}
        self.parts.restart()
        self.told.clear()
        assert {alias: self.parts.rollouts.view(alias) for alias in ALIASES} == before

    def evict(self) -> None:
        """Everything that may go goes, and comes back: an import."""
        self.parts.leasing.lapse()
        held = self.parts.rollouts.held()
        shares = {digest: Share({digest: 10}) for digest in DIGESTS}
        plan = plan_eviction(shares, self.parts.catalog.artifacts.last_uses(), held, 0)
        going = set(plan.going)
        rollouts, book = self.parts.rollouts, self.parts.rollouts.book
        for alias in ALIASES:
            assert self.parts.means(alias) not in going
            if deployment := rollouts.deployment(alias):
                assert not deployment.digests() & going
        assert not {lease.digest for lease in book.page(0, 10_000, "")} & going
        assert set(DIGESTS) - going == set(held)
        self.counts["evicted"] += len(going)
        self.counts["kept"] += len(DIGESTS) - len(going)

    def check(self) -> None:
        rollouts = self.parts.rollouts
        for change in self.parts.changes:
            self.told[change.kind, change.name] = change.value
        self.parts.changes.clear()
        for alias in ALIASES:
            means = self.parts.means(alias)
            assert not means or means in self.ready[alias], (alias, means)
            assert self.told.get(("deployment", alias)) == rollouts.view(alias)
            assert self.told.get(("alias", alias)) == rollouts.alias(alias)
            self._check_served(alias)

    def _check_served(self, alias: str) -> None:
        """What joins was ready; nothing is dropped before all that is wanted has joined."""
        deployment, before = self.parts.rollouts.deployment(alias), self.served.get(alias)
        if deployment is None:
            self.served.pop(alias, None)
            return
        served = list(deployment.serving)
        for target in served:
            if target.weight:
                assert target.digest in self.ready[alias]
        if before is not None and served != list(deployment.targets):
            for target in before[-2:]:
                assert any(target.is_same(other) for other in served)
        self.counts["settled" if deployment.settled else "under way"] += 1
        self.served[alias] = served


def test_random_traces(tmp_path: Path, rng: random.Random):
    counts: Counter[str] = Counter()
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        trace = Trace(tmp_path / str(number), rng)
        trace.parts.catalog.database.execute("PRAGMA synchronous = OFF")
        trace.leases.append(trace.parts.leasing.acquire(LeaseRequest(DIGESTS[0], "w")))
        for _ in range(250):
            trace.step()
        trace.parts.close()
        counts += trace.counts
    for name, count in sorted(counts.items()):
        print(f"{count:6} {name}")
    for name in (
        *("deploy", "promote", "roll_back", "set_alias", "acquire", "renew", "release", "restart", "evict"),
        *("acquire: REPLICAS_TAKEN", "acquire: NOT_WANTED", "set_alias: NO_WORKER_READY", "places given"),
        *("renew: LEASE_NOT_FOUND", "settled", "under way", "evicted", "kept"),
    ):
        assert counts[name] > 0, name

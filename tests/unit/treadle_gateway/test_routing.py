"""Where names lead: aliases, deployments, and the draw between two artifacts."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from treadle.deployments import Deployment, KnownModels, ServingConfiguration, Target
from treadle.errors import Unavailable
from treadle_gateway.artifact import Artifact, GenerationDefaults
from treadle_gateway.models import ArtifactCache, Loaded, Models
from treadle_gateway.routing import drawn, routes

A, B = Target("sha256:a", weight=80), Target("sha256:b", weight=20)
DRAWS = 20_000


def known(deployment: Deployment | None = None, **aliases: str) -> KnownModels:
    models = KnownModels()
    models.aliases.update(aliases)
    if deployment is not None:
        models.set_deployment(deployment)
    return models


def digests(targets: list[Target]) -> list[str]:
    return [target.artifact_digest for target in targets]


def test_without_a_deployment_an_alias_leads_to_its_artifact():
    assert routes(None, "x", "id") == []
    assert routes(known(x="sha256:a"), "y", "id") == []
    assert digests(routes(known(x="sha256:a"), "x", "id")) == ["sha256:a"]


def test_what_is_wanted_comes_after_what_is_served():
    deployment = Deployment("x", targets=(B,), serving=(A,))
    assert digests(routes(known(deployment, x="sha256:a"), "x", "id")) == ["sha256:a", "sha256:b"]
    assert digests(routes(known(Deployment("x", (B,), (B,))), "x", "id")) == ["sha256:b"]
    assert digests(routes(known(Deployment("x", (B,))), "x", "id")) == ["sha256:b"]


def test_a_canary_is_drawn_by_weight_and_by_id_alone(rng):
    ids = [f"{rng.getrandbits(64):x}" for _ in range(DRAWS)]
    firsts = [drawn((A, B), one)[0] for one in ids]
    share = firsts.count(B) / DRAWS
    bound = 4 * math.sqrt(0.2 * 0.8 / DRAWS)
    print(f"{share:.4f} of {DRAWS} ids went to the canary of 0.2, within {bound:.4f}")
    assert abs(share - 0.2) < bound
    assert firsts == [drawn((B, A), one)[0] for one in ids]
    # With a larger share it keeps every id that it had, and no id goes the other way.
    larger = [drawn((replace(A, weight=50), replace(B, weight=50)), one)[0].artifact_digest for one in ids]
    moved = sum(now != before.artifact_digest for now, before in zip(larger, firsts, strict=True))
    assert all(now == "sha256:b" for now, first in zip(larger, firsts, strict=True) if first == B)
    print(f"{moved / DRAWS:.3f} moved when the canary grew from 0.2 to 0.5")
    assert 0.25 < moved / DRAWS < 0.35


def test_of_two_one_without_weight_gets_nothing():
    assert digests(drawn((A, replace(B, weight=0)), "id")) == ["sha256:a"]
    assert digests(drawn((replace(A, weight=0),), "id")) == ["sha256:a"]
    assert drawn((), "id") == []


ARTIFACTS = {
    digest: Artifact(digest, f"c{digest}", "sha256:t", 100, 64, GenerationDefaults())
    for digest in ("sha256:a", "sha256:b")
}


class Store:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.away = False

    async def resolve(self, model: str, *, timeout_s: float) -> Artifact:
        self.asked.append(model)
        if self.away:
            raise Unavailable("away")
        return ARTIFACTS[model]


def loaded(digest: str, worker: str = "w1", **fields: object) -> Loaded:
    artifact = ARTIFACTS[digest]
    plain = Loaded(f"p{digest}", digest, artifact.compute_digest, "sha256:t", "x", 64, 100, True)
    return replace(plain, worker=worker, **fields)


@pytest.fixture
def store() -> Store:
    return Store()


def models(store: Store, having: list[Loaded], deployment: Deployment) -> Models:
    async def read() -> list[Loaded]:
        return list(having)

    return Models(ArtifactCache(store, timeout_s=1), read, lambda: known(deployment))


async def test_a_canary_without_a_ready_worker_gets_no_requests(store):
    canary = Deployment("x", (A, B), (A, B))
    having = [loaded("sha256:a"), loaded("sha256:b", ready=False)]
    both = models(store, [loaded("sha256:a"), loaded("sha256:b")], canary)
    one = models(store, having, canary)
    found = {(await both.find("x", "", f"id-{number}")).artifact.digest for number in range(100)}
    assert found == {"sha256:a", "sha256:b"}
    found = {(await one.find("x", "", f"id-{number}")).artifact.digest for number in range(100)}
    assert found == {"sha256:a"}


async def test_what_took_its_place_answers_where_the_news_has_not_arrived(store):
    deployment = Deployment("x", targets=(B,), serving=(A,))
    having = [loaded("sha256:b")]
    assert (await models(store, having, deployment).find("x")).artifact.digest == "sha256:b"


async def test_a_worker_that_has_just_become_ready_is_seen(store):
    having = [loaded("sha256:b", ready=False)]
    found = models(store, having, Deployment("x", (B,), (B,)))
    with pytest.raises(Unavailable):
        await found.find("x")
    having[0] = loaded("sha256:b")
    assert (await found.find("x")).artifact.digest == "sha256:b"
    assert await found.is_ready(await found.find("x"))


async def test_requests_that_find_nobody_ready_share_a_look(store):
    reads = 0

    async def read() -> list[Loaded]:
        nonlocal reads
        reads += 1
        await asyncio.sleep(0.01)
        return []

    found = Models(ArtifactCache(store, timeout_s=1), read, lambda: known(x="sha256:a"))
    outcomes = await asyncio.gather(*(found.find("x") for _ in range(50)), return_exceptions=True)
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    print(f"{reads} looks for 50 requests")
    assert reads <= 3


async def test_only_the_wanted_configuration_answers(store):
    wanted = Target("sha256:a", ServingConfiguration(quantization="int8"))
    having = [
        loaded("sha256:a", configuration=ServingConfiguration("bfloat16", "", "bfloat16")),
        loaded("sha256:a", "w2", profile="p8", configuration=ServingConfiguration("bfloat16", "int8")),
    ]
    assert (await models(store, having, Deployment("x", (wanted,), (wanted,))).find("x")).profile == "p8"


async def test_what_the_watch_has_said_is_learned_before_the_registry_goes(store):
    deployment = Deployment("x", targets=(B,), serving=(A,))
    found = models(store, [loaded("sha256:a")], deployment)
    await found.watched(known(deployment), "")
    assert sorted(store.asked) == ["sha256:a", "sha256:b"]
    store.away = True
    assert (await found.find("x")).artifact.digest == "sha256:a"

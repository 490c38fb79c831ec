"""Which model answers: names, readiness, and what is known while the registry is away."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from treadle.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, Unavailable, invalid_field
from treadle_gateway import models
from treadle_gateway.artifact import Artifact, GenerationDefaults
from treadle_gateway.models import ArtifactCache, Loaded, Models

ARTIFACT = Artifact("sha256:a", "sha256:c", "sha256:t", 100, 64, GenerationDefaults())
LOADED = Loaded("p-1", "sha256:a", "sha256:c", "sha256:t", "tiny", 50, 100, True)


class StubRegistry:
    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None
        self.artifact = ARTIFACT

    async def resolve(self, model: str, *, timeout_s: float) -> Artifact:
        self.calls += 1
        await asyncio.sleep(0.01)
        if self.error:
            raise self.error
        return self.artifact


@pytest.fixture
def registry() -> StubRegistry:
    return StubRegistry()


def find(registry: StubRegistry, loaded: list[Loaded], *asked: str):
    async def read() -> list[Loaded]:
        return loaded

    return Models(ArtifactCache(registry, timeout_s=1), read).find("tiny", *asked)


async def test_the_profile_with_most_workers_answers_within_what_all_can_take(registry):
    other = replace(LOADED, profile="p-0")
    second = replace(LOADED, max_model_len=40, vocab_size=98, worker="w2")
    # One of the workers serves two artifacts with the engine.
    loaded = [other, LOADED, second, replace(second, artifact_digest="b"), replace(other, ready=False)]
    model = await find(registry, loaded)
    assert (model.profile, model.max_model_len, model.vocab_size, model.ready_workers) == ("p-1", 40, 98, 2)
    assert (await find(registry, loaded, "p-0")).ready_workers == 1


async def test_another_presentation_is_served_by_the_same_profile(registry):
    model = await find(registry, [replace(LOADED, artifact_digest="sha256:other-template")])
    assert model.artifact.digest == "sha256:a"


@pytest.mark.parametrize(
    "loaded",
    [
        [],
        [replace(LOADED, ready=False)],
        [replace(LOADED, compute_digest="sha256:x")],
        [replace(LOADED, tokenizer_digest="sha256:x")],
    ],
)
async def test_what_nobody_serves_is_unavailable(registry, loaded):
    with pytest.raises(Unavailable) as caught:
        await find(registry, loaded)
    assert caught.value.reason == "MODEL_NOT_SERVED"
    assert caught.value.retry_after_s


DAMAGED = DataLoss("config.json is damaged", reason="DAMAGED_FILE", metadata={"file": "config.json"})
FAILED = replace(LOADED, ready=False, error=DAMAGED)


async def test_damaged_files_are_said_while_nobody_else_may_come_to_serve(registry):
    for asked in ((), ("p-1",)):
        with pytest.raises(DataLoss, match=r"config\.json is damaged") as caught:
            await find(registry, [FAILED, FAILED], *asked)
        assert caught.value is not DAMAGED
        assert (caught.value.reason, caught.value.metadata) == ("DAMAGED_FILE", {"file": "config.json"})
    loading = replace(LOADED, ready=False)
    with pytest.raises(Unavailable, match=r"config\.json is damaged"):
        await find(registry, [FAILED, loading])
    with pytest.raises(Unavailable, match="ended with exit code -9"):
        await find(registry, [replace(FAILED, error=Unavailable("it ended with exit code -9"))])
    assert (await find(registry, [FAILED, LOADED])).ready_workers == 1


async def test_a_profile_that_is_not_served_names_those_that_are(registry):
    with pytest.raises(FailedPrecondition, match="served as p-1, not as 'p-2'"):
        await find(registry, [LOADED], "p-2")
    with pytest.raises(Unavailable):
        await find(registry, [LOADED, replace(LOADED, profile="p-2", ready=False)], "p-2")


async def test_many_at_once_ask_once_and_one_that_leaves_spoils_nothing(registry):
    cache = ArtifactCache(registry, timeout_s=1)
    tasks = [asyncio.create_task(cache.resolve("tiny")) for _ in range(10)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[1:] == [ARTIFACT] * 9
    assert registry.calls == 1


async def test_what_was_known_outlives_the_registry(registry, monkeypatch):
    monkeypatch.setattr(models, "ARTIFACT_FRESH_S", 0.0)
    cache = ArtifactCache(registry, timeout_s=1)
    await cache.resolve("tiny")
    registry.error = Unavailable("away")
    assert await cache.resolve("tiny") == ARTIFACT
    with pytest.raises(Unavailable) as caught:
        await cache.resolve("other")
    assert caught.value.reason == "REGISTRY_UNAVAILABLE"
    registry.error = NotFound("deleted")
    with pytest.raises(NotFound) as found:
        await cache.resolve("tiny")
    assert found.value.fields[0].field == "generation.model"
    registry.error = Unavailable("away")
    with pytest.raises(Unavailable):
        await cache.resolve("tiny")


async def test_a_name_that_cannot_be_one_is_said_of_the_requests_field(registry):
    registry.error = invalid_field("model", "must be 1 to 64 letters")
    with pytest.raises(
        InvalidArgument, match=r"^generation\.model: must be 1 to 64 letters\. ListModels"
    ) as caught:
        await ArtifactCache(registry, timeout_s=1).resolve("../x")
    assert [violation.field for violation in caught.value.fields] == ["generation.model"]


async def test_an_alias_that_moved_is_followed(registry, monkeypatch):
    monkeypatch.setattr(models, "ARTIFACT_FRESH_S", 0.0)
    cache = ArtifactCache(registry, timeout_s=1)
    assert await cache.resolve("tiny") == ARTIFACT
    registry.artifact = replace(ARTIFACT, digest="sha256:b")
    assert (await cache.resolve("tiny")).digest == "sha256:b"


async def test_what_is_remembered_is_bounded(registry, monkeypatch):
    monkeypatch.setattr(models, "MAX_CACHED", 3)
    cache = ArtifactCache(registry, timeout_s=1)
    for number in range(6):
        await cache.resolve(str(number))
    for number in range(3, 6):
        await cache.resolve(str(number))
    assert registry.calls == 6
    await cache.resolve("0")
    assert registry.calls == 7

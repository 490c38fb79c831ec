"""Names and artifacts: aliases that move, a registry that is away, one load at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from treadle.errors import DataLoss, DeadlineExceeded, FailedPrecondition, NotFound, TreadleError, Unavailable
from treadle.models.stored_folder import StoredFile, StoredFolder, file_digest
from treadle_tokenizer.load_once import LoadOnce
from treadle_tokenizer.models import Artifact, Models


class HeldRegistry:
    """What a test says it knows."""

    def __init__(self) -> None:
        self.artifacts: dict[str, Artifact] = {}
        self.error: TreadleError | None = None
        self.num_asked = 0

    async def resolve(self, model: str) -> Artifact:
        self.num_asked += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if model not in self.artifacts:
            raise NotFound(f"no model {model!r}")
        return self.artifacts[model]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def artifact(name: str, folder: Path, presentation: str = "p") -> Artifact:
    """An artifact of what lies in the folder now."""
    paths = folder.iterdir() if folder.exists() else ()
    files = tuple(StoredFile(path.name, file_digest(path), path.stat().st_size) for path in paths)
    stored = StoredFolder(folder, f"sha256:{name}", files)
    return Artifact(f"sha256:{name}", "sha256:t", f"sha256:{presentation}", stored)


@pytest.fixture
def registry(folder: Path) -> HeldRegistry:
    held = HeldRegistry()
    held.artifacts["words"] = artifact("a", folder)
    held.artifacts["others"] = artifact("b", folder, "q")
    return held


async def test_asked_once_within_the_time(registry: HeldRegistry) -> None:
    clock = Clock()
    models = Models(registry, resolve_ttl_s=1.0, clock=clock)
    first, second = await asyncio.gather(models.get("words"), models.get("words"))
    assert first == second
    assert registry.num_asked == 1
    clock.now += 0.9
    await models.get("words")
    assert registry.num_asked == 1
    clock.now += 0.2
    registry.artifacts["words"] = registry.artifacts["others"]
    assert (await models.get("words")).artifact_digest == "sha256:b"
    assert registry.num_asked == 2


async def test_a_tokenizer_is_loaded_once(registry: HeldRegistry) -> None:
    models = Models(registry)
    found = await asyncio.gather(*(models.get(name) for name in ["words", "others"] * 20))
    assert models.num_loads == 1
    assert len({id(model.tokenizer) for model in found}) == 1
    assert {model.artifact_digest for model in found} == {"sha256:a", "sha256:b"}
    assert found[0].tokenizer.digest == "sha256:t"
    assert found[0].chat_template is not None
    assert found[0].chat_template.special_tokens["cls_token"] == "[CLS]"


@pytest.mark.parametrize("error", [Unavailable("away"), DeadlineExceeded("slow")])
async def test_a_registry_that_is_away(registry: HeldRegistry, error: TreadleError) -> None:
    clock = Clock()
    models = Models(registry, resolve_ttl_s=1.0, clock=clock)
    known = await models.get("words")
    registry.error = error
    for _ in range(3):
        clock.now += 10
        assert await models.get("words") == known
    assert registry.num_asked == 4
    # It is not asked again for each request.
    await models.get("words")
    assert registry.num_asked == 4
    with pytest.raises(Unavailable) as caught:
        await models.get("others")
    assert caught.value.reason == "REGISTRY_UNAVAILABLE"
    assert caught.value.retry_after_s
    registry.error = None
    clock.now += 10
    assert await models.get("words") == known


async def test_what_the_registry_no_longer_knows(registry: HeldRegistry) -> None:
    clock = Clock()
    models = Models(registry, clock=clock)
    await models.get("words")
    del registry.artifacts["words"]
    clock.now += 2
    for _ in range(2):
        with pytest.raises(NotFound):
            await models.get("words")
    registry.error = Unavailable("away")
    with pytest.raises(Unavailable):
        await models.get("words")


async def test_names_are_bounded(registry: HeldRegistry, folder: Path) -> None:
    models = Models(registry, max_resolved=3)
    for number in range(10):
        registry.artifacts[f"m{number}"] = artifact(str(number), folder)
        await models.get(f"m{number}")
    assert models._names.names == ["m7", "m8", "m9"]


async def test_files_that_are_not_there(registry: HeldRegistry, tmp_path: Path) -> None:
    models = Models(registry)
    registry.artifacts["gone"] = artifact("gone", tmp_path / "gone")
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as caught:
            await models.get("gone")
        assert caught.value.reason == "TOKENIZER_NOT_LOADABLE"
    # A failure is not kept.
    assert models.num_loads == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
async def test_files_that_changed_are_not_used(registry: HeldRegistry, folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        models = Models(registry)
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (folder / name).write_bytes(flipped)
        with pytest.raises(DataLoss) as caught:
            await models.get("words")
        assert (caught.value.reason, caught.value.metadata["file"]) == ("DAMAGED_FILE", name)
        (folder / name).write_bytes(whole)
        assert (await models.get("words")).artifact_digest == "sha256:a"


async def test_a_file_that_the_registry_does_not_know_is_not_used(
    registry: HeldRegistry, folder: Path
) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(DataLoss, match="none of the model's files"):
        await Models(registry).get("words")


async def test_load_once_keeps_the_last_ones() -> None:
    loads: list[int] = []
    cache: LoadOnce[int, int] = LoadOnce(2)

    async def value(key: int) -> int:
        async def load() -> int:
            loads.append(key)
            await asyncio.sleep(0)
            return -key

        return await cache.get(key, load)

    assert await asyncio.gather(*map(value, [1, 1, 2, 2, 1])) == [-1, -1, -2, -2, -1]
    assert loads == [1, 2]
    await value(1)
    await value(3)
    await value(1)
    assert loads == [1, 2, 3]
    await value(2)
    assert loads == [1, 2, 3, 2]


async def test_load_once_outlives_its_first_caller() -> None:
    cache: LoadOnce[str, str] = LoadOnce(2)
    go_on = asyncio.Event()

    async def load() -> str:
        await go_on.wait()
        return "loaded"

    first = asyncio.create_task(cache.get("key", load))
    second = asyncio.create_task(cache.get("key", load))
    await asyncio.sleep(0)
    first.cancel()
    go_on.set()
    assert await second == "loaded"
    assert first.cancelled()
    assert cache.num_loads == 1


async def test_close_calls_off_what_is_loading() -> None:
    cache: LoadOnce[str, str] = LoadOnce(2)
    waiting = asyncio.create_task(cache.get("key", asyncio.Event().wait))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await cache.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting

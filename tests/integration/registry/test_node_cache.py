"""The node cache: fetched once, shared by processes, bounded by bytes, and never half there."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from damage import flip
from registry_stubs import RegistryStubs, write_folder

from treadle.errors import DataLoss, FailedPrecondition, NotFound, ResourceExhausted
from treadle.models.stored_folder import StoredFile, StoredFolder
from treadle.transfer import download
from treadle.transfer.config import NodeCacheConfig
from treadle.transfer.node_cache import NodeCache
from treadle_registry.store.store import Store

ELSEWHERE = Path("/nowhere/on/this/machine")


@pytest.fixture
async def caches(client: RegistryStubs, tmp_path: Path) -> AsyncIterator[Callable[..., NodeCache]]:
    """Makes caches over one folder, each as another process would."""
    made: list[NodeCache] = []

    def make(max_bytes: int = 1 << 30) -> NodeCache:
        config = NodeCacheConfig(folder=tmp_path / "node", max_bytes=max_bytes)
        made.append(NodeCache(config, client.registry))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests of what came over the network."""
    digests: list[str] = []
    real = download._receive

    async def receive(stub: object, target: download.Target, *rest: object) -> int:
        count = await real(stub, target, *rest)
        digests.extend([target.file.digest] * bool(count))
        return count

    monkeypatch.setattr(download, "_receive", receive)
    return digests


async def imported(client: RegistryStubs, folder: Path, seed: int = 0) -> StoredFolder:
    """A model that lies where this machine cannot read it."""
    artifact = (await client.imported(folder=str(write_folder(folder, seed)))).artifact
    files = tuple(StoredFile(file.path, file.digest, file.bytes) for file in artifact.files)
    return StoredFolder(ELSEWHERE, artifact.digest, files)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights_of(folder: StoredFolder) -> StoredFile:
    return {file.path: file for file in folder.files}["model.safetensors"]


async def test_a_folder_that_can_be_read_is_given_as_it_is(client: RegistryStubs, caches, tmp_path: Path):
    found = await imported(client, tmp_path / "m")
    here = StoredFolder(Store(client.store).get(found.artifact_digest).canonical_folder, "", found.files)
    assert await caches().obtain(here) is here
    (here.path / "config.json").unlink()
    assert await caches().obtain(here) is here, "what is missing there is damage"
    assert "node" not in names(tmp_path)


async def test_all_who_want_it_at_once_fetch_it_once(client: RegistryStubs, caches, received, tmp_path: Path):
    wanted = await imported(client, tmp_path / "m")
    processes = [caches() for _ in range(4)]
    folders = await asyncio.gather(*(process.obtain(wanted) for process in processes for _ in range(2)))
    assert len({folder.path for folder in folders}) == 1
    assert folders[0].verify() == sum(file.size for file in wanted.files)
    different = {file.digest for file in wanted.files}
    assert sorted(received) == sorted(different)
    print(f"{len(folders)} wanted {len(wanted.files)} files, {len(received)} fetches")
    # A part, and then the rest.
    other = await imported(client, tmp_path / "other", 1)
    part = await caches().obtain(other, ["tokenizer.json", "config.json"])
    assert names(part.path) == {"tokenizer.json", "config.json"}
    (await caches().obtain(other)).verify()
    assert len(received) == len(different | {file.digest for file in other.files})
    assert len(different & {file.digest for file in other.files}) >= 2, (
        "what two models share is fetched once"
    )


def _point_elsewhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda folder: flip(folder / "model.safetensors"),
    "gone": lambda folder: (folder / "model.safetensors").unlink(),
    "a stranger": lambda folder: (folder / "more.safetensors").write_text("?"),
    "a link elsewhere": lambda folder: _point_elsewhere(folder / "model.safetensors"),
}


@pytest.mark.parametrize("case", DAMAGE)
async def test_damage_is_put_right(client: RegistryStubs, caches, received, tmp_path: Path, case: str):
    wanted = await imported(client, tmp_path / "m")
    folder = (await caches().obtain(wanted)).path
    before = len(received)
    DAMAGE[case](folder)
    (await caches().obtain(wanted)).verify()
    print(f"{case}: {len(received) - before} fetched again")
    assert len(received) - before == (case == "flipped")


async def test_what_was_used_least_recently_gives_way(
    client: RegistryStubs, caches, received, tmp_path: Path
):
    models = [await imported(client, tmp_path / f"m{seed}", seed) for seed in range(4)]
    weights = weights_of(models[0]).size
    small = sum({file.digest: file.size for file in models[0].files}.values()) - weights
    # Room for two models, which share what is small.
    bound = small + 2 * weights + weights // 2
    for model in (models[0], models[1], models[0]):
        async with caches(bound).held(model):
            pass
    artifacts = tmp_path / "node" / "artifacts"
    async with caches(bound).held(models[2]) as third:
        third.verify()
        used = sum(path.stat().st_size for path in (tmp_path / "node" / "blobs").iterdir())
        print(f"{used} bytes of {bound}")
        assert used <= bound
        kept = {model.artifact_digest.removeprefix("sha256:") for model in (models[0], models[2])}
        assert {path.name for path in artifacts.iterdir() if path.is_dir()} == kept
        # What is in use stays, whoever asks.
        async with caches(bound).held(models[0]):
            with pytest.raises(ResourceExhausted) as full:
                await caches(bound).obtain(models[3])
            print(full.value.message)
            assert full.value.reason == "NODE_CACHE_FULL"
            assert "TREADLE_NODE_CACHE_MAX_BYTES" in full.value.message
            third.verify()
        before = len(received)
        async with caches(bound).held(models[3]) as fourth:
            fourth.verify()
        assert len(received) - before == 1
        third.verify()


async def test_what_a_dead_download_left(client: RegistryStubs, caches, tmp_path: Path):
    wanted = await imported(client, tmp_path / "m")
    cache = caches()
    part = cache._disk.partial(weights_of(wanted))
    part.parent.mkdir(parents=True)
    part.write_bytes(Store(client.store).blob_path(weights_of(wanted).digest).read_bytes()[:1000])
    (await cache.obtain(wanted)).verify()
    # The part of another, that nobody comes back for, is in nobody's way.
    stale = part.with_name(f"{'0' * 64}.{1 << 40}.part")
    stale.write_bytes(b"begun")
    (await caches().obtain(await imported(client, tmp_path / "other", 1))).verify()
    assert not [name for name in names(part.parent) if name.endswith(".part")]


async def test_a_part_with_other_content_is_fetched_anew(client: RegistryStubs, caches, tmp_path: Path):
    wanted = await imported(client, tmp_path / "m")
    cache = caches()
    part = cache._disk.partial(weights_of(wanted))
    part.parent.mkdir(parents=True)
    part.write_bytes(b"?" * 1000)
    (await cache.obtain(wanted)).verify()


async def test_what_cannot_be_obtained(client: RegistryStubs, caches, tmp_path: Path):
    wanted = await imported(client, tmp_path / "m")
    flip(Store(client.store).get(wanted.artifact_digest).canonical_folder / "model.safetensors")
    with pytest.raises(DataLoss) as damaged:
        await caches().obtain(wanted)
    assert damaged.value.reason == "CHECKSUM_MISMATCH"
    await client.call("DeleteArtifact", digest=wanted.artifact_digest)
    with pytest.raises(NotFound):
        await caches().obtain(wanted)
    digest = wanted.files[0].digest
    for path in ("../x", "/etc/passwd", "a/../../x", ""):
        hostile = StoredFolder(ELSEWHERE, wanted.artifact_digest, (StoredFile(path, digest, 1),))
        with pytest.raises(DataLoss) as outside:
            await caches().obtain(hostile)
        assert outside.value.reason == "PATH_OUTSIDE"
    for digest in ("sha256:../../x", "", "x"):
        with pytest.raises(DataLoss) as bad:
            await caches().obtain(StoredFolder(ELSEWHERE, digest, wanted.files))
        assert bad.value.reason == "BAD_DIGEST"


async def test_a_cache_that_cannot_be_used(client: RegistryStubs, tmp_path: Path):
    wanted = await imported(client, tmp_path / "m")
    (tmp_path / "file").write_text("in the way")
    cache = NodeCache(NodeCacheConfig(folder=tmp_path / "file" / "node"), client.registry)
    with pytest.raises(FailedPrecondition) as caught:
        await cache.obtain(wanted)
    assert caught.value.reason == "NODE_CACHE_NOT_WRITABLE"
    assert "TREADLE_NODE_CACHE" in caught.value.message


async def test_a_full_disk_is_said(
    client: RegistryStubs, caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = await imported(client, tmp_path / "m")
    cache, write, failed = caches(), os.pwrite, 0

    def full(descriptor: int, data: memoryview, at: int) -> int:
        nonlocal failed
        failed += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceExhausted) as caught:
        await cache.obtain(folder)
    assert caught.value.reason == "DISK_FULL"
    assert str(tmp_path / "node") in caught.value.message
    assert failed > 0
    monkeypatch.setattr(os, "pwrite", write)
    found = await cache.obtain(folder)
    assert found.verify() == sum(file.size for file in folder.files)
    print(f"{failed} writes failed; {caught.value.message}")

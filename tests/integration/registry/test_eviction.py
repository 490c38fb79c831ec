"""The quota over real gRPC and real files: what goes, what stays, and what the disk says of it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from pretended_worker import READY, deploy, lease
from registry_stubs import RegistryStubs, open_registry
from small_folder import write_model
from waiting import until

from treadle.api.registry.v1 import derivation_pb2, transfer_pb2
from treadle.errors import FailedPrecondition, NotFound, Unavailable
from treadle_registry.eviction import Eviction
from treadle_registry.operations.importing import import_source
from treadle_registry.operations.job import Outcome
from treadle_registry.operations.job_runner import JobProcess
from treadle_registry.operations.progress import Report
from treadle_registry.registry import Registry
from treadle_registry.rollout.leasing import LeaseRequest, Leasing
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Store


class Models:
    """Small models; those of one seed have the same weights, and differ in their chat template."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    async def bring(self, client: RegistryStubs, seed: int, *, alias: str = "", template: str = "x") -> str:
        """Imports one, and gives its digest."""
        self._count += 1
        source = write_model(self._folder / f"m{self._count}", seed=seed, template=template)
        return (await client.imported(folder=str(source), alias=alias)).artifact.digest


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path / "sources")


def blob_bytes(store: Path) -> int:
    """What the files of a store take."""
    return sum(path.stat().st_size for path in (store / "blobs").rglob("*") if path.is_file())


async def digests(client: RegistryStubs) -> set[str]:
    return {one.digest for one in (await client.call("ListArtifacts", page_size=500)).artifacts}


def fates(answer: Any) -> dict[str, tuple[bool, str]]:
    return {fate.artifact_digest: (fate.kept, fate.reason) for fate in answer.evictions}


async def test_a_dry_run_says_all_and_touches_nothing_and_then_it_is_so(tmp_path: Path, models: Models):
    async with open_registry(tmp_path / "store", lease_unknown_s=0) as client:
        aliased = await models.bring(client, 1, alias="prod")
        twin = await models.bring(client, 1, template="another")
        leased, deployed, old, used = [await models.bring(client, seed) for seed in (2, 3, 4, 5)]
        await deploy(client, "next", deployed)
        await lease(client, leased, "", READY, holder="job-7")
        for digest in (old, used, twin):
            await client.call("ResolveModel", model=digest)
        before, size = await digests(client), blob_bytes(tmp_path / "store")
        dry = await client.call("EvictArtifacts", target_bytes=0, dry_run=True)
        assert (await digests(client), blob_bytes(tmp_path / "store")) == (before, size)
        assert fates(dry) == {
            aliased: (True, "aliased as prod"),
            deployed: (True, "deployed under next"),
            leased: (True, "leased by job-7"),
            old: (False, "not used for the longest time"),
            used: (False, "not used for the longest time"),
            twin: (False, "not used for the longest time"),
        }
        uses = [fate.last_use_time.ToNanoseconds() for fate in dry.evictions]
        assert uses == sorted(uses)
        freed = {fate.artifact_digest: fate.bytes for fate in dry.evictions}
        assert 0 < freed[twin] < freed[old] / 10
        assert dry.store_bytes_before == size
        done = await client.call("EvictArtifacts", target_bytes=0)
        assert (done.evictions, done.store_bytes_after) == (dry.evictions, dry.store_bytes_after)
        assert await digests(client) == {aliased, leased, deployed}
        assert blob_bytes(tmp_path / "store") == done.store_bytes_after
        store = Store(tmp_path / "store")
        assert all(store.is_whole(store.get(digest)) for digest in (aliased, leased, deployed))
        for digest in (old, twin):
            with pytest.raises(NotFound):
                await client.call("ResolveModel", model=digest)
        print(f"{size - done.store_bytes_after} of {size} bytes freed, as foretold")


async def test_an_import_above_the_quota_makes_room_by_last_use(tmp_path: Path, models: Models):
    async with open_registry(tmp_path / "store") as client:
        await models.bring(client, 0)
        one = blob_bytes(tmp_path / "store")
    quota = 4 * one + one // 2
    gone: list[str] = []
    async with open_registry(tmp_path / "quota", lease_unknown_s=0, max_store_bytes=quota) as client:
        kept = await models.bring(client, 1, alias="prod")
        brought = [await models.bring(client, seed) for seed in (2, 3, 4)]
        for digest in reversed(brought):
            await client.call("ResolveModel", model=digest)
        for seed in range(5, 11):
            fresh = await models.bring(client, seed)
            now = await digests(client)
            assert {kept, fresh} <= now
            assert blob_bytes(tmp_path / "quota") <= quota
            gone += [digest for digest in brought if digest not in now and digest not in gone]
        assert gone == [brought[2], brought[1], brought[0]]
        # Everything is held: the store grows beyond its quota, and what was just imported is not lost.
        for number, digest in enumerate(await digests(client)):
            await client.call("SetAlias", name=f"held{number}", artifact_digest=digest)
        last = await models.bring(client, 99)
        assert {last, kept} <= await digests(client)
        assert blob_bytes(tmp_path / "quota") > quota
    print(f"a quota of {quota} bytes; {len(gone)} went in the order of their use")


async def test_what_the_disk_lacks_for_an_import_is_freed_before_it(tmp_path: Path):
    store = Store.open(tmp_path / "store")
    for seed in range(4):
        folder = write_model(tmp_path / f"m{seed}", seed=seed)
        import_source(store, LocalSource("folder", str(folder)))
    size = blob_bytes(tmp_path / "store")
    registry = await Registry.open(tmp_path / "store")
    try:
        for quota, freed in ((0, False), (1 << 40, True)):
            eviction = Eviction(registry, quota=quota, unknown_s=0, free_bytes=lambda: 1000)
            await eviction.make_room_on_disk(900)
            assert blob_bytes(tmp_path / "store") == size
            await eviction.make_room_on_disk(1000 + size // 2)
            assert (blob_bytes(tmp_path / "store") <= size // 2) == freed
        assert 0 < len((await registry.artifacts(0, ""))[0]) < 4
    finally:
        await registry.close()


async def test_nothing_goes_while_leases_are_unknown(tmp_path: Path, models: Models):
    store = tmp_path / "store"
    async with open_registry(store, lease_unknown_s=0) as client:
        old, held = await models.bring(client, 1), await models.bring(client, 2)
        await lease(client, held, "", READY, time_to_live={"seconds": 3600})
    async with open_registry(store, lease_unknown_s=30.0, max_store_bytes=1) as client:
        with pytest.raises(Unavailable) as caught:
            await client.call("EvictArtifacts", target_bytes=0)
        assert caught.value.reason == "LEASES_UNKNOWN"
        assert 0 < caught.value.retry_after_s <= 30
        dry = fates(await client.call("EvictArtifacts", target_bytes=0, dry_run=True))
        assert all(kept and "leases are unknown" in reason for kept, reason in dry.values())
        fresh = await models.bring(client, 3)
        assert await digests(client) == {old, held, fresh}
    async with open_registry(store, lease_unknown_s=0) as client:
        await client.call("EvictArtifacts", target_bytes=0)
        assert await digests(client) == {held}
        with pytest.raises(FailedPrecondition) as refused:
            await client.call("DeleteArtifact", digest=held)
        assert refused.value.reason == "ARTIFACT_IN_USE"


async def test_uses_outlive_the_registry(tmp_path: Path, models: Models):
    store = tmp_path / "store"
    async with open_registry(store, lease_unknown_s=0) as client:
        brought = [await models.bring(client, seed) for seed in range(3)]
        await client.call("ResolveModel", model=brought[0])
    async with open_registry(store, lease_unknown_s=0) as client:
        dry = await client.call("EvictArtifacts", dry_run=True)
        assert [fate.artifact_digest for fate in dry.evictions] == [brought[1], brought[2], brought[0]]
        assert all(fate.kept for fate in dry.evictions)
        assert dry.store_bytes_before == dry.store_bytes_after == blob_bytes(store)


async def test_a_download_is_a_use(tmp_path: Path, models: Models):
    store = tmp_path / "store"
    async with open_registry(store, lease_unknown_s=0) as client:
        brought = [await models.bring(client, seed) for seed in range(3)]
        artifact = (await client.call("ResolveModel", model=brought[0])).artifact
        for digest in brought[1:]:
            await client.call("ResolveModel", model=digest)
        weights = next(file for file in artifact.files if file.path == "model.safetensors")
        call = client.registry.DownloadBlob(transfer_pb2.DownloadBlobRequest(digest=weights.digest))
        received = [len(response.data) async for response in call]
        assert sum(received) == weights.bytes
        dry = await client.call("EvictArtifacts", dry_run=True)
        order = [fate.artifact_digest for fate in dry.evictions]
        assert order == [brought[1], brought[2], brought[0]]
    # And one that outlives the registry.
    async with open_registry(store, lease_unknown_s=0) as client:
        dry = await client.call("EvictArtifacts", dry_run=True)
        assert [fate.artifact_digest for fate in dry.evictions] == order
    print(f"{sum(received)} bytes were sent, which is a use")


async def test_who_renews_in_time_is_not_too_late_because_the_disk_was_busy(tmp_path: Path):
    store = Store.open(tmp_path / "store")
    held, other = (
        import_source(store, LocalSource("folder", str(write_model(tmp_path / f"m{seed}", seed=seed))))
        for seed in range(2)
    )
    registry = await Registry.open(tmp_path / "store")
    now = registry.rollouts.clock()
    registry.rollouts.clock = lambda: now
    eviction = Eviction(registry, quota=0, unknown_s=0)
    free = threading.Event()
    try:
        request = LeaseRequest(held.manifest.digest, "job-7", time_to_live_s=10.0)
        leased = await registry.in_thread(registry.leasing.acquire, request)
        now += 9.0
        calls = [
            asyncio.ensure_future(call)
            for call in (
                registry.in_thread(free.wait, 60.0),
                eviction.evict(0),
                registry.in_thread(registry.leasing.renew, leased.lease_id, None, None),
            )
        ]
        # Each has made its call by then.
        await asyncio.sleep(0)
        now += 60.0
        free.set()
        waited, plan, renewed = await asyncio.gather(*calls)
        assert waited
        assert plan.going == [other.manifest.digest]
        assert renewed.deadline == now + 10.0
        now += 10.0
        assert (await eviction.evict(0)).going == [held.manifest.digest]
    finally:
        free.set()
        await registry.close()


async def test_what_a_derivation_is_made_of_stays_until_it_ends(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
):
    """Also while the derivation waits for its turn."""
    going, run = asyncio.Event(), JobProcess.run

    async def held_up(process: JobProcess, report: Report) -> Outcome:
        await going.wait()
        return await run(process, report)

    async with open_registry(tmp_path / "store", lease_unknown_s=0, max_imports=1) as client:
        parent, other = await models.bring(client, 1), await models.bring(client, 2)
        monkeypatch.setattr(JobProcess, "run", held_up)
        operations = [
            await client.call("DeriveArtifact", model=parent, derivation={"quantization": kind})
            for kind in ("int8", "int4")
        ]
        leases: list[Any] = []

        async def both_hold() -> bool:
            leases[:] = (await client.call("ListLeases", artifact_digest=parent)).leases
            return len(leases) == 2

        await until(both_hold, "each derivation holds its parent")
        assert {one.holder for one in leases} == {one.name for one in operations}
        answer = await client.call("EvictArtifacts", target_bytes=0)
        assert fates(answer)[parent][0]
        assert fates(answer)[other] == (False, "not used for the longest time")
        with pytest.raises(FailedPrecondition) as refused:
            await client.call("DeleteArtifact", digest=parent)
        assert refused.value.reason == "ARTIFACT_IN_USE"
        going.set()
        for operation in operations:
            made = await client.response(operation, derivation_pb2.DeriveArtifactResponse())
            assert made.artifact.parent_digest == parent
        assert not (await client.call("ListLeases")).leases
        await client.call("EvictArtifacts", target_bytes=0)
        assert await digests(client) == set()


async def test_a_derivation_of_what_is_gone_says_so_and_leaves_no_lease(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
):
    async with open_registry(tmp_path / "store", lease_unknown_s=0) as client:
        parent = await models.bring(client, 1)

        def gone(self: object, request: object) -> None:
            raise NotFound("no artifact", reason="MODEL_NOT_FOUND")

        with monkeypatch.context() as patched:
            patched.setattr(Leasing, "acquire", gone)
            operation = await client.call("DeriveArtifact", model=parent, derivation={"quantization": "int8"})
            with pytest.raises(NotFound) as caught:
                await client.response(operation, derivation_pb2.DeriveArtifactResponse())
        assert caught.value.reason == "MODEL_NOT_FOUND"
        # A model that is quantised already is refused, and nothing is held by then.
        made = await client.response(
            await client.call("DeriveArtifact", model=parent, derivation={"quantization": "int8"}),
            derivation_pb2.DeriveArtifactResponse(),
        )
        again = await client.call(
            "DeriveArtifact", model=made.artifact.digest, derivation={"quantization": "int4"}
        )
        with pytest.raises(FailedPrecondition):
            await client.response(again, derivation_pb2.DeriveArtifactResponse())
        assert not (await client.call("ListLeases")).leases

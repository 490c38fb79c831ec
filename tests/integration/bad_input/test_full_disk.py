"""A store whose disk is full: a real one, a tmpfs in a mount namespace of the registry's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from google.longrunning import operations_pb2_grpc, operations_proto_pb2
from small_folder import write_model
from waiting import until

from treadle.api.registry.v1 import registry_pb2_grpc, transfer_pb2
from treadle.client import ModelSource, RegistryClient
from treadle.errors import NotFound, TreadleError
from treadle.local.ports import free_ports
from treadle.models.stored_folder import StoredFile, file_digest
from treadle.process import child_command
from treadle.rpc import from_rpc_error, from_status
from treadle.transfer.upload import upload_file

DISK_BYTES = 24 << 20
DISK_FILES = 400
MODEL_BYTES = 6_000_000
"""About the weights' size, in float32; the canonical ones are half of that."""


@dataclass
class SmallDisk:
    """A registry's process, its store as it sees it, and a client of it."""

    process: subprocess.Popen[bytes]
    store: Path
    log: Path
    address: str
    registry: RegistryClient

    def free(self) -> int:
        return shutil.disk_usage(self.store).free

    @contextlib.contextmanager
    def filled(self, leave: int) -> Iterator[None]:
        """Only so many bytes are free, to the page, for as long as the block lasts."""
        filler = self.store.parent / "filler"
        with filler.open("wb", buffering=0) as file:
            while (more := self.free() - leave) > 0:
                file.write(bytes(min(more, 1 << 20)))
        try:
            yield
        finally:
            filler.unlink()

    @contextlib.contextmanager
    def filled_with_files(self, leave: int) -> Iterator[None]:
        """Only so many files can still be made."""
        folder = self.store.parent / "fillers"
        folder.mkdir()
        for number in range(os.statvfs(self.store).f_ffree - leave):
            (folder / str(number)).touch()
        assert os.statvfs(self.store).f_ffree == leave
        try:
            yield
        finally:
            shutil.rmtree(folder)

    def kept(self) -> list[Path]:
        """Every file of blobs, artifacts and imports."""
        return sorted(
            path
            for name in ("blobs", "artifacts", "tmp")
            for path in (self.store / name).rglob("*")
            if not path.is_dir()
        )

    async def imported(self, folder: Path, alias: str) -> str:
        """Imports to the end and gives the digest; raises what the registry says."""
        digest = ""
        async for progress in self.registry.import_model(ModelSource("folder", str(folder)), alias=alias):
            if progress.artifact is not None:
                digest = progress.artifact.digest
        return digest


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[SmallDisk]:
    """A registry on a small disk, with one model."""
    async with small_disk(tmp_path) as made:
        yield made


@contextlib.asynccontextmanager
async def small_disk(tmp_path: Path, **settings: str) -> AsyncIterator[SmallDisk]:
    """See `disk`. Who is not root mounts in a user namespace of its own."""
    (mount := tmp_path / "disk").mkdir()
    (port,) = free_ports(1)
    options = f"size={DISK_BYTES},nr_inodes={DISK_FILES}"
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    namespaces = "-m" if os.getuid() == 0 else "-rm"
    command = [
        "unshare",
        namespaces,
        "sh",
        "-c",
        script,
        str(mount),
        sys.executable,
        "-m",
        "treadle_registry",
    ]
    variables = os.environ | {
        "TREADLE_REGISTRY_ADDRESS": f"127.0.0.1:{port}",
        "TREADLE_REGISTRY_METRICS_ADDRESS": "",
        "TREADLE_STORE": str(mount / "store"),
        **settings,
    }
    log = tmp_path / "registry.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220
            child_command(command), env=variables, stdout=output, stderr=output
        )
    seen = Path(f"/proc/{process.pid}/root") / mount.relative_to("/")

    async def is_up() -> bool:
        assert process.poll() is None, f"no registry on a small disk: {log.read_text()}"
        with contextlib.suppress(TreadleError):
            return await registry.artifacts() == []
        return False

    try:
        async with RegistryClient(f"127.0.0.1:{port}") as registry:
            await until(is_up, "the registry serves", 60)
            made = SmallDisk(process, seen / "store", log, f"127.0.0.1:{port}", registry)
            assert made.free() < DISK_BYTES
            assert not list(mount.iterdir())
            write_model(tmp_path / "kept")
            await made.imported(tmp_path / "kept", "kept")
            yield made
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Six megabytes of weights in float32, from which three are made."""
    folder = write_model(tmp_path / "model", hidden_size=128, intermediate_size=MODEL_BYTES // (3 * 128 * 4))
    assert MODEL_BYTES < (folder / "model.safetensors").stat().st_size < MODEL_BYTES + (1 << 20)
    return folder


def refused(error: TreadleError) -> None:
    """It says that the disk is full, and what to do."""
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "DISK_FULL"), error.message
    assert "free some space" in error.message


async def still_serves(disk: SmallDisk, kept: list[Path]) -> None:
    """It answers for the model that it has, and has no other, and nothing of one."""
    artifact = await disk.registry.resolve("kept")
    assert [one.digest for one in await disk.registry.artifacts()] == [artifact.digest]
    with pytest.raises(NotFound):
        await disk.registry.resolve("big")
    await until(lambda: disk.kept() == kept, "what was half there is swept up")
    assert disk.process.poll() is None


async def succeeds(disk: SmallDisk, model: Path) -> None:
    """The same import, once there is room."""
    digest = await disk.imported(model, "big")
    assert (await disk.registry.resolve("big")).digest == digest
    assert len(await disk.registry.artifacts()) == 2


async def test_with_a_quota_what_was_used_least_recently_gives_way(tmp_path: Path):
    """Whether the disk is too full for the copy, for what is made of it, or for a derivation."""
    settings = {"TREADLE_REGISTRY_MAX_STORE_BYTES": str(1 << 40), "TREADLE_REGISTRY_LEASE_UNKNOWN_S": "0"}
    sizes = {"hidden_size": 128, "intermediate_size": MODEL_BYTES // (3 * 128 * 4)}
    folders = [write_model(tmp_path / f"model{seed}", seed=seed, **sizes) for seed in range(1, 5)]
    async with small_disk(tmp_path, **settings) as disk:
        kept = (await disk.registry.resolve("kept")).digest

        async def has() -> set[str]:
            return {one.digest for one in await disk.registry.artifacts()}

        first, second = [await disk.imported(folder, "") for folder in folders[:2]]
        assert disk.free() < size_of(folders[2])
        third = await disk.imported(folders[2], "")
        assert await has() == {kept, second, third}
        with disk.filled(leave=size_of(folders[3]) + 1_000_000):
            fourth = await disk.imported(folders[3], "")
        assert await has() == {kept, third, fourth}
        # With a lease of its own the parent stays, though it was used least recently.
        with disk.filled(leave=100_000):
            async for progress in disk.registry.convert(third, "float16"):
                derived = progress.artifact
        assert derived is not None
        assert await has() == {kept, third, derived.digest}
        print(f"{first[:19]}, {second[:19]} and {fourth[:19]} gave way")
        # What is held does not: then the disk is full.
        for number, digest in enumerate(await has()):
            await disk.registry.set_alias(f"held{number}", digest)
        with disk.filled(leave=100_000), pytest.raises(TreadleError) as caught:
            await disk.imported(folders[0], "")
        refused(caught.value)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


ROOM = {
    "not for a copy": (-1_000_000, "the model has"),
    "not for all of the copy": (100_000, "while writing source/note-"),
    "not for the conversion": (1_000_000, "while writing canonical/model.safetensors"),
}


@pytest.mark.parametrize("case", ROOM)
async def test_no_room(disk: SmallDisk, model: Path, case: str):
    more, words = ROOM[case]
    for number in range(60):
        # A byte of content, and a page of the disk.
        (model / f"note-{number:02}.txt").write_text("x")
    kept = disk.kept()
    assert len(kept) > 10
    leave = more + size_of(model)
    with disk.filled(leave):
        assert 0 <= leave - disk.free() < 1 << 13
        with pytest.raises(TreadleError) as caught:
            await disk.imported(model, "big")
        print(f"{case}, {leave} bytes: {caught.value.message!r}")
        refused(caught.value)
        assert words in caught.value.message
        await still_serves(disk, kept)
    await succeeds(disk, model)


async def test_no_room_for_anything(disk: SmallDisk, model: Path):
    """The import cannot even be written down: it is refused at once."""
    kept = disk.kept()
    with disk.filled(0):
        for _ in range(40):
            with pytest.raises(TreadleError) as caught:
                await disk.imported(model, "big")
            refused(caught.value)
            assert "the registry's database" in caught.value.message
        await still_serves(disk, kept)
    print(f"40 times {caught.value.message!r}")
    await succeeds(disk, model)


async def test_every_number_of_files_that_are_too_few(disk: SmallDisk, model: Path):
    """It fails at each of its files in turn, until there is room for them all."""
    kept, places = disk.kept(), []
    for leave in range(80):
        with disk.filled_with_files(leave):
            try:
                await disk.imported(model, "big")
                break
            except TreadleError as error:
                refused(error)
                places.append(error.message)
            await still_serves(disk, kept)
    print(f"{len(places)} times without room for another file, at {len(set(places))} kinds of place")
    for message in sorted(set(places)):
        print(f"{places.count(message)} times {message!r}")
    assert 15 <= len(places) < 79
    assert len(set(places)) >= 6
    assert (await disk.registry.resolve("big")).digest
    assert len(await disk.registry.artifacts()) == 2


async def test_a_disk_that_fills_up_while_an_import_runs(disk: SmallDisk, model: Path):
    """Not even how the import ended can be written: it is said all the same."""
    kept = disk.kept()
    importing = asyncio.create_task(disk.imported(model, "big"))
    await until(lambda: len(children(disk)) == 1, "the import runs", every_s=0.001)
    (child,) = children(disk)
    child.send_signal(signal.SIGSTOP)
    with disk.filled(0):
        child.send_signal(signal.SIGCONT)
        with pytest.raises(TreadleError) as caught:
            await asyncio.wait_for(importing, 30)
        refused(caught.value)
        lost = disk.log.read_text().count("how an operation ended cannot be kept")
        print(f"{lost} end that could not be written: {caught.value.message!r}")
        assert lost == 1
        assert from_status((await newest_operation(disk)).error).reason == "DISK_FULL"
        await still_serves(disk, kept)
    await succeeds(disk, model)


async def test_no_room_for_an_upload(disk: SmallDisk, model: Path):
    """Refused at once where it is known; else when the disk is full, and what came is gone on with."""
    path = model / "model.safetensors"
    file = StoredFile(path.name, file_digest(path), path.stat().st_size)
    async with grpc.aio.insecure_channel(disk.address) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        with disk.filled(file.size // 2):
            with pytest.raises(TreadleError) as early:
                await upload_file(stub, path, file)
            refused(early.value)
        arrived = 0

        def count(size: int) -> None:
            nonlocal arrived
            arrived += size

        call = stub.UploadBlob()
        await call.write(
            transfer_pb2.UploadBlobRequest(
                digest=file.digest, total_bytes=file.size, data=path.read_bytes()[: 1 << 20]
            )
        )

        async def has_begun() -> bool:
            found = await stub.GetUpload(transfer_pb2.GetUploadRequest(digest=file.digest))
            return found.committed_bytes == 1 << 20

        await until(has_begun, "the upload has begun")
        with disk.filled(0):
            await call.write(
                transfer_pb2.UploadBlobRequest(offset=1 << 20, data=path.read_bytes()[1 << 20 : 2 << 20])
            )
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await call
            refused(from_rpc_error(late.value))
            print(f"early: {early.value.message!r}; late: {late.value.details()!r}")
        sent = await upload_file(stub, path, file, progress=count)
        assert arrived == file.size
        print(f"{file.size} bytes, {sent} sent again once there was room")
        assert sent <= file.size - (1 << 20)
    await succeeds(disk, model)


async def newest_operation(disk: SmallDisk) -> operations_proto_pb2.Operation:
    """The import that was asked for last, once it has ended: which must be at once."""
    async with grpc.aio.insecure_channel(disk.address) as channel:
        operations = operations_pb2_grpc.OperationsStub(channel)
        listed = await operations.ListOperations(operations_proto_pb2.ListOperationsRequest(), timeout=10)
        wait = operations_proto_pb2.WaitOperationRequest(name=listed.operations[0].name)
        waited = await operations.WaitOperation(wait, timeout=10)
    assert waited.done
    assert waited == listed.operations[0]
    return waited


def children(disk: SmallDisk) -> list[psutil.Process]:
    """The processes of running imports."""
    return psutil.Process(disk.process.pid).children()

"""Blobs from a registry: from an offset, as they are taken, a bounded number at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import grpc
import pytest
from blobs import CHUNK, publish, write
from cutting_proxy import CuttingProxy
from damage import flip
from registry_stubs import RegistryStubs, answer, open_registry, write_folder
from waiting import until

from treadle.api.registry.v1 import registry_pb2_grpc, transfer_pb2
from treadle.errors import DataLoss, NotFound, ResourceExhausted, TreadleError
from treadle.models.stored_folder import StoredFile
from treadle.rpc import open_channel
from treadle.transfer.download import download_files
from treadle.transfer.upload import upload_file
from treadle_registry import transfers
from treadle_registry.servicing import transfer_methods


async def test_connections_that_break(tmp_path: Path, rng: random.Random):
    """Each byte of a download is taken once, however often the connection breaks."""
    async with open_registry(tmp_path / "store") as client:
        file = write(tmp_path / "file", rng.randbytes(24 * CHUNK))
        await upload_file(client.registry, tmp_path / "file", file)
        publish(client.store, file)
        cuts = [rng.randrange(2 * CHUNK, 7 * CHUNK) for _ in range(3)]
        async with (
            CuttingProxy(client.port, cuts).running() as proxy,
            open_channel(f"127.0.0.1:{proxy.port}") as cut,
        ):
            stub = registry_pb2_grpc.RegistryServiceStub(cut)
            received = await download_files(stub, [file], tmp_path / "there")
            print(f"{received} bytes of {file.size} over {proxy.num_cut} connections that broke")
            assert proxy.num_cut == 3
        assert received == file.size
        assert (tmp_path / "there" / "file").read_bytes() == (tmp_path / "file").read_bytes()


async def read_some(client: RegistryStubs, file: StoredFile, count: int = 1) -> grpc.aio.UnaryStreamCall:
    call = client.registry.DownloadBlob(transfer_pb2.DownloadBlobRequest(digest=file.digest), timeout=60)
    for _ in range(count):
        assert len((await call.read()).data) > 0
    return call


async def test_downloads_are_bounded_and_read_as_they_are_taken(
    narrow: RegistryStubs, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
):
    file = write(tmp_path / "file", rng.randbytes(32 * CHUNK))
    await upload_file(narrow.registry, tmp_path / "file", file)
    publish(narrow.store, file)
    reads = 0
    real = transfers._read

    def counted(*args: int) -> bytes:
        nonlocal reads
        reads += 1
        return real(*args)

    monkeypatch.setattr(transfers, "_read", counted)
    call = await read_some(narrow, file)
    with pytest.raises(ResourceExhausted) as full:
        await answer(await asyncio.wait_for(failed(narrow, file), 10))
    assert full.value.reason == "TOO_MANY_DOWNLOADS"
    assert full.value.retry_after_s
    print(f"{reads} of 32 chunks were read for a client that took 1")
    assert reads < 24
    call.cancel()

    # Whoever finds no place waits for one.
    busy = await read_some_once_free(narrow, file)
    waiting = asyncio.create_task(download_files(narrow.registry, [file], tmp_path / "there"))
    await asyncio.wait({waiting}, timeout=0.3)
    assert not waiting.done()
    busy.cancel()
    assert await asyncio.wait_for(waiting, 60) == file.size


async def read_some_once_free(client: RegistryStubs, file: StoredFile) -> grpc.aio.UnaryStreamCall:
    taken: list[grpc.aio.UnaryStreamCall] = []

    async def take() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            taken.append(await read_some(client, file))
        return bool(taken)

    await until(take, "a place is free")
    return taken[0]


async def failed(client: RegistryStubs, file: StoredFile) -> grpc.aio.UnaryStreamCall:
    call = client.registry.DownloadBlob(transfer_pb2.DownloadBlobRequest(digest=file.digest), timeout=60)
    await answer(call.read())
    return call


@pytest.mark.parametrize(
    ("digest", "offset", "code", "reason"),
    [
        ("sha256:" + "0" * 64, 0, "NOT_FOUND", "BLOB_NOT_FOUND"),
        ("sha256:..", 0, "INVALID_ARGUMENT", ""),
        ("", 0, "INVALID_ARGUMENT", ""),
        ("there", 10**6, "OUT_OF_RANGE", "OFFSET_BEYOND_END"),
    ],
)
async def test_bad_downloads(
    client: RegistryStubs, tmp_path: Path, digest: str, offset: int, code: str, reason: str
):
    artifact = (await client.imported(folder=str(write_folder(tmp_path / "m")))).artifact
    asked = artifact.files[0].digest if digest == "there" else digest
    call = client.registry.DownloadBlob(
        transfer_pb2.DownloadBlobRequest(digest=asked, offset=offset), timeout=60
    )
    with pytest.raises(TreadleError) as caught:
        await answer(call.read())
    print(caught.value.message)
    assert caught.value.code == code
    assert not reason or caught.value.reason == reason


async def test_from_the_end_on_there_is_nothing(client: RegistryStubs, tmp_path: Path):
    (file, *_) = (await client.imported(folder=str(write_folder(tmp_path / "m")))).artifact.files
    call = client.registry.DownloadBlob(
        transfer_pb2.DownloadBlobRequest(digest=file.digest, offset=file.bytes), timeout=60
    )
    (only,) = [response async for response in call]
    assert (only.offset, only.data, only.total_bytes) == (file.bytes, b"", file.bytes)


async def test_a_file_that_was_deleted_is_not_found(client: RegistryStubs, tmp_path: Path):
    artifact = (await client.imported(folder=str(write_folder(tmp_path / "m")))).artifact
    await client.call("DeleteArtifact", digest=artifact.digest)
    file = StoredFile("config.json", artifact.files[0].digest, artifact.files[0].bytes)
    with pytest.raises(NotFound):
        await download_files(client.registry, [file], tmp_path / "there")


async def test_damage_at_the_registry_is_noticed(client: RegistryStubs, tmp_path: Path):
    artifact = (await client.imported(folder=str(write_folder(tmp_path / "m")))).artifact
    files = [StoredFile(file.path, file.digest, file.bytes) for file in artifact.files]
    flip(Path(artifact.location) / "model.safetensors")
    with pytest.raises(DataLoss) as caught:
        await download_files(client.registry, files, tmp_path / "there")
    assert caught.value.reason == "CHECKSUM_MISMATCH"
    assert not (tmp_path / "there" / "model.safetensors").exists()
    await client.imported(folder=str(tmp_path / "m"))
    assert await download_files(client.registry, files, tmp_path / "there") > 0


async def test_readers_that_stand_still(
    narrow: RegistryStubs, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfer_methods, "IDLE_S", 0.3)
    file = write(tmp_path / "file", rng.randbytes(32 * CHUNK))
    await upload_file(narrow.registry, tmp_path / "file", file)
    publish(narrow.store, file)
    standing = await read_some(narrow, file)
    # There is one place, and who stands still loses it.
    assert await download_files(narrow.registry, [file], tmp_path / "there") == file.size
    taken = 1
    with pytest.raises(TreadleError) as caught:
        while await answer(standing.read()) is not grpc.aio.EOF:
            taken += 1
    print(f"{taken} of 32 chunks went to a client that stood still")
    assert (caught.value.code, caught.value.reason) == ("DEADLINE_EXCEEDED", "STALLED")
    assert 1 < taken < 24

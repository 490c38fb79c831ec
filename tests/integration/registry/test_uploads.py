"""Blobs to a registry: in chunks from an offset, resumed, checked by their hash, and never half there."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blobs import CHUNK, begun_upload, digest_of, messages, publish, upload, write
from damage import flip
from registry_stubs import RegistryStubs, answer, open_registry, write_folder
from started_service import started
from waiting import until

from treadle.api.registry.v1 import registry_pb2_grpc, transfer_pb2
from treadle.errors import DataLoss, FailedPrecondition, OutOfRange, ResourceExhausted, TreadleError
from treadle.local.ports import free_ports
from treadle.models.stored_folder import StoredFile
from treadle.rpc import open_channel
from treadle.transfer.download import download_files
from treadle.transfer.upload import ACCEPTED, upload_file
from treadle_registry import transfers
from treadle_registry.store.store import Store
from treadle_registry.store.uploads import KEPT_S, Uploads


async def test_there_and_back(client: RegistryStubs, tmp_path: Path, rng: random.Random):
    sizes = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, rng.randrange(5 * CHUNK, 9 * CHUNK)]
    files = [write(tmp_path / f"file-{number}", rng.randbytes(size)) for number, size in enumerate(sizes)]
    for file in files:
        before = await client.call("GetUpload", digest=file.digest)
        assert (before.committed_bytes, before.complete) == (0, False)
        told: list[int] = []
        assert (
            await upload_file(client.registry, tmp_path / file.path, file, progress=told.append) == file.size
        )
        assert sum(told) == file.size
        after = await client.call("GetUpload", digest=file.digest)
        assert (after.committed_bytes, after.complete) == (file.size, True)
        assert await upload_file(client.registry, tmp_path / file.path, file) == 0
        publish(client.store, file)
    told = []
    folder = tmp_path / "back"
    assert await download_files(client.registry, files, folder, progress=told.append) == sum(sizes)
    assert sum(told) == sum(sizes)
    for file in files:
        assert (folder / file.path).read_bytes() == (tmp_path / file.path).read_bytes()
    assert await download_files(client.registry, files, folder) == 0
    print(f"{len(files)} files of {sizes} bytes, there and back")
    flip(folder / files[-1].path)
    with pytest.raises(FailedPrecondition) as caught:
        await download_files(client.registry, files, folder)
    assert caught.value.reason == "FILE_EXISTS"


BAD: dict[str, tuple[object, str, str]] = {
    "nothing": (lambda content: [], "INVALID_ARGUMENT", "digest"),
    "no digest": (lambda content: messages(content)[1:], "INVALID_ARGUMENT", "digest"),
    "a path": (lambda content: messages(content, digest="sha256:../../x"), "INVALID_ARGUMENT", "digest"),
    "too large": (lambda content: messages(content, total_bytes=1 << 50), "INVALID_ARGUMENT", "total_bytes"),
    "beyond the total": (lambda content: messages(content, total_bytes=7), "INVALID_ARGUMENT", "data"),
    "a chunk too large": (
        lambda content: [messages(content)[0], transfer_pb2.UploadBlobRequest(data=bytes(CHUNK + 1))],
        "INVALID_ARGUMENT",
        "data",
    ),
    "a gap": (
        lambda content: [*messages(content)[:2], messages(content)[3]],
        "INVALID_ARGUMENT",
        "offset",
    ),
    "an overlap": (
        lambda content: [*messages(content)[:2], messages(content)[1]],
        "INVALID_ARGUMENT",
        "offset",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_uploads(client: RegistryStubs, rng: random.Random, case: str):
    make, code, field = BAD[case]
    content = rng.randbytes(3 * CHUNK)
    with pytest.raises(TreadleError) as caught:
        await upload(client, make(content))
    print(f"{case}: {caught.value.message!r}")
    assert caught.value.code == code
    assert [violation.field for violation in caught.value.fields] == [field]
    begun = (await client.call("GetUpload", digest=digest_of(content))).committed_bytes
    assert begun in (0, CHUNK)
    assert await upload(client, messages(content, begun)) == len(content)


async def test_an_upload_goes_on_where_it_must(client: RegistryStubs, rng: random.Random):
    content = rng.randbytes(3 * CHUNK + 5)
    assert await upload(client, messages(content)[:3]) == 2 * CHUNK
    for offset, kind in ((0, FailedPrecondition), (CHUNK, FailedPrecondition), (3 * CHUNK, OutOfRange)):
        with pytest.raises(kind) as caught:
            await upload(client, messages(content, offset))
        assert caught.value.reason == "WRONG_OFFSET"
        assert caught.value.metadata["committed_bytes"] == str(2 * CHUNK)
    assert (await client.call("GetUpload", digest=digest_of(content))).committed_bytes == 2 * CHUNK
    assert await upload(client, messages(content, 2 * CHUNK)) == len(content)
    assert (await client.call("GetUpload", digest=digest_of(content))).complete
    # Whole is whole, wherever somebody begins, who is then not asked to send.
    assert await upload(client, messages(content, CHUNK)) == len(content)
    call = client.registry.UploadBlob(timeout=60)
    await call.write(messages(content, CHUNK)[0])
    assert not any(key == ACCEPTED for key, _ in await call.initial_metadata())
    assert (await answer(call)).committed_bytes == len(content)


async def test_two_files_under_one_hash_are_refused(client: RegistryStubs, tmp_path: Path):
    """An upload whose content is another takes nobody's place: not an upload's, not an artifact's."""
    folder = write_folder(tmp_path / "m")
    artifact = (await client.imported(folder=str(folder))).artifact
    held = {file.digest: Store(client.store).blob_path(file.digest) for file in artifact.files}
    before = {digest: (path.stat().st_ino, path.read_bytes()) for digest, path in held.items()}
    refused = 0
    for digest, (_, content) in before.items():
        other = bytes(len(content) - 1) + b"!"
        with pytest.raises(DataLoss) as caught:
            await upload(client, messages(other, digest=digest))
        assert caught.value.reason == "CHECKSUM_MISMATCH"
        assert caught.value.metadata == {"expected_digest": digest, "found_digest": digest_of(other)}
        assert not list((client.store / "uploads").glob("*"))
        refused += 1
    assert {digest: (path.stat().st_ino, path.read_bytes()) for digest, path in held.items()} == before
    assert (await client.imported(folder=str(folder))).already_present
    print(f"{refused} files under hashes of others were refused")
    assert refused == len(held) > 2


async def test_a_damaged_blob_is_not_taken_for_an_upload(client: RegistryStubs, tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    artifact = (await client.imported(folder=str(folder))).artifact
    source = {file.path: file for file in artifact.source_files}["model.safetensors"]
    assert (await client.call("GetUpload", digest=source.digest)).complete
    (client.store / "uploads" / source.digest.removeprefix("sha256:")).unlink()
    flip(Store(client.store).blob_path(source.digest))
    found = await client.call("GetUpload", digest=source.digest)
    assert (found.committed_bytes, found.complete) == (0, False)
    file = StoredFile(source.path, source.digest, source.bytes)
    assert await upload_file(client.registry, folder / "model.safetensors", file) == file.size
    assert (await client.call("GetUpload", digest=source.digest)).complete


async def test_a_registry_that_is_killed_in_the_middle(tmp_path: Path, rng: random.Random):
    """One call of upload_file lives through it, and sends again only what had not arrived."""
    (port,) = free_ports(1)
    settings = {"TREADLE_STORE": str(tmp_path / "store"), "TREADLE_REGISTRY_ADDRESS": f"127.0.0.1:{port}"}
    file = write(tmp_path / "file", rng.randbytes(48 * CHUNK))
    arrived, kills = 0, 0
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)

        def count(size: int) -> None:
            nonlocal arrived
            arrived += size

        sending: asyncio.Task[int] | None = None
        for threshold in (10 * CHUNK, 25 * CHUNK, None):
            with started("registry", tmp_path / f"registry-{kills}.log", settings) as (process, _):
                if sending is None:
                    sending = asyncio.create_task(upload_file(stub, tmp_path / "file", file, progress=count))
                if threshold is None:
                    sent = await asyncio.wait_for(sending, 60)
                    request = transfer_pb2.GetUploadRequest(digest=file.digest)
                    found = await stub.GetUpload(request, timeout=10)
                    break
                await until(lambda least=threshold: arrived >= least, "some of it is there")
                process.send_signal(signal.SIGKILL)
                await asyncio.to_thread(process.wait)
                kills += 1
    print(f"{file.size} bytes, {sent} sent, over {kills} registries that were killed")
    assert kills == 2
    assert found.complete
    assert arrived == file.size
    # What was on the way when it died is sent again, and no more.
    assert file.size <= sent < file.size + 40 * CHUNK


async def test_those_who_bring_one_file_at_once(client: RegistryStubs, tmp_path: Path, rng: random.Random):
    file = write(tmp_path / "file", rng.randbytes(30 * CHUNK))
    sent = await asyncio.gather(*(upload_file(client.registry, tmp_path / "file", file) for _ in range(4)))
    print(f"{file.size} bytes; each sent {sent}")
    assert (await client.call("GetUpload", digest=file.digest)).complete
    assert sum(sent) < 3 * file.size, "they wait for one another"


async def test_uploads_are_bounded(narrow: RegistryStubs, rng: random.Random):
    first, second = rng.randbytes(30 * CHUNK), rng.randbytes(20 * CHUNK)
    assert await upload(narrow, messages(first)) == len(first)
    with pytest.raises(ResourceExhausted) as full:
        await upload(narrow, messages(second))
    print(full.value.message)
    assert full.value.reason == "UPLOADS_FULL"
    assert full.value.retry_after_s is None
    assert (await client_has(narrow, second)) == 0
    third = rng.randbytes(4 * CHUNK)
    call = await begun_upload(narrow, third)

    async def has_begun() -> bool:
        return await client_has(narrow, third) > 0

    await until(has_begun, "the upload has begun")
    with pytest.raises(ResourceExhausted) as busy:
        await upload(narrow, messages(rng.randbytes(5)))
    assert busy.value.reason == "TOO_MANY_UPLOADS"
    assert busy.value.retry_after_s
    call.cancel()


async def client_has(client: RegistryStubs, content: bytes) -> int:
    return (await client.call("GetUpload", digest=digest_of(content))).committed_bytes


async def test_senders_that_stand_still(
    client: RegistryStubs, rng: random.Random, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfers, "IDLE_S", 0.3)
    content = rng.randbytes(32 * CHUNK)
    call = await begun_upload(client, content)
    with pytest.raises(TreadleError) as sent:
        await answer(call)
    assert (sent.value.code, sent.value.reason) == ("DEADLINE_EXCEEDED", "STALLED")
    assert await client_has(client, content) == CHUNK
    assert await upload(client, messages(content, CHUNK)) == len(content)


async def test_who_asks_for_a_whole_upload_has_a_day_from_then_on(client: RegistryStubs, rng: random.Random):
    """Or it could go between that answer and the import."""
    content = rng.randbytes(CHUNK)
    await upload(client, messages(content))
    uploads = Uploads(Store(client.store), 1 << 40)
    path = uploads.path(digest_of(content))
    before = path.stat()

    async def is_later() -> bool:
        assert await client_has(client, content) == len(content)
        return path.stat().st_ctime > before.st_ctime

    await until(is_later, "the day began anew")
    assert (path.stat().st_mode, path.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert uploads.sweep(before.st_ctime + KEPT_S) == 0
    assert uploads.sweep(path.stat().st_ctime + KEPT_S + 1) == 1


async def test_what_nobody_comes_back_for_goes_after_a_day(client: RegistryStubs, rng: random.Random):
    whole, begun, running = (rng.randbytes(2 * CHUNK) for _ in range(3))
    await upload(client, messages(whole))
    await upload(client, messages(begun)[:2])
    call = await begun_upload(client, running)

    async def runs() -> bool:
        return await client_has(client, running) > 0

    await until(runs, "an upload runs")
    uploads = Uploads(Store(client.store), 1 << 40)
    now = (client.store / "uploads").stat().st_ctime
    assert uploads.sweep(now + KEPT_S - 60) == 0
    assert uploads.sweep(now + KEPT_S + 60) == 2
    assert [await client_has(client, one) for one in (whole, begun, running)] == [0, 0, CHUNK]
    call.cancel()


async def test_uploads_that_begin_at_once_share_the_room(tmp_path: Path, rng: random.Random):
    """What is to come of one counts for the next before a byte of it is here."""
    held = asyncio.Event()
    taken = 0

    async def accepted() -> None:
        nonlocal taken
        taken += 1

    async def sending(content: bytes) -> AsyncIterator[transfers.UploadChunk]:
        yield transfers.UploadChunk(digest_of(content), len(content), 0, b"")
        await held.wait()

    store = Store.open(tmp_path / "store")
    async with transfers.Transfers(
        store, max_uploads=8, max_downloads=8, max_upload_bytes=5 * CHUNK, used=lambda digest: None
    ).running() as running:
        contents = [rng.randbytes(2 * CHUNK) for _ in range(8)]
        tasks = [asyncio.create_task(running.upload(sending(content), accepted)) for content in contents]
        await until(lambda: taken + sum(task.done() for task in tasks) == len(tasks), "all have begun")
        held.set()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [error for error in ended if isinstance(error, ResourceExhausted)]
    print(f"{taken} of {len(tasks)} uploads were taken")
    assert taken == 2
    assert {error.reason for error in refused} == {"UPLOADS_FULL"}
    assert len(refused) == len(tasks) - taken


async def test_what_an_artifact_has_takes_no_room(tmp_path: Path, rng: random.Random):
    async with open_registry(tmp_path / "store", max_upload_bytes=3 * CHUNK) as client:
        files = []
        for number in range(4):
            file = write(tmp_path / str(number), rng.randbytes(CHUNK))
            await upload_file(client.registry, tmp_path / file.path, file)
            publish(client.store, file)
            Uploads(Store(client.store)).forget(file.digest)
            files.append(file)
        for file in files:
            assert (await client.call("GetUpload", digest=file.digest)).complete
        assert len(list((client.store / "uploads").iterdir())) == len(files)
        content = rng.randbytes(2 * CHUNK)
        assert await upload(client, messages(content)) == len(content)
    print(f"{len(files)} files of artifacts and an upload of {len(content)} bytes")

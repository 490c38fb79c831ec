"""Ten gigabytes through the registry and back, in constant memory. The file is sparse: it takes no disk."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from started_service import started

from treadle.api.registry.v1 import registry_pb2_grpc
from treadle.models.stored_folder import StoredFile, file_digest
from treadle.rpc import open_channel
from treadle.transfer.download import download_files
from treadle.transfer.upload import upload_file
from treadle_registry.store.store import Store
from treadle_registry.store.uploads import Uploads

SIZE = 10 << 30
SMALL = Path(__file__)
SMALL_BYTES = SMALL.stat().st_size
MOST = 128 << 20
"""What either process may grow by: a hundredth of the file."""


def publish(store: Store, file: StoredFile) -> None:
    """Makes an uploaded file one of the store's, as an import does; such a file is no model."""
    store.blob_path(file.digest).parent.mkdir()
    store.blob_path(file.digest).hardlink_to(Uploads(store).path(file.digest))


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


class Watch:
    """The resident memory of the registry and of this process, as they grow."""

    def __init__(self, registry: int) -> None:
        self._processes = [psutil.Process(registry), psutil.Process()]
        self.before = self._now()
        self.most = list(self.before)

    def _now(self) -> list[int]:
        return [process.memory_info().rss for process in self._processes]

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self.most = [max(pair) for pair in zip(self.most, self._now(), strict=True)]
            await asyncio.sleep(0.1)

    @property
    def grown(self) -> list[int]:
        return [most - before for most, before in zip(self.most, self.before, strict=True)]


@pytest.mark.slow
async def test_ten_gigabytes_in_constant_memory(tmp_path: Path):
    with (tmp_path / "large").open("wb") as large:
        large.truncate(SIZE)
    file = StoredFile("large", await asyncio.to_thread(file_digest, tmp_path / "large"), SIZE)
    settings = {"TREADLE_STORE": str(tmp_path / "store")}
    with started("registry", tmp_path / "log", settings) as (process, address):
        async with open_channel(address) as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            await upload_file(stub, SMALL, StoredFile("small", file_digest(SMALL), SMALL_BYTES))
            watch = Watch(process.pid)
            async with watch.watching():
                began = time.monotonic()
                assert await upload_file(stub, tmp_path / "large", file) == SIZE
                up = time.monotonic() - began
                publish(Store(tmp_path / "store"), file)
                began = time.monotonic()
                assert await download_files(stub, [file], tmp_path / "back") == SIZE
                down = time.monotonic() - began
    disk = disk_bytes(tmp_path)
    for name, before, most in zip(("registry", "client"), watch.before, watch.most, strict=True):
        print(f"{name}: {before / 1e6:.0f} MB before, {most / 1e6:.0f} MB at most")
    print(f"{SIZE} bytes up in {up:.0f} s, down in {down:.0f} s, on {disk} bytes of the disk")
    assert all(grown < MOST for grown in watch.grown)
    assert (tmp_path / "back" / "large").stat().st_size == SIZE
    assert disk < 64 << 20

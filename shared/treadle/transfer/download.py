"""Files of an artifact from a registry into a folder."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import grpc

from treadle.api.registry.v1 import registry_pb2_grpc, transfer_pb2
from treadle.errors import DataLoss, DeadlineExceeded, FailedPrecondition, Unavailable
from treadle.models.stored_folder import StoredFile, file_digest
from treadle.transfer.blocking import acquire, run_blocking, run_heard
from treadle.transfer.partial_file import PartialFile
from treadle.transfer.retries import Retries

_IDLE_S = 60.0
"""Between two chunks."""
_LOOK_EVERY_S = 0.2
"""Between two looks whether another process has let go of a file."""
AT_ONCE = 4
"""Files that are fetched at once."""

Progress = Callable[[int], None]
"""Told how many more bytes are here; what was here before counts, too."""


def unheard(_: int) -> None:
    """Progress that nobody wants."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a file goes, and where it lies while it arrives: on one file system."""

    file: StoredFile
    path: Path
    partial: Path


async def download_files(
    stub: registry_pb2_grpc.RegistryServiceStub,
    files: Iterable[StoredFile],
    folder: Path,
    *,
    progress: Progress = unheard,
    at_once: int = AT_ONCE,
) -> int:
    """Fetches `files` into `folder` and gives the bytes that came over the network.

    A file that is there is left alone, and one that was begun ("NAME.part") is gone on with. Raises
    FailedPrecondition (FILE_EXISTS) where another file has its name, NotFound for a file that the registry no
    longer has, DataLoss (CHECKSUM_MISMATCH) for content that is not what its digest says, what the registry
    raises, Unavailable once it has been away for half a minute, and OSError.
    """
    targets = []
    for file in files:
        path = folder / checked_path(file.path)
        await run_blocking(None, path.parent.mkdir, parents=True, exist_ok=True)
        if path.exists() and await run_heard(partial(file_digest, path)) != file.digest:
            raise FailedPrecondition(
                f"{path} is another file than the model's; give an empty folder, or take it away",
                reason="FILE_EXISTS",
            )
        targets.append(Target(file, path, path.with_name(path.name + ".part")))
    return await download_targets(stub, targets, progress=progress, at_once=at_once)


async def download_targets(
    stub: registry_pb2_grpc.RegistryServiceStub,
    targets: Iterable[Target],
    *,
    progress: Progress = unheard,
    at_once: int = AT_ONCE,
) -> int:
    """As `download_files`, each file to a place of its own; several processes may want the same one."""
    turn = asyncio.Semaphore(at_once)
    received = 0

    async def fetch(target: Target) -> None:
        nonlocal received
        async with turn:
            count = await download_file(stub, target, progress)
            received += count

    async with contextlib.AsyncExitStack() as stack:
        tasks = [asyncio.create_task(fetch(target), name=f"fetch {target.file.path}") for target in targets]
        stack.push_async_callback(_end, tasks)
        for task in asyncio.as_completed(tasks):
            await task
    return received


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def download_file(
    stub: registry_pb2_grpc.RegistryServiceStub, target: Target, progress: Progress = unheard
) -> int:
    """One file; gives the bytes that came over the network. Raises as `download_files` does."""
    async with _opened(target) as partial:
        if partial is None:
            progress(target.file.size)
            return 0
        if partial.size > target.file.size:
            partial.start_over()
        while await run_blocking(None, partial.catch_up):
            pass
        progress(begun := partial.size)
        received = await _receive(stub, target, partial, progress)
        try:
            await run_blocking(None, partial.finish, target.file.digest, target.path)
        except DataLoss:
            # What a crash left may be other than what was written: once it is fetched anew.
            if not begun:
                raise
            progress(-target.file.size)
        else:
            return received
    return received + await download_file(stub, target, progress)


async def _receive(
    stub: registry_pb2_grpc.RegistryServiceStub,
    target: Target,
    partial: PartialFile,
    progress: Progress,
) -> int:
    """Appends what is missing; gives how many bytes that was."""
    retries, before = Retries(), partial.size
    while partial.size < target.file.size:
        request = transfer_pb2.DownloadBlobRequest(digest=target.file.digest, offset=partial.size)
        call = stub.DownloadBlob(request)
        try:
            async for data in _chunks(call, target.file, partial):
                await run_blocking(None, partial.append, data)
                progress(len(data))
                retries.progress()
            if partial.size < target.file.size:
                raise _other_size(target.file, partial.size)
        except (grpc.aio.AioRpcError, DeadlineExceeded) as error:
            await retries.pause(error)
        finally:
            call.cancel()
    return partial.size - before


async def _chunks(
    call: grpc.aio.UnaryStreamCall[transfer_pb2.DownloadBlobRequest, transfer_pb2.DownloadBlobResponse],
    file: StoredFile,
    partial: PartialFile,
) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(_IDLE_S):
                response = await call.read()
        except TimeoutError:
            raise DeadlineExceeded(
                f"the registry sent nothing of {file.path} for {_IDLE_S:.0f} s", reason="STALLED"
            ) from None
        if not isinstance(response, transfer_pb2.DownloadBlobResponse):
            return
        if response.total_bytes not in (0, file.size):
            raise _other_size(file, response.total_bytes)
        end = response.offset + len(response.data)
        if response.offset != partial.size or end > file.size:
            raise _other_size(file, end)
        yield response.data


def checked_path(path: str) -> str:
    """The path, which stays inside its folder; raises DataLoss (PATH_OUTSIDE)."""
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or "\0" in path:
        raise DataLoss(f"the registry names a file {path[:100]!r}", reason="PATH_OUTSIDE")
    return path


def _other_size(file: StoredFile, size: int) -> DataLoss:
    return DataLoss(
        f"the registry gives {file.path} ({file.digest}) as {size} bytes where {file.size} are due; verify "
        "it there, and import the model again if it is damaged",
        reason="SIZE_MISMATCH",
    )


@contextlib.asynccontextmanager
async def _opened(target: Target) -> AsyncIterator[PartialFile | None]:
    """The partial file, once it is this process's; None where the whole one is there."""
    while True:
        try:
            opened = await acquire(None, lambda: _open(target), _close)
            break
        except Unavailable:
            # Another process fetches it: it is needed once on a machine.
            await asyncio.sleep(_LOOK_EVERY_S)
    try:
        yield opened
    finally:
        await run_blocking(None, _close, opened)


def _close(opened: PartialFile | None) -> None:
    if opened is not None:
        opened.close()


def _open(target: Target) -> PartialFile | None:
    if _is_there(target):
        return None
    partial = PartialFile.open(target.partial)
    if not _is_there(target):
        return partial
    # The one that fetched it was done between the look and the lock.
    partial.remove()
    partial.close()
    return None


def _is_there(target: Target) -> bool:
    try:
        return target.path.stat().st_size == target.file.size
    except FileNotFoundError:
        return False

"""Blobs on their way in and out, behind asynchronous methods: in threads of their own, in bounded numbers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from treadle.errors import DataLoss, DeadlineExceeded, NotFound, OutOfRange, ResourceExhausted, invalid_field
from treadle.transfer.blocking import acquire, run_blocking, run_heard
from treadle.transfer.partial_file import PartialFile
from treadle_registry.names import check_digest
from treadle_registry.store.staging import disk_errors
from treadle_registry.store.store import Store
from treadle_registry.store.uploads import Arrived, Uploads

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
MAX_BLOB_BYTES = 1 << 40
IDLE_S = 60.0
"""For a client to send or to take one chunk."""
_SWEEP_EVERY_S = 3600.0
_THREADS = 8
_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class UploadChunk:
    """A message of an upload; `digest` and `total_bytes` are the first one's."""

    digest: str
    total_bytes: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class DownloadChunk:
    """A message of a download."""

    offset: int
    data: bytes
    total_bytes: int


class Transfers:
    """All transfers of one registry. `running` sweeps up what nobody comes back for."""

    def __init__(
        self,
        store: Store,
        *,
        max_uploads: int,
        max_downloads: int,
        max_upload_bytes: int,
        used: Callable[[str], None],
    ) -> None:
        """`used` is told of every file that is sent, as long as it is."""
        self._store, self._used = store, used
        self._uploads = Uploads(store, max_upload_bytes)
        self._max = {"upload": max_uploads, "download": max_downloads}
        self._now = {"upload": 0, "download": 0}
        self._to_come: dict[object, int] = {}
        """Bytes of running uploads that are not here yet."""
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="transfer")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Transfers]:
        """Sweeps now and then until the block's end."""
        sweeping = asyncio.create_task(self._sweep(), name="sweep uploads")
        try:
            yield self
        finally:
            sweeping.cancel()
            await asyncio.gather(sweeping, return_exceptions=True)
            self._threads.shutdown()

    async def _sweep(self) -> None:
        while True:
            try:
                swept = await run_blocking(self._threads, self._uploads.sweep)
            except OSError as error:
                logger.warning("old uploads cannot be removed", extra={"cause": str(error)})
            else:
                logger.info("old uploads were removed", extra={"files": swept})
            await asyncio.sleep(_SWEEP_EVERY_S)

    @contextlib.contextmanager
    def _turn(self, kind: str) -> Iterator[None]:
        if self._now[kind] >= self._max[kind]:
            raise ResourceExhausted(
                f"{self._max[kind]} {kind}s run already; try again",
                reason=f"TOO_MANY_{kind.upper()}S",
                retry_after_s=_AGAIN_S,
            )
        self._now[kind] += 1
        try:
            yield
        finally:
            self._now[kind] -= 1

    async def arrived(self, digest: str) -> Arrived:
        """How much of a file is here; see `Uploads.arrived`."""
        check_digest(digest, "digest")
        return await run_heard(partial(self._uploads.arrived, digest))

    async def upload(
        self, chunks: AsyncIterator[UploadChunk], accepted: Callable[[], Awaitable[None]]
    ) -> int:
        """Takes a file, or the rest of one; gives how many bytes are here at the end.

        `accepted` is called once nothing speaks against it, before more than the first chunk is read, and not
        for a file that is here whole. What came is kept however it ends. Raises InvalidArgument, what
        `Uploads.begin` raises, DataLoss (CHECKSUM_MISMATCH), ResourceExhausted (DISK_FULL,
        TOO_MANY_UPLOADS), and DeadlineExceeded for a client that sends nothing for a minute.
        """
        with self._turn("upload"):
            first = await _next(chunks)
            if first is None:
                raise invalid_field("digest", "must be in the first message; there was none")
            check_digest(first.digest, "digest")
            if first.total_bytes > MAX_BLOB_BYTES:
                raise invalid_field("total_bytes", f"must be at most {MAX_BLOB_BYTES}")
            _check_chunk(first, first.offset, first.total_bytes)
            with self._reserved(first) as (mine, others):
                begin = partial(self._uploads.begin, first.digest, first.total_bytes, first.offset, others)
                arriving = await acquire(self._threads, begin, _close)
                try:
                    if arriving is None:
                        # Not accepted: nothing more of it is wanted, and who sends would be broken off.
                        return (await self.arrived(first.digest)).size
                    await accepted()
                    return await self._take(arriving, first, chunks, mine)
                finally:
                    await run_blocking(self._threads, _close, arriving)

    @contextlib.contextmanager
    def _reserved(self, first: UploadChunk) -> Iterator[tuple[object, int]]:
        """Counts what is to come of an upload, before anything is awaited: the next one that begins sees it.

        Gives the reservation, and how much others have reserved.
        """
        mine, others = object(), sum(self._to_come.values())
        self._to_come[mine] = first.total_bytes - first.offset
        try:
            yield mine, others
        finally:
            del self._to_come[mine]

    async def _take(
        self, arriving: PartialFile, first: UploadChunk, chunks: AsyncIterator[UploadChunk], reserved: object
    ) -> int:
        began, before, total = time.monotonic(), arriving.size, first.total_bytes
        while await run_blocking(self._threads, arriving.catch_up):
            pass
        chunk: UploadChunk | None = first
        while chunk is not None:
            _check_chunk(chunk, arriving.size, total)
            self._to_come[reserved] = total - arriving.size
            with disk_errors("an upload"):
                await run_blocking(self._threads, arriving.append, chunk.data)
            chunk = await _next(chunks)
        if arriving.size == total:
            with disk_errors("an upload"):
                await run_blocking(
                    self._threads, arriving.finish, first.digest, self._uploads.path(first.digest)
                )
        took = round((time.monotonic() - began) * 1e3)
        logger.info(
            "a blob came",
            extra={
                "blob": first.digest,
                "from": before,
                "bytes": arriving.size - before,
                "complete": arriving.size == total,
                "milliseconds": took,
            },
        )
        return arriving.size

    async def download(self, digest: str, offset: int) -> AsyncGenerator[DownloadChunk, None]:
        """A file of an artifact from `offset` on, each chunk read when it is asked for.

        Raises InvalidArgument, NotFound (BLOB_NOT_FOUND), OutOfRange, DataLoss for a disk that fails, and
        ResourceExhausted (TOO_MANY_DOWNLOADS).
        """
        with self._turn("download"):
            descriptor = await acquire(self._threads, partial(self._open, digest), os.close)
            at = offset
            try:
                total = os.fstat(descriptor).st_size
                if offset > total:
                    raise OutOfRange(
                        f"the file has {total} bytes; {offset} is beyond its end",
                        reason="OFFSET_BEYOND_END",
                        metadata={"total_bytes": str(total)},
                    )
                while True:
                    data = await run_blocking(self._threads, _read, descriptor, at, total, digest)
                    self._used(digest)
                    yield DownloadChunk(at, data, total)
                    at += len(data)
                    if at == total:
                        return
            finally:
                os.close(descriptor)
                logger.info("a blob went", extra={"blob": digest, "from": offset, "bytes": at - offset})

    def _open(self, digest: str) -> int:
        path = self._store.blob_path(digest)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(
                f"no artifact has a file {digest}; ResolveModel lists them",
                reason="BLOB_NOT_FOUND",
            ) from None


def _close(arriving: PartialFile | None) -> None:
    if arriving is not None:
        arriving.close()


def _read(descriptor: int, at: int, total: int, digest: str) -> bytes:
    try:
        data = os.pread(descriptor, min(CHUNK, total - at), at)
    except OSError as error:
        raise DataLoss(
            f"the file {digest} cannot be read: {error.strerror}; import its model again, which replaces it",
            reason="DAMAGED_FILE",
        ) from error
    if not data and at < total:
        raise DataLoss(
            f"the file {digest} ends at {at} where {total} bytes are due; import its model again",
            reason="DAMAGED_FILE",
        )
    return data


async def _next(chunks: AsyncIterator[UploadChunk]) -> UploadChunk | None:
    try:
        async with asyncio.timeout(IDLE_S):
            return await anext(chunks, None)
    except TimeoutError:
        raise DeadlineExceeded(
            f"nothing came for {IDLE_S:.0f} s; ask GetUpload, and go on there", reason="STALLED"
        ) from None


def _check_chunk(chunk: UploadChunk, offset: int, total: int) -> None:
    if len(chunk.data) > CHUNK:
        raise invalid_field("data", f"has {len(chunk.data)} bytes; a message takes at most {CHUNK}")
    if chunk.offset != offset:
        raise invalid_field("offset", f"must be {offset}, where the message before ended; got {chunk.offset}")
    if chunk.offset + len(chunk.data) > total:
        raise invalid_field(
            "data", f"ends at {chunk.offset + len(chunk.data)}; the first message said {total} bytes"
        )

"""What a machine keeps of models whose files it cannot read where the registry has them."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Collection
from functools import partial

from treadle.api.registry.v1 import registry_pb2_grpc
from treadle.models.stored_folder import StoredFile, StoredFolder
from treadle.transfer.blocking import acquire, run_blocking, run_heard
from treadle.transfer.cache_folder import CacheFolder
from treadle.transfer.config import NodeCacheConfig
from treadle.transfer.download import Target, checked_path, download_targets

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 10.0
_TRIES = 3
"""That a file was there and then evicted by another process, before it had its name."""


class NodeCache:
    """Folders of artifacts on this machine, fetched where they must be; several processes share one cache.

    An artifact that was obtained is held, and never evicted, until `release` or the process's end.
    """

    def __init__(self, config: NodeCacheConfig, registry: registry_pb2_grpc.RegistryServiceStub) -> None:
        self._disk = CacheFolder(config.folder, config.max_bytes)
        self._registry = registry
        self._held: dict[str, tuple[int, int]] = {}

    async def obtain(self, folder: StoredFolder, names: Collection[str] | None = None) -> StoredFolder:
        """The folder itself where this machine can read it, else one with the files `names`, or all of them.

        Files that are here are checked, and fetched again where they are damaged. Takes as long as it takes.
        Raises what the registry raises (NotFound for a file that it no longer has), DataLoss for content that
        is not what its digest says, ResourceExhausted (NODE_CACHE_FULL, or DISK_FULL), and FailedPrecondition
        (NODE_CACHE_NOT_WRITABLE) for a cache that cannot be used.
        """
        files = [file for file in folder.files if names is None or file.path in names]
        if await run_blocking(None, _is_readable, folder, files):
            return folder
        for file in files:
            checked_path(file.path)
        digest = folder.artifact_digest
        with self._disk.errors():
            await run_blocking(None, self._disk.prepare)
            await self._hold(digest)
            try:
                await self._fill(digest, files)
                if names is None:
                    await run_blocking(None, self._disk.take_away_strangers, digest, files)
            except BaseException:
                self.release(digest)
                raise
        return StoredFolder(self._disk.artifact(digest), digest, folder.files)

    @contextlib.asynccontextmanager
    async def held(
        self, folder: StoredFolder, names: Collection[str] | None = None
    ) -> AsyncIterator[StoredFolder]:
        """As `obtain`, until the block's end."""
        found = await self.obtain(folder, names)
        try:
            yield found
        finally:
            if found is not folder:
                self.release(folder.artifact_digest)

    async def _hold(self, digest: str) -> None:
        descriptor, users = self._held.get(digest, (-1, 0))
        if not users:
            descriptor = await acquire(None, lambda: self._disk.hold(digest), os.close)
            # Another task may have come first meanwhile.
            known, users = self._held.get(digest, (-1, 0))
            if users:
                os.close(descriptor)
                descriptor = known
        self._held[digest] = (descriptor, users + 1)

    def release(self, digest: str) -> None:
        """Says that one who obtained the artifact needs its files no more; others may not know it here."""
        descriptor, users = self._held.pop(digest, (-1, 0))
        if users > 1:
            self._held[digest] = (descriptor, users - 1)
        elif users:
            os.close(descriptor)

    def close(self) -> None:
        """Lets go of everything."""
        for descriptor, _ in self._held.values():
            os.close(descriptor)
        self._held.clear()

    async def _fill(self, digest: str, files: list[StoredFile]) -> None:
        for tries_left in reversed(range(_TRIES)):
            lacking = [file for file in files if await run_heard(partial(self._disk.lacks, digest, file))]
            if not lacking:
                return
            await self._fetch(digest, lacking)
            try:
                await run_blocking(None, self._disk.link, digest, lacking)
                return
            except FileNotFoundError:
                if not tries_left:
                    raise

    async def _fetch(self, digest: str, files: list[StoredFile]) -> None:
        await run_blocking(None, self._disk.make_room, files)
        total, here, said = sum(file.size for file in files), 0, time.monotonic()

        def progress(count: int) -> None:
            nonlocal here, said
            here += count
            if time.monotonic() - said >= _SAY_EVERY_S:
                said = time.monotonic()
                logger.info("a model is fetched", extra={"artifact": digest, "bytes": here, "of": total})

        began = time.monotonic()
        # The small ones first: who wants the tokenizer alone waits for no weights.
        ordered = sorted({file.digest: file for file in files}.values(), key=lambda file: file.size)
        targets = [Target(file, self._disk.blob(file), self._disk.partial(file)) for file in ordered]
        received = await download_targets(self._registry, targets, progress=progress)
        logger.info(
            "files were fetched into the node cache",
            extra={
                "artifact": digest,
                "files": len(ordered),
                "bytes": total,
                "received_bytes": received,
                "milliseconds": round((time.monotonic() - began) * 1e3),
            },
        )


def _is_readable(folder: StoredFolder, files: list[StoredFile]) -> bool:
    """Whether the registry's own folder is on this machine; what lacks in it then is damage."""
    if not folder.path.is_absolute():
        return False
    try:
        next(folder.path.iterdir(), None)
        places = [folder.path / file.path for file in files]
        return all(os.access(place, os.R_OK) or not place.exists() for place in places)
    except OSError:
        return False

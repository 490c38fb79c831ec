"""The registry itself: store and catalog as one, behind asynchronous methods.

Everything that touches a disk runs in one thread, one call after another, so that an alias cannot be
pointed at an artifact while that is being deleted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from treadle.errors import Aborted, DataLoss, FailedPrecondition, NotFound, TreadleError
from treadle_registry.catalog.aliases import Alias
from treadle_registry.catalog.catalog import Catalog
from treadle_registry.names import check_alias, check_digest, is_digest
from treadle_registry.operations.job import Imported
from treadle_registry.pages import LAST, page_of, page_size, read_token
from treadle_registry.rollout.changes import Change, ChangeLog
from treadle_registry.rollout.deploying import Deploying
from treadle_registry.rollout.leasing import Leasing
from treadle_registry.rollout.rollouts import Rollouts
from treadle_registry.store.readings import Readings
from treadle_registry.store.staging import disk_errors
from treadle_registry.store.store import Published, Store
from treadle_registry.uses import Uses

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

_KEPT_READINGS = 16_384
"""Manifests in memory, about four kilobytes each: lists of 10,000 artifacts are read once."""


class Registry:
    """Artifacts, aliases, deployments and leases. Made by `open`, ended by `close`."""

    def __init__(
        self,
        readings: Readings,
        rollouts: Rollouts,
        uses: Uses,
        changes: ChangeLog,
        thread: ThreadPoolExecutor,
    ) -> None:
        self.store, self.readings = readings.store, readings
        self.catalog, self.rollouts, self.changes = rollouts.catalog, rollouts, changes
        self.deploying, self.leasing = Deploying(rollouts), Leasing(rollouts, self._compute_digest)
        self.uses = uses
        self._thread = thread

    @classmethod
    async def open(cls, folder: Path) -> Registry:
        """Opens the store at `folder`; raises FailedPrecondition when another registry serves it."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry-disk")
        loop, changes = asyncio.get_running_loop(), ChangeLog()

        def publish(news: Sequence[Change]) -> None:
            loop.call_soon_threadsafe(changes.add, news)

        def prepare() -> tuple[Readings, Rollouts, Uses]:
            with disk_errors("the registry's database"):
                readings = Readings(Store.open(folder), capacity=_KEPT_READINGS)
                catalog = Catalog(folder)
                found = _readable(readings.read, readings.store.digests())
                catalog.artifacts.index({one.manifest.digest: one.manifest.create_time for one in found})
                uses = Uses(catalog.artifacts, partial(_files, readings.read))
                return readings, Rollouts(catalog, publish=publish), uses

        try:
            return cls(*await loop.run_in_executor(thread, prepare), changes, thread)
        except BaseException:
            thread.shutdown(wait=False)
            raise

    async def close(self) -> None:
        """Lets another registry have the store."""
        try:
            await self.keep_uses()
        except TreadleError as error:
            logger.error("when artifacts were used last cannot be kept", extra={"cause": error.message})
        finally:
            await self.in_thread(self.catalog.close)
            self._thread.shutdown()

    async def in_thread(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Runs a blocking call of the store or the catalog, in its turn.

        Raises ResourceExhausted (DISK_FULL) and FailedPrecondition (STORE_READ_ONLY, STORE_NOT_WRITABLE)
        beside what the call raises.
        """

        asked_at = self.rollouts.clock()

        def run() -> _T:
            self.rollouts.asked_at = asked_at
            with disk_errors("the registry's database"):
                return call(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def resolve(self, model: str) -> tuple[Published, Alias | None]:
        """An alias or digest to its artifact; raises NotFound. What is asked for often costs no disk."""
        alias = None if is_digest(model) else self.catalog.aliases.get(check_alias(model, "model"))
        digest = alias.digest if alias else model
        published = self.readings.recent(digest)
        if published is None:
            published = await self.in_thread(self._artifact, digest)
        self.uses.touch(digest)
        return published, alias

    def _artifact(self, digest: str) -> Published:
        if not self.catalog.artifacts.has(digest):
            # One whose manifest cannot be read is in no index: then this says so.
            self.store.get(digest)
            self.catalog.artifacts.need(digest)
        return self.readings.read(digest)

    def _compute_digest(self, digest: str) -> str:
        digests = self.readings.read(digest).manifest.digests
        assert digests is not None, "an artifact in the store has digests"
        return digests.compute

    async def keep_uses(self) -> None:
        """Writes when artifacts were used last."""
        await self.in_thread(self.uses.keep)

    async def artifacts(self, size: int, token: str) -> tuple[list[Published], str]:
        """A page of artifacts by digest, and the next page's token."""
        limit, after = page_size(size), str(read_token(token, "artifacts", ""))

        def read() -> tuple[list[Published], str]:
            digests = self.catalog.artifacts.page(after, limit + 1)
            page, following = page_of(digests, limit, "artifacts", str)
            return _readable(self.readings.read, page), following

        return await self.in_thread(read)

    async def delete_artifact(self, digest: str) -> int:
        """Deletes an artifact; gives the freed bytes. Raises NotFound, and FailedPrecondition when in use."""
        check_digest(digest, "digest")
        return await self.in_thread(self._delete, digest)

    def _delete(self, digest: str) -> int:
        self.catalog.artifacts.need(digest)
        self.leasing.lapse()
        if reasons := self.rollouts.held().get(digest):
            raise FailedPrecondition(
                f"the artifact is {'; '.join(reasons[:10])}"
                f"{f', and {len(reasons) - 10} more' if len(reasons) > 10 else ''}; end that first",
                reason="ARTIFACT_IN_USE",
            )
        return self.remove([digest])

    def remove(self, digests: Sequence[str]) -> int:
        """Deletes artifacts that nothing holds, in the registry's thread; gives the freed bytes."""
        for digest in digests:
            self.readings.forget(digest)
        try:
            return self.store.delete(*digests)
        finally:
            # Files first: on a full disk only then is there room to write that they are gone.
            gone = [digest for digest in digests if not self.store.folder(digest).exists()]
            self.catalog.artifacts.remove(gone)

    async def set_alias(self, name: str, digest: str, etag: str) -> Alias:
        """Creates or moves an alias; see `Deploying.set_alias`."""
        return await self.in_thread(self.deploying.set_alias, name, digest, etag)

    async def delete_alias(self, name: str, etag: str) -> None:
        """Forgets an alias; raises NotFound, Aborted, and FailedPrecondition while it is deployed."""
        await self.in_thread(self.deploying.delete_alias, name, etag)

    async def aliases(self, size: int, token: str) -> tuple[list[Alias], str]:
        """A page of aliases by name, and the next page's token."""
        limit, after = page_size(size), str(read_token(token, "aliases", ""))
        rows = await self.in_thread(self.catalog.aliases.page, after, limit + 1)
        return page_of(rows, limit, "aliases", lambda alias: alias.name)

    async def alias_history(self, name: str, size: int, token: str) -> tuple[list[Alias], str]:
        """A page of where an alias has pointed, newest first; raises NotFound for a name that never was."""
        check_alias(name, "name")
        listing = f"history/{name}"
        limit, before = page_size(size), int(read_token(token, listing, LAST))
        rows = await self.in_thread(self.catalog.aliases.history, name, before, limit + 1)
        if not rows and not token:
            raise NotFound(f"there never was an alias {name!r}", reason="MODEL_NOT_FOUND")
        page, following = page_of(rows, limit, listing, lambda row: row[0])
        return [alias for _, alias in page], following

    async def adopt(self, imported: Imported, alias: str) -> None:
        """Takes a published artifact into the catalog, and points `alias` at it where one was asked for."""
        digest = imported.manifest.digest

        def take() -> None:
            try:
                self.readings.read(digest)
            except NotFound:
                raise Aborted(
                    "the artifact was deleted before the import ended; import it again", reason="DELETED"
                ) from None
            self.uses.add(digest)
            if alias:
                self._name(alias, digest)

        await self.in_thread(take)

    def _name(self, alias: str, digest: str) -> None:
        """Names what was just brought in; an error says that it is there all the same."""
        try:
            self.deploying.set_alias(alias, digest)
        except TreadleError as error:
            raise type(error)(
                f"the model is in the store as {digest}, but {alias!r} does not name it: {error.message}",
                reason=error.reason,
                fields=error.fields,
                retry_after_s=error.retry_after_s,
                metadata=error.metadata | {"artifact_digest": digest},
            ) from error

    async def adopt_strays(self) -> None:
        """Takes into the index what the store has beside it: published by a job that was killed then."""

        def take() -> None:
            known = self.catalog.artifacts.last_uses()
            strays = [digest for digest in self.store.digests() if digest not in known]
            for published in _readable(self.readings.read, strays):
                self.uses.add(published.manifest.digest)

        await self.in_thread(take)


def _files(read: Callable[[str], Published], digest: str) -> frozenset[str]:
    """The digests of an artifact's files; none where its manifest cannot be read."""
    try:
        manifest = read(digest).manifest
    except (DataLoss, NotFound, FailedPrecondition):
        return frozenset()
    return frozenset(file.digest for file in (*manifest.files, *manifest.source_files))


def _readable(read: Callable[[str], Published], digests: Iterable[str]) -> list[Published]:
    """The artifacts whose manifests can be read: one that cannot must not take the others along."""
    readable = []
    for digest in digests:
        try:
            readable.append(read(digest))
        except (DataLoss, NotFound, FailedPrecondition) as error:
            logger.error("an artifact is left out", extra={"artifact": digest, "reason": error.message})
    return readable

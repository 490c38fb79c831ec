"""The registry itself: store and catalog as one, behind asynchronous methods.

Everything that touches a disk runs in one thread, one call after another, so that an alias cannot be
pointed at an artifact while that is being deleted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from treadle.errors import Aborted, DataLoss, FailedPrecondition, NotFound
from treadle_registry.catalog.aliases import Alias
from treadle_registry.catalog.catalog import Catalog
from treadle_registry.names import check_alias, check_digest, is_digest
from treadle_registry.operations.job import Imported
from treadle_registry.pages import LAST, next_token, page_size, read_token
from treadle_registry.store.staging import disk_errors
from treadle_registry.store.store import Published, Store

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Registry:
    """Artifacts and aliases. Made by `open`, ended by `close`."""

    def __init__(self, store: Store, catalog: Catalog, thread: ThreadPoolExecutor) -> None:
        self.store, self.catalog = store, catalog
        self._thread = thread

    @classmethod
    async def open(cls, folder: Path) -> Registry:
        """Opens the store at `folder`; raises FailedPrecondition when another registry serves it."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry-disk")

        def prepare() -> tuple[Store, Catalog]:
            with disk_errors("the registry's database"):
                store = Store.open(folder)
                catalog = Catalog(folder)
                catalog.artifacts.index(found.manifest.digest for found in _readable(store, store.digests()))
                return store, catalog

        try:
            return cls(*await asyncio.get_running_loop().run_in_executor(thread, prepare), thread)
        except BaseException:
            thread.shutdown(wait=False)
            raise

    async def close(self) -> None:
        """Lets another registry have the store."""
        await self.in_thread(self.catalog.close)
        self._thread.shutdown()

    async def in_thread(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Runs a blocking call of the store or the catalog, in its turn.

        Raises ResourceExhausted (DISK_FULL) and FailedPrecondition (STORE_READ_ONLY, STORE_NOT_WRITABLE)
        beside what the call raises.
        """

        def run() -> _T:
            with disk_errors("the registry's database"):
                return call(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def resolve(self, model: str) -> tuple[Published, Alias | None]:
        """An alias or digest to its artifact; raises NotFound."""
        if is_digest(model):
            return await self.in_thread(self._artifact, model), None
        check_alias(model, "model")

        def find() -> tuple[Published, Alias | None]:
            alias = self.catalog.aliases.get(model)
            return self.store.get(alias.digest), alias

        return await self.in_thread(find)

    def _artifact(self, digest: str) -> Published:
        if not self.catalog.artifacts.has(digest):
            raise NotFound(f"no artifact {digest} in the store", reason="MODEL_NOT_FOUND")
        return self.store.get(digest)

    async def artifacts(self, size: int, token: str) -> tuple[list[Published], str]:
        """A page of artifacts by digest, and the next page's token."""
        limit, after = page_size(size), str(read_token(token, "artifacts", ""))

        def read() -> tuple[list[Published], str]:
            digests = self.catalog.artifacts.page(after, limit + 1)
            page, following = _page(digests, limit, "artifacts", str)
            return _readable(self.store, page), following

        return await self.in_thread(read)

    async def delete_artifact(self, digest: str) -> int:
        """Deletes an artifact; gives the freed bytes. Raises NotFound, and FailedPrecondition when in use."""
        check_digest(digest, "digest")

        def delete() -> int:
            self.catalog.artifacts.remove(digest)
            return self.store.delete(digest)

        return await self.in_thread(delete)

    async def set_alias(self, name: str, digest: str, etag: str) -> Alias:
        """Creates or moves an alias; raises NotFound, and Aborted when the etag is not the alias's."""
        check_alias(name, "name")
        check_digest(digest, "artifact_digest")
        return await self.in_thread(self.catalog.aliases.set, name, digest, etag)

    async def delete_alias(self, name: str, etag: str) -> None:
        """Forgets an alias; raises NotFound and Aborted."""
        check_alias(name, "name")
        await self.in_thread(self.catalog.aliases.delete, name, etag)

    async def aliases(self, size: int, token: str) -> tuple[list[Alias], str]:
        """A page of aliases by name, and the next page's token."""
        limit, after = page_size(size), str(read_token(token, "aliases", ""))
        rows = await self.in_thread(self.catalog.aliases.page, after, limit + 1)
        return _page(rows, limit, "aliases", lambda alias: alias.name)

    async def alias_history(self, name: str, size: int, token: str) -> tuple[list[Alias], str]:
        """A page of where an alias has pointed, newest first; raises NotFound for a name that never was."""
        check_alias(name, "name")
        listing = f"history/{name}"
        limit, before = page_size(size), int(read_token(token, listing, LAST))
        rows = await self.in_thread(self.catalog.aliases.history, name, before, limit + 1)
        if not rows and not token:
            raise NotFound(f"there never was an alias {name!r}", reason="MODEL_NOT_FOUND")
        page, following = _page(rows, limit, listing, lambda row: row[0])
        return [alias for _, alias in page], following

    async def adopt(self, imported: Imported, alias: str) -> None:
        """Takes a published artifact into the catalog, and points `alias` at it where one was asked for."""
        digest = imported.manifest.digest

        def take() -> None:
            try:
                self.store.get(digest)
            except NotFound:
                raise Aborted(
                    "the artifact was deleted before the import ended; import it again", reason="DELETED"
                ) from None
            self.catalog.artifacts.add(digest)
            if alias:
                self.catalog.aliases.set(alias, digest)

        await self.in_thread(take)


def _readable(store: Store, digests: Iterable[str]) -> list[Published]:
    """The artifacts whose manifests can be read: one that cannot must not take the others along."""
    readable = []
    for digest in digests:
        try:
            readable.append(store.get(digest))
        except (DataLoss, NotFound, FailedPrecondition) as error:
            logger.error("an artifact is left out", extra={"artifact": digest, "reason": error.message})
    return readable


def _page(rows: list[_T], limit: int, listing: str, key: Callable[[_T], str | int]) -> tuple[list[_T], str]:
    """The first `limit` of one row more, and the token that leads on when that one was there."""
    page = rows[:limit]
    return page, next_token(listing, key(page[-1])) if len(rows) > limit else ""

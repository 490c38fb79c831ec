"""Brings files of a repository into the Hugging Face cache: several at once, each once a machine, hashed as
they come, and going on where the last attempt ended, be that in this process or in one that was killed.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Collection
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from treadle.errors import Cancelled, DataLoss, PermissionDenied, ResourceExhausted, TreadleError, Unavailable
from treadle.transfer.partial_file import PartialFile
from treadle_registry.operations.progress import Progress, Report, Stage
from treadle_registry.sources.hub_cache import HubCache, cache_errors
from treadle_registry.sources.hub_client import HubClient, HubFile, Listing
from treadle_registry.sources.hub_errors import RATE_LIMITED, UNREACHABLE
from treadle_registry.sources.hub_source import HubSource

PARALLEL = 4
"""Files at once: one connection rarely fills a line, and the hub counts requests."""
_TRIES = 5
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0
_PROGRESS_BYTES = 1 << 20
"""An attempt that brought as much does not count as one that failed."""


class DownloadMeter:
    """Adds up bytes and files of all downloads of an import, from several threads."""

    def __init__(self, report: Report) -> None:
        self._report, self._lock = report, threading.Lock()
        self._files: dict[str, int] = {}
        self._done_bytes = self._total_bytes = self._done_files = 0

    def expect(self, files: dict[str, int]) -> None:
        """So many bytes of each are to come."""
        with self._lock:
            self._total_bytes += sum(files.values())
            self._files |= dict.fromkeys(files, 0)
            self._say()

    def at(self, name: str, size: int) -> None:
        """So many bytes of a file are there."""
        with self._lock:
            self._done_bytes += size - self._files[name]
            self._files[name] = size
            self._say()

    def done(self, name: str, size: int) -> None:
        """A file is there."""
        with self._lock:
            self._done_bytes += size - self._files[name]
            self._files[name] = size
            self._done_files += 1
            self._say()

    def _say(self) -> None:
        self._report(
            Progress(
                Stage.DOWNLOADING, self._done_bytes, self._total_bytes, self._done_files, len(self._files)
            )
        )


class HubDownload:
    """Downloads of one import."""

    def __init__(self, client: HubClient, source: HubSource, listing: Listing, report: Report) -> None:
        self._client, self._source, self._listing = client, source, listing
        self.cache = HubCache(client.cache, source.repository)
        self._meter = DownloadMeter(report)
        self._stop = threading.Event()

    def fetch(self, names: Collection[str]) -> dict[str, Path]:
        """Where the files lie, after those that the cache lacks have come.

        Raises what went wrong first: Unavailable, DataLoss (CHECKSUM_MISMATCH), ResourceExhausted (DISK_FULL,
        HUB_RATE_LIMITED), PermissionDenied (HUB_CACHE_NOT_WRITABLE, GATED_REPOSITORY) and others. What has
        come by then stays for the next attempt.
        """
        commit, files = self._listing.commit, self._listing.files
        found = {name: self.cache.find(commit, name, files[name]) for name in names}
        missing = sorted(
            (name for name, path in found.items() if path is None), key=lambda name: -files[name].size
        )
        with cache_errors(self._client.cache):
            if missing:
                self.cache.make_folders(commit)
                self._check_room(missing)
                self._meter.expect({name: files[name].size for name in missing})
                found |= self._fetch_all(missing)
        paths = {name: path for name, path in found.items() if path is not None}
        try:
            self._give_names(paths)
        except PermissionDenied:
            # A cache that may only be read serves as well where it has everything.
            if missing:
                raise
        # By their own names, which errors say.
        named = {name: self.cache.pointer(commit, name) for name in paths}
        return {name: named[name] if named[name].exists() else path for name, path in paths.items()}

    def _give_names(self, paths: dict[str, Path]) -> None:
        commit = self._listing.commit
        with cache_errors(self._client.cache):
            for name, path in paths.items():
                self.cache.point(commit, name, path)
            self.cache.remember(self._source.wanted_revision, commit)

    def _check_room(self, names: Collection[str]) -> None:
        files = self._listing.files
        needed = sum(files[name].size - self.cache.partial_size(files[name]) for name in names)
        free = shutil.disk_usage(self.cache.folder).free
        if free < needed:
            raise ResourceExhausted(
                f"{needed} bytes are to come and the disk of the hub's cache {self._client.cache} has "
                f"{free} free; free some space, or name another folder in HF_HUB_CACHE",
                reason="DISK_FULL",
            )

    def _fetch_all(self, names: Collection[str]) -> dict[str, Path]:
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="hub-download") as pool:
            futures: dict[str, Future[Path]] = {name: pool.submit(self._fetch, name) for name in names}
            try:
                done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        self._stop.clear()
        failed = [error for future in done if not future.cancelled() and (error := future.exception())]
        if failed:
            # One that was stopped says nothing; the one that stopped it does.
            raise next((error for error in failed if not isinstance(error, Cancelled)), failed[0])
        return {name: future.result() for name, future in futures.items()}

    def _fetch(self, name: str) -> Path:
        """One file, when it is this process's turn; another may have brought it meanwhile."""
        file = self._listing.files[name]

        def waiting() -> None:
            self._check_stopped()
            self._meter.at(name, min(self.cache.partial_size(file), file.size))

        with self.cache.lock(file, waiting):
            path = self.cache.find(self._listing.commit, name, file)
            if path is None:
                path = self.cache.blob(file)
                with contextlib.closing(PartialFile.open(self.cache.partial(file), file.new_hash)) as partial:
                    self._bring(partial, name, path)
        self._meter.done(name, file.size)
        return path.resolve()

    def _bring(self, partial: PartialFile, name: str, path: Path) -> None:
        """Goes on with what is there, up to the whole file `path`; of nothing nothing is left."""
        file = self._listing.files[name]
        if partial.size > file.size:
            partial.start_over()
        try:
            while partial.catch_up():
                self._check_stopped()
            self._fill(partial, name)
            partial.finish(file.digest, path)
        except DataLoss as error:
            partial.remove()
            found = error.metadata.get("found_digest", "")
            what = f"its content is {found}, the hub names {file.digest}" if found else error.message
            raise DataLoss(
                f"{name} came damaged and was thrown away: {what}; import again, and look at proxies where "
                "it stays so",
                reason="CHECKSUM_MISMATCH",
                metadata={"file": name, "expected_hash": file.etag},
            ) from error
        finally:
            if partial.size == 0:
                partial.remove()

    def _fill(self, partial: PartialFile, name: str) -> None:
        """Asks for what is missing until nothing is, and gives up after several attempts without progress."""
        failures, due = 0, self._listing.files[name].size
        while partial.size < due:
            self._meter.at(name, partial.size)
            before = partial.size
            try:
                self._go_on(partial, name)
            except (Unavailable, ResourceExhausted) as error:
                failures = 0 if partial.size >= before + _PROGRESS_BYTES else failures + 1
                pause = _FIRST_PAUSE_S * 2**failures
                if error.reason == RATE_LIMITED:
                    pause = error.retry_after_s or pause
                if failures >= _TRIES or pause > _LONGEST_PAUSE_S:
                    raise _given_up(error, name, partial.size, self._listing.files[name]) from error
                self._stop.wait(pause)
            self._check_stopped()

    def _go_on(self, partial: PartialFile, name: str) -> None:
        due = self._listing.files[name].size
        with self._client.bytes_of(self._source, self._listing.commit, name, partial.size) as (start, pieces):
            if start != partial.size:
                partial.start_over()
            for piece in pieces:
                self._check_stopped()
                if partial.size + len(piece) > due:
                    raise DataLoss(f"more than {due} bytes come")
                partial.append(piece)
                self._meter.at(name, partial.size)
        if partial.size < due:
            raise Unavailable("the hub's answer ended early", reason=UNREACHABLE)

    def _check_stopped(self) -> None:
        if self._stop.is_set():
            raise Cancelled("another file of the model could not be had")


def _given_up(error: TreadleError, name: str, size: int, file: HubFile) -> TreadleError:
    return type(error)(
        f"{name}: {error.message}; {size} of {file.size} bytes have come and are kept: the next import "
        "goes on there",
        reason=error.reason,
        retry_after_s=error.retry_after_s,
    )

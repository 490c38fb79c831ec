"""Reads artifacts again, and says which of their files are not what the manifest says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from treadle.errors import DataLoss, NotFound
from treadle_registry.operations.progress import Progress, Report, Stage
from treadle_registry.store.file_digests import UNREADABLE, FileDigests
from treadle_registry.store.store import MANIFEST, Published, Store, listed_files

MAX_DAMAGED = 1000
"""Files that are named; the others wait for the next look."""


@dataclass(frozen=True, slots=True)
class DamagedFile:
    """A file that is missing, changed or a stranger (then nothing is expected)."""

    artifact_digest: str
    path: str
    expected_digest: str
    found_digest: str = ""


@dataclass(slots=True)
class _Meter:
    """Adds up over artifacts; a file that several share is read, and counted, once."""

    report: Report
    total_bytes: int
    total_items: int
    done_bytes: int = 0
    done_items: int = 0

    def read(self, count: int) -> None:
        self.done_bytes += count
        self.say()

    def say(self) -> None:
        self.report(
            Progress(Stage.VERIFYING, self.done_bytes, self.total_bytes, self.done_items, self.total_items)
        )


def verify_artifacts(store: Store, digests: Sequence[str], report: Report) -> tuple[int, list[DamagedFile]]:
    """Hashes every file of the artifacts; gives the bytes read, and what is damaged, MAX_DAMAGED at most.

    An artifact that is deleted meanwhile is passed over; one whose manifest cannot be read is damaged.
    """
    found: list[Published | DamagedFile] = []
    for digest in digests:
        try:
            found.append(store.get(digest))
        except NotFound:
            continue
        except DataLoss:
            found.append(DamagedFile(digest, MANIFEST, ""))
    sizes = {
        file.digest: file.size
        for one in found
        if isinstance(one, Published)
        for _, file in listed_files(one.manifest)
    }
    meter = _Meter(report, sum(sizes.values()), len(found))
    meter.say()
    hashes = FileDigests(meter.read)
    damaged: list[DamagedFile] = []
    for one in found:
        if isinstance(one, DamagedFile):
            damaged.append(one)
        else:
            damaged.extend(_damaged(store, one, hashes))
        meter.done_items += 1
        meter.say()
    return meter.done_bytes, damaged[:MAX_DAMAGED]


def _damaged(store: Store, published: Published, hashes: FileDigests) -> Iterator[DamagedFile]:
    folder, digest = published.canonical_folder.parent, published.manifest.digest
    expected = {path: file.digest for path, file in listed_files(published.manifest)}
    damaged = []
    for path, due in expected.items():
        there = hashes.of(folder / path)
        if there != due:
            damaged.append(DamagedFile(digest, path, due, "" if there == UNREADABLE else there))
    present = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    strangers = sorted(set(present) - expected.keys() - {MANIFEST})
    if store.folder(digest).exists():
        yield from damaged
        yield from (DamagedFile(digest, path, "", hashes.of(folder / path)) for path in strangers)

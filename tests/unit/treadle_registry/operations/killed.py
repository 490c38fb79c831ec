"""Runs imports that are killed at every write, each in a fork: `killed.py STORE KIND VALUE PACKAGES`.

A process of its own, because it forks: it has no thread. Every attempt begins with a copy of STORE, and what
it left is checked before the next one. Prints how many there were as JSON.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

STEPS = ("fsync", "link", "rename", "replace", "unlink", "fchmod", "mkdir", "open", "write")
"""What is counted: the calls that put bytes on the disk, make them durable, or give them a name."""


class Shim:
    """Kills the process just before, or in the middle of, the call whose number is `fatal`."""

    def __init__(self, fatal: int) -> None:
        self._left = fatal

    def install(self) -> None:
        for name in STEPS:
            setattr(os, name, self._counted(getattr(os, name)))
        real, counted = io.open, self._written

        class CountedFile(io.FileIO):
            def write(self, data: Any) -> int:
                return counted(super().write, memoryview(data).cast("B"))

        def open_(path: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if buffering == 0 and mode == "xb":
                return CountedFile(path, mode)
            return real(path, mode, buffering, *args, **kwargs)

        io.open = open_

    def _counted(self, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._count()
            return call(*args, **kwargs)

        return wrapper

    def _written(self, write: Any, data: memoryview) -> int:
        if self._left == 1:
            write(data[: len(data) // 2])
        self._count()
        return int(write(data))

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(root: Path, source: Any, fatal: int) -> bool:
    """Imports in a child that dies at the write `fatal`; True when it came to its end."""
    from treadle_registry.operations.importing import import_source
    from treadle_registry.store.store import Store

    pid = os.fork()
    if pid == 0:
        store = Store.open(root)
        Shim(fatal).install()
        import_source(store, source)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return True
    assert os.WTERMSIG(status) == signal.SIGKILL
    return False


def main() -> None:
    template, kind, value, packages = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    sys.path.append(packages)
    # Processes die here, and not the machine: what the kernel was given is kept.
    os.fsync = lambda descriptor: None
    from treadle_registry.operations.importing import import_source
    from treadle_registry.sources.source import LocalSource
    from treadle_registry.store.store import Store

    source, root = LocalSource(kind, value), template.with_name("attempt")
    damaged = {digest for digest in Store(template).digests() if not is_whole(Store(template), digest)}
    told = {"killed": 0, "half_done": 0, "published": 0, "imported_again": 0}
    told["damaged"] = len(damaged)
    while True:
        shutil.rmtree(root, ignore_errors=True)
        copy(template, root)
        ended = attempt(root, source, told["killed"] + 1)
        told["killed"] += not ended
        told["half_done"] += any(path.is_file() for path in (root / "tmp").rglob("*/*"))
        store = Store.open(root)
        assert not list((root / "tmp").iterdir()), "something is left after a dead import"
        for digest in store.digests():
            told["published"] += digest not in damaged
            assert digest in damaged or is_whole(store, digest), "half of an artifact counts"
        used = {file.digest for digest in store.digests() for file in files_of(store, digest)}
        blobs = {f"sha256:{path.name}" for path in (root / "blobs").rglob("*") if path.is_file()}
        assert blobs <= used, "a blob belongs to nobody"
        if ended or told["killed"] % 4 == 0:
            assert store.is_whole(import_source(store, source)), "the next import does not put it right"
            told["imported_again"] += 1
        if ended:
            break
    told["whole_at_the_end"] = sum(is_whole(store, digest) for digest in store.digests())
    print(json.dumps(told))


def copy(source: Path, target: Path) -> None:
    """A copy in which hard links are links again."""
    links: dict[int, Path] = {}
    for path in sorted(source.rglob("*")):
        copied = target / path.relative_to(source)
        if path.is_dir():
            copied.mkdir(parents=True)
        elif path.stat().st_ino in links:
            os.link(links[path.stat().st_ino], copied)
        else:
            shutil.copy2(path, copied)
            links[path.stat().st_ino] = copied


def is_whole(store: Any, digest: str) -> bool:
    return bool(store.is_whole(store.get(digest)))


def files_of(store: Any, digest: str) -> list[Any]:
    manifest = store.get(digest).manifest
    return [*manifest.files, *manifest.source_files]


if __name__ == "__main__":
    main()

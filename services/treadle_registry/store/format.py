"""Which release's layout a store has: `<store>/format.json`, written aside and renamed.

An older layout is migrated in place, a step a version, and each step can be killed anywhere and done again; a
newer one is refused before anything is touched. The database has a version of its own, see
`catalog.database`, and manifests theirs, see `manifest`: they are read in every version up to now, and never
rewritten.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from treadle.durable_names import fsync_folder
from treadle.errors import DataLoss, FailedPrecondition

logger = logging.getLogger(__name__)

FILE = "format.json"


def _make_uploads(root: Path) -> None:
    """Version 2 has a folder for what comes over the network."""
    (root / "uploads").mkdir(exist_ok=True)


_STEPS: tuple[Callable[[Path], None], ...] = (_make_uploads,)
"""The step at n leads from version n + 1 to n + 2."""
VERSION = len(_STEPS) + 1


def read_version(root: Path) -> int:
    """The layout's version; 0 for a folder that is no store yet, 1 where there were no versions yet.

    Raises DataLoss (CORRUPT_FORMAT), and OSError.
    """
    path = root / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return int((root / "registry.db").exists() or (root / "artifacts").exists())
    try:
        version = json.loads(text)["version"]
        if type(version) is not int or version < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise DataLoss(
            f"{path} cannot be read; a store of this release has {_text(VERSION).strip()} there",
            reason="CORRUPT_FORMAT",
        ) from None
    return version


def migrate(root: Path) -> None:
    """Makes the layout this release's; the caller holds the store's lock.

    Raises FailedPrecondition (NEWER_STORE) for one of a newer release, and OSError.
    """
    found = read_version(root)
    if found > VERSION:
        raise FailedPrecondition(
            f"the store {root} has version {found}, this release knows {VERSION}; use the newer release, or "
            "give another store in TREADLE_STORE",
            reason="NEWER_STORE",
            metadata={"version": str(found), "known_version": str(VERSION)},
        )
    if found == VERSION:
        return
    for step in _STEPS[max(found - 1, 0) :]:
        step(root)
    _write(root)
    if found:
        logger.warning("the store was migrated", extra={"store": str(root), "from": found, "to": VERSION})


def _write(root: Path) -> None:
    aside = root / f"{FILE}.new"
    with aside.open("w", encoding="utf-8") as file:
        file.write(_text(VERSION))
        file.flush()
        os.fsync(file.fileno())
    aside.rename(root / FILE)
    fsync_folder(root)


def _text(version: int) -> str:
    return json.dumps({"version": version}) + "\n"

"""Migrates an old store again and again, killed somewhere else each time: `killed_migration.py STORE MODE`.

MODE "calls": at every call of the registry's own that changes the disk. "backup", "script": where the
database's files, while they are backed up or migrated, would grow beyond so many bytes. Prints how many there
were, as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fatal_call import FatalCall, dies
from old_store import FIRST, HISTORY, REQUESTS, SECOND

from treadle_registry.catalog import database
from treadle_registry.catalog.catalog import Catalog
from treadle_registry.store.format import VERSION, read_version
from treadle_registry.store.store import Store

PROBE = "CREATE TABLE probe (value TEXT) STRICT; INSERT INTO probe VALUES ('migrated');"
STEP = 1024


def start(root: Path) -> None:
    Store.open(root)
    Catalog(root).close()


def limit(room: int) -> None:
    """From here on this process is killed when it makes a file larger than that."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def killed_in_calls(root: Path, number: int) -> None:
    FatalCall(number).install()
    start(root)


def killed_in_backup(root: Path, number: int) -> None:
    Store.open(root)
    limit(number * STEP)
    Catalog(root).close()


def killed_in_script(root: Path, number: int) -> None:
    real = database.Database._back_up

    def back_up(self: database.Database, version: int) -> None:
        real(self, version)
        limit(number * STEP)

    database.Database._back_up = back_up
    start(root)


MODES: dict[str, Callable[[Path, int], None]] = {
    "calls": killed_in_calls,
    "backup": killed_in_backup,
    "script": killed_in_script,
}


def check_backup(root: Path) -> bool:
    """It is whole wherever it is there."""
    path = root / "registry.db.v1.bak"
    if not path.exists():
        return False
    copy = sqlite3.connect(path)
    assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert copy.execute("PRAGMA user_version").fetchone() == (1,)
    assert copy.execute("SELECT count(*) FROM operations").fetchone() == (len(REQUESTS),)
    copy.close()
    return True


def check_migrated(root: Path) -> None:
    """The next start succeeds, and all is there."""
    store = Store.open(root)
    assert read_version(root) == VERSION
    assert store.digests() == sorted((FIRST, SECOND))
    assert all(store.is_whole(store.get(digest)) for digest in store.digests())
    catalog = Catalog(root)
    assert catalog.database.one("SELECT value FROM probe") == ("migrated",)
    for name, digests in HISTORY.items():
        assert [alias.digest for _, alias in catalog.aliases.history(name, 1 << 62, 10)] == digests
    assert len(catalog.operations.page(1 << 62, 10)) == len(REQUESTS)
    catalog.close()
    assert check_backup(root)


def main() -> None:
    template, mode = Path(sys.argv[1]), sys.argv[2]
    database._MIGRATIONS += (PROBE,)
    # Processes die here, and not the machine: what the kernel was given is kept.
    os.fsync = lambda descriptor: None
    root = template.with_name("attempt")
    told = {"killed": 0, "old": 0, "new": 0, "backed_up": 0}
    number = 0
    while True:
        number += 1
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)
        killed = dies(partial(MODES[mode], root, number), signal.SIGKILL, signal.SIGXFSZ)
        assert read_version(root) in (1, VERSION)
        raw = sqlite3.connect(root / "registry.db")
        version = raw.execute("PRAGMA user_version").fetchone()[0]
        assert version in (1, len(database._MIGRATIONS)), version
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        raw.close()
        told["killed"] += killed
        told["old" if version == 1 else "new"] += 1
        told["backed_up"] += check_backup(root)
        check_migrated(root)
        if not killed:
            break
    print(json.dumps(told))


if __name__ == "__main__":
    main()

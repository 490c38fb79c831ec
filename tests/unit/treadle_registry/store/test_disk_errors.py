"""What a disk refuses is said in plain words."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from treadle.errors import TreadleError
from treadle_registry.store.staging import disk_errors

CASES = {
    errno.ENOSPC: ("RESOURCE_EXHAUSTED", "DISK_FULL"),
    errno.EDQUOT: ("RESOURCE_EXHAUSTED", "DISK_FULL"),
    errno.EROFS: ("FAILED_PRECONDITION", "STORE_READ_ONLY"),
    errno.EACCES: ("FAILED_PRECONDITION", "STORE_NOT_WRITABLE"),
    errno.EPERM: ("FAILED_PRECONDITION", "STORE_NOT_WRITABLE"),
}


@pytest.mark.parametrize("number", CASES)
def test_an_errno(number: int):
    with pytest.raises(TreadleError) as caught, disk_errors("the alias"):
        raise OSError(number, os.strerror(number))
    print(caught.value.message)
    assert (caught.value.code, caught.value.reason) == CASES[number]
    assert "the alias" in caught.value.message


def test_other_errors_are_left_alone():
    with pytest.raises(OSError, match="no such thing"), disk_errors("the alias"):
        raise OSError(errno.ENOENT, "no such thing")


def test_a_database_that_turns_read_only(tmp_path: Path):
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE a (b)")
    database.close()
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    with pytest.raises(TreadleError) as caught, disk_errors("the registry's database"):
        database.execute("INSERT INTO a VALUES (1)")
    database.close()
    assert caught.value.reason == "STORE_READ_ONLY"

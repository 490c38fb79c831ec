"""The catalog: one writer, aliases with a history, operations, migration."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from treadle.errors import Aborted, FailedPrecondition, NotFound
from treadle_registry.catalog.catalog import Catalog
from treadle_registry.catalog.database import _MIGRATIONS
from treadle_registry.catalog.operations import StoredOperation
from treadle_registry.pages import LAST
from treadle_registry.rollout.deploying import Deploying
from treadle_registry.rollout.rollouts import Rollouts

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def deploying(catalog: Catalog) -> Deploying:
    """What moves aliases."""
    return Deploying(Rollouts(catalog, publish=lambda changes: None))


def test_one_registry_a_store(tmp_path: Path):
    first = Catalog(tmp_path)
    with pytest.raises(FailedPrecondition) as caught:
        Catalog(tmp_path)
    assert caught.value.reason == "STORE_IN_USE"
    first.close()
    Catalog(tmp_path).close()


def test_what_was_written_is_there_after_a_restart(tmp_path: Path):
    catalog = Catalog(tmp_path)
    catalog.artifacts.index({A: 1.0, B: 2.0})
    alias = deploying(catalog).set_alias("m", A)
    catalog.operations.add(StoredOperation("operations/1", "r", "{}", 1.5, None))
    catalog.close()
    catalog = Catalog(tmp_path)
    assert catalog.aliases.get("m") == alias
    assert catalog.operations.get("operations/1").create_time == 1.5
    assert catalog.operations.finish_unfinished("done") == 1
    assert catalog.operations.finish_unfinished("again") == 0
    assert catalog.operations.of_request("r") == StoredOperation("operations/1", "r", "{}", 1.5, "done")
    assert catalog.artifacts.page("", 10) == [A, B]
    catalog.close()


def test_a_newer_database_is_left_alone(tmp_path: Path):
    Catalog(tmp_path).close()
    with sqlite3.connect(tmp_path / "registry.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(FailedPrecondition) as caught:
        Catalog(tmp_path)
    assert caught.value.reason == "NEWER_DATABASE"


def test_the_first_release_s_database_goes_on(tmp_path: Path):
    with sqlite3.connect(tmp_path / "registry.db") as database:
        database.executescript(f"{_MIGRATIONS[0]} PRAGMA user_version = 1;")
        database.execute("INSERT INTO artifacts VALUES (?)", (A,))
        database.execute("INSERT INTO aliases VALUES ('prod', ?, 'etag', 1.5)", (A,))
    database.close()
    catalog = Catalog(tmp_path)
    catalog.artifacts.index({A: 7.0, B: 8.0})
    assert catalog.artifacts.last_uses() == {A: 7.0, B: 8.0}
    assert catalog.aliases.get("prod").digest == A
    assert (catalog.deployments.all(), catalog.leases.all(0.0)) == ([], [])
    assert deploying(catalog).set_alias("prod", B, "etag").digest == B
    catalog.close()


def test_uses_are_kept_and_never_go_back(tmp_path: Path):
    catalog = Catalog(tmp_path)
    catalog.artifacts.index({A: 1.0, B: 2.0})
    catalog.artifacts.used({A: 5.0, B: 1.0, "gone": 9.0})
    catalog.artifacts.add(A, 3.0)
    assert list(catalog.artifacts.last_uses().items()) == [(B, 2.0), (A, 5.0)]
    catalog.artifacts.index({A: 1.0})
    assert catalog.artifacts.last_uses() == {A: 5.0}
    catalog.close()


def test_every_move_has_its_own_etag_and_a_lost_swap_changes_nothing(tmp_path: Path):
    catalog = Catalog(tmp_path)
    catalog.artifacts.index({A: 1.0, B: 2.0})
    aliases = deploying(catalog)
    etags = [aliases.set_alias("m", digest).etag for digest in (A, B, A, B)]
    assert len(set(etags)) == 4
    for stale in (*etags[:3], "x"):
        with pytest.raises(Aborted):
            aliases.set_alias("m", A, stale)
        with pytest.raises(Aborted):
            aliases.delete_alias("m", stale)
    with pytest.raises(Aborted):
        aliases.set_alias("new", A, "x")
    with pytest.raises(NotFound):
        aliases.set_alias("m", "sha256:" + "0" * 64)
    assert catalog.aliases.get("m").etag == etags[3]
    assert aliases.set_alias("m", A, etags[3]).digest == A
    assert [entry.digest for _, entry in catalog.aliases.history("m", LAST, 10)] == [A, B, A, B, A]
    catalog.close()


def test_ended_operations_are_pruned_and_running_ones_kept(tmp_path: Path):
    catalog = Catalog(tmp_path)
    for number in range(10):
        catalog.operations.add(StoredOperation(f"operations/{number}", f"r{number}", "{}", 0.0, None))
        if number != 2:
            catalog.operations.finish(f"operations/{number}", "done")
    catalog.operations.prune(3)
    names = [operation.name for _, operation in catalog.operations.page(LAST, 100)]
    assert names == ["operations/9", "operations/8", "operations/7", "operations/2"]
    catalog.close()

"""Stores of other releases: an older one is migrated in place, a newer one is refused."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from google.longrunning import operations_proto_pb2
from old_store import FIRST, HISTORY, REQUESTS, SECOND, unpack_old_store
from registry_stubs import answer, open_registry, write_folder
from waiting import until

from treadle.api.registry.v1 import registry_pb2
from treadle.errors import FailedPrecondition, NotFound
from treadle.rpc import from_status
from treadle_registry.catalog import database
from treadle_registry.registry import Registry
from treadle_registry.store.format import VERSION
from treadle_registry.store.store import Store

PROBE = "CREATE TABLE probe (value TEXT) STRICT;"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the first release, and a database that has at least one step before it."""
    monkeypatch.setattr(database, "_MIGRATIONS", (*database._MIGRATIONS, PROBE))
    return unpack_old_store(tmp_path)


def backups(store: Path) -> list[str]:
    return [path.name for path in store.glob("*.bak*")]


async def test_all_of_an_old_store_is_there_afterwards(store: Path, tmp_path: Path):
    async with open_registry(store) as client:
        listed = (await client.call("ListArtifacts")).artifacts
        assert [artifact.digest for artifact in listed] == sorted((FIRST, SECOND))
        assert {artifact.source for artifact in listed} == {"/srv/models/first", "/srv/models/second"}
        aliases = {alias.name: alias.artifact_digest for alias in (await client.call("ListAliases")).aliases}
        assert aliases == {"prod": FIRST, "canary": FIRST}
        for name, digests in HISTORY.items():
            entries = (await client.call("GetAliasHistory", name=name)).entries
            assert [entry.artifact_digest for entry in entries] == digests
        with pytest.raises(NotFound):
            await client.call("ResolveModel", model="gone")
        operations = (
            await answer(client.operations.ListOperations(operations_proto_pb2.ListOperationsRequest()))
        ).operations
        assert len(operations) == len(REQUESTS)
        assert [from_status(one.error).reason if one.HasField("error") else "" for one in operations] == [
            "INTERRUPTED",
            "SOURCE_NOT_FOUND",
            "",
            "",
        ]
        imported = registry_pb2.ImportModelResponse()
        assert operations[3].response.Unpack(imported)
        assert (imported.artifact.digest, imported.alias) == (FIRST, "prod")
        again = await client.import_model(request_id="import-first", folder="/srv/models/first", alias="prod")
        assert again == operations[3], "what was asked once is not done twice"
        verified = await client.response(
            await client.call("VerifyArtifact"), registry_pb2.VerifyArtifactResponse()
        )
        assert (verified.verified_artifacts, list(verified.damaged_files)) == (2, [])
        # It goes on as a store of this release.
        new = await client.imported(folder=str(write_folder(tmp_path / "new", 2)), alias="prod")
        assert not new.already_present
    assert json.loads((store / "format.json").read_text()) == {"version": VERSION}
    backup = sqlite3.connect(store / "registry.db.v1.bak")
    tables = ("aliases", "operations")
    kept = [backup.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]
    assert backup.execute("PRAGMA user_version").fetchone() == (1,)
    backup.close()
    print(f"2 artifacts, 2 aliases, {sum(map(len, HISTORY.values()))} moves, {len(REQUESTS)} operations")
    print(f"the backup has {kept[0]} aliases and {kept[1]} operations")
    assert kept == [2, 4]


async def test_a_migrated_store_is_migrated_once(store: Path):
    for _ in range(2):
        async with open_registry(store):
            pass
        backup = store / "registry.db.v1.bak"
        first = backup.stat().st_mtime_ns
    assert backup.stat().st_mtime_ns == first
    assert backups(store) == [backup.name]


@pytest.mark.parametrize(("mode", "least"), [("calls", 20), ("backup", 5), ("script", 2)])
def test_killed_anywhere_it_is_old_or_new(tmp_path: Path, mode: str, least: int):
    store = unpack_old_store(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("killed_migration.py")), str(store), mode]
    harness = str(Path(__file__).parents[2] / "harness")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([harness, *filter(None, sys.path)])}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=variables)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    print(f"{mode}: {told}")
    assert told["killed"] >= least
    assert told["old"] >= 1
    assert told["new"] >= 1
    assert told["backed_up"] >= told["new"]


def everything(store: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in store.rglob("*") if path.is_file() and path.suffix != ".lock"
    }


async def refusal(store: Path) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        await Registry.open(store)
    return caught.value


async def test_a_newer_store_is_refused(tmp_path: Path):
    async with open_registry(tmp_path / "store") as client:
        await client.imported(folder=str(write_folder(tmp_path / "m")))
    store = tmp_path / "store"
    (store / "format.json").write_text(json.dumps({"version": VERSION + 1, "layout": "of tomorrow"}))
    before = everything(store)
    error = await refusal(store)
    print(error.message)
    assert error.reason == "NEWER_STORE"
    assert "use the newer release" in error.message
    assert everything(store) == before


async def test_a_newer_database_is_refused(tmp_path: Path):
    async with open_registry(tmp_path / "store"):
        pass
    store = tmp_path / "store"
    with sqlite3.connect(store / "registry.db") as raw:
        raw.execute("PRAGMA user_version = 99")
    raw.close()
    error = await refusal(store)
    print(error.message)
    assert error.reason == "NEWER_DATABASE"
    assert not backups(store)


async def test_a_newer_manifest_takes_no_other_model_along(tmp_path: Path):
    store = tmp_path / "store"
    async with open_registry(store) as client:
        digests = [
            (await client.imported(folder=str(write_folder(tmp_path / str(seed), seed)))).artifact.digest
            for seed in range(2)
        ]
        path = Store(store).folder(digests[0]) / "manifest.json"
        newer = json.dumps(json.loads(path.read_text()) | {"version": 99, "colour": "green"})
        path.write_text(newer)

        async def is_refused() -> bool:
            try:
                await client.call("ResolveModel", model=digests[0])
            except FailedPrecondition as error:
                return error.reason == "NEWER_MANIFEST"
            return False

        # What was read a moment ago is not read again.
        await until(is_refused, "the newer manifest is seen")
        with pytest.raises(FailedPrecondition) as caught:
            await client.imported(folder=str(tmp_path / "0"))
        assert caught.value.reason == "NEWER_MANIFEST"
        assert path.read_text() == newer, "it is not replaced by an older one"
    async with open_registry(store) as client:
        assert [one.digest for one in (await client.call("ListArtifacts")).artifacts] == [digests[1]]
        assert (await client.imported(folder=str(tmp_path / "1"))).already_present


async def test_a_format_that_cannot_be_read_is_told(tmp_path: Path):
    store = Store.open(tmp_path / "store").root
    for text in ("", "{}", '{"version": "2"}', '{"version": 0}', "[]"):
        (store / "format.json").write_text(text)
        with pytest.raises(Exception, match=r"format\.json cannot be read") as caught:
            Store.open(store)
        assert caught.value.reason == "CORRUPT_FORMAT"

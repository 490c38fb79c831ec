"""Derivations of what is damaged, goes meanwhile or finds no room: told, and nothing is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from damage import flip
from small_folder import write_model

from treadle.errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
)
from treadle_registry.operations.deriving import derive
from treadle_registry.operations.importing import import_source
from treadle_registry.operations.progress import Progress
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.derivation import Derivation
from treadle_registry.store.store import Published, Store

QUANTISED = [Derivation("quantization", form) for form in ("int8", "int4", "mxfp4")]
FLOATS = [Derivation("dtype", dtype) for dtype in ("float32", "float16")]


def test_a_damaged_parent_is_told(store: Store, parent: Published, merge: Derivation):
    told = 0
    for derivation in (QUANTISED[1], FLOATS[0], merge):
        kind = "source" if derivation.kind == "dtype" else "canonical"
        for name in ("model.safetensors", "tokenizer.json"):
            path = parent.canonical_folder.parent / kind / name
            content = path.read_bytes()
            flip(path)
            with pytest.raises(DataLoss) as caught:
                derive(store, parent.manifest.digest, derivation)
            assert caught.value.reason == "DAMAGED_FILE"
            assert name in caught.value.message
            flip(path)
            assert path.read_bytes() == content
            told += 1
    (parent.canonical_folder / "generation_config.json").unlink()
    with pytest.raises(DataLoss, match=r"generation_config\.json"):
        derive(store, parent.manifest.digest, QUANTISED[0])
    print(f"{told + 1} damaged files told")
    assert store.digests() == [parent.manifest.digest]


def test_a_parent_that_is_deleted_meanwhile(store: Store, tmp_path: Path):
    """At every progress that is told."""
    ends: list[str] = []
    folder = write_model(tmp_path / "model")
    for moment in range(200):
        parent = import_source(store, LocalSource("folder", str(folder)))
        told = 0

        def report(progress: Progress, digest: str = parent.manifest.digest, at: int = moment) -> None:
            nonlocal told
            if told == at:
                store.delete(digest)
            told += 1

        try:
            derived = derive(store, parent.manifest.digest, QUANTISED[0], report)
        except (Aborted, NotFound) as error:
            ends.append(error.reason)
            assert store.digests() == []
        else:
            assert store.is_whole(derived)
            if moment >= told:
                break
            ends.append("whole")
            assert store.digests() == [derived.manifest.digest]
            store.delete(derived.manifest.digest)
        assert list((store.root / "tmp").iterdir()) == []
    print(ends)
    assert ends[0] == "MODEL_NOT_FOUND"
    assert "DELETED" in ends


def test_an_artifact_of_a_newer_release_is_in_nobodys_way(store: Store, parent: Published, tmp_path: Path):
    other = import_source(store, LocalSource("folder", str(write_model(tmp_path / "other", seed=7))))
    path = other.canonical_folder.parent / "manifest.json"
    raw = json.loads(path.read_text())
    versions = [key for key in raw if "version" in key or "format" in key]
    assert versions
    path.unlink()
    path.write_text(json.dumps(raw | dict.fromkeys(versions, 999)))
    with pytest.raises(FailedPrecondition) as refused:
        store.get(other.manifest.digest)
    assert refused.value.reason == "NEWER_MANIFEST"
    assert store.is_whole(derive(store, parent.manifest.digest, QUANTISED[0]))


def test_a_full_disk_is_told_and_leaves_nothing(
    store: Store, parent: Published, merge: Derivation, monkeypatch: pytest.MonkeyPatch
):
    real, left, failed = os.fsync, 0, 0

    def full(descriptor: int) -> None:
        nonlocal left, failed
        left -= 1
        if left < 0:
            failed += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    for derivation in (QUANTISED[1], merge):
        monkeypatch.setattr(os, "fsync", full)
        for writes in range(0, 12, 2):
            left = writes
            with pytest.raises(ResourceExhausted) as caught:
                derive(store, parent.manifest.digest, derivation)
            assert caught.value.reason == "DISK_FULL"
            assert list((store.root / "tmp").iterdir()) == []
        monkeypatch.undo()
        assert not derive(store, parent.manifest.digest, derivation).already_present
    usage = shutil.disk_usage(store.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    with pytest.raises(ResourceExhausted, match="5000 free"):
        derive(store, parent.manifest.digest, FLOATS[0])
    assert failed == 12

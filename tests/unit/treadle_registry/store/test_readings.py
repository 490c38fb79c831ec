"""Manifests are read once while they stay as they are, and not longer."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_folder import write_model

from treadle.errors import DataLoss, NotFound
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.readings import Readings
from treadle_registry.store.store import MANIFEST, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.open(tmp_path / "store")
    for number in range(3):
        folder = write_model(tmp_path / f"m{number}", seed=number)
        import_source(store, LocalSource("folder", str(folder)))
    return store


def test_a_reading_is_trusted_for_a_while_and_then_looked_at(store: Store):
    now = 0.0
    readings = Readings(store, capacity=10, trusted_s=1.0, clock=lambda: now)
    digest = store.digests()[0]
    assert readings.recent(digest) is None
    published = readings.read(digest)
    assert published == store.get(digest)
    assert readings.recent(digest) is published
    now = 1.5
    assert readings.recent(digest) is None
    assert readings.read(digest) is published
    assert readings.recent(digest) is published
    assert readings.num_read == 1
    readings.forget(digest)
    assert readings.recent(digest) is None


def test_what_has_changed_is_read_again(store: Store):
    readings = Readings(store, capacity=10)
    digest, other = store.digests()[:2]
    readings.read(digest)
    manifest = store.folder(digest) / MANIFEST
    whole = manifest.read_text()
    manifest.write_text(whole[:-30])
    with pytest.raises(DataLoss):
        readings.read(digest)
    assert readings.recent(digest) is None
    manifest.write_text(whole)
    assert readings.read(digest).manifest.digest == digest
    readings.read(other)
    store.delete(other)
    with pytest.raises(NotFound):
        readings.read(other)
    assert readings.recent(other) is None


def test_the_memory_is_bounded(store: Store):
    readings = Readings(store, capacity=2)
    for digest in store.digests() * 3:
        readings.read(digest)
    assert len(readings._read) == len(readings._looked) == 2
    assert readings.num_read == 9

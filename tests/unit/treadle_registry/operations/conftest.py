"""A store, a small model in it, and an adapter of that model."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft_folder import write_adapter
from small_folder import write_model

from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.derivation import Derivation
from treadle_registry.store.store import Published, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def parent(store: Store, tmp_path: Path) -> Published:
    folder = write_model(tmp_path / "model", template="{{ messages }}")
    return import_source(store, LocalSource("folder", str(folder)))


@pytest.fixture
def merge(tmp_path: Path) -> Derivation:
    return Derivation("adapter_merge", "", str(write_adapter(tmp_path / "adapter")))

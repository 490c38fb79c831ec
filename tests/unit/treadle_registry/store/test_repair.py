"""What is damaged in the store is put right by importing the same content again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import flip

from treadle.errors import DataLoss
from treadle.models.stored_folder import StoredFolder, file_digest
from treadle_registry.operations.importing import import_source
from treadle_registry.operations.progress import unheard
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Published, Store
from treadle_registry.store.verification import verify_artifacts


@pytest.fixture
def sources(
    tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: Callable[..., Path]
) -> list[LocalSource]:
    """Two files with equal weights and another template each, and one that shares nothing big with them."""
    model = tiny_model(layers=1)
    made = []
    for name, template in (("a", "{{ 1 }}"), ("b", "{{ 2 }}")):
        model.extra = {"tokenizer.chat_template": template}
        made.append(write_gguf(tmp_path / f"{name}.gguf", model, vocabulary))
    made.append(write_gguf(tmp_path / "c.gguf", tiny_model(layers=1), vocabulary))
    return [LocalSource("gguf_file", str(path)) for path in made]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def verify(published: Published) -> None:
    """As a worker does."""
    manifest = published.manifest
    StoredFolder(published.canonical_folder, manifest.digest, manifest.files).verify()


def whole(store: Store) -> list[bool]:
    return [store.is_whole(store.get(digest)) for digest in store.digests()]


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights flipped": lambda folder: flip(folder / "canonical" / "model.safetensors"),
    "config flipped": lambda folder: flip(folder / "canonical" / "config.json"),
    "source flipped": lambda folder: flip(folder / "source" / "a.gguf"),
    "file gone": lambda folder: (folder / "canonical" / "tokenizer.json").unlink(),
    "file empty": lambda folder: _replace(folder / "canonical" / "tokenizer.json", b""),
    "stranger": lambda folder: _replace(folder / "canonical" / "model.safetensors.index.json", b"{}"),
    "manifest cut": lambda folder: _replace(folder / "manifest.json", b'{"version": 1'),
    "manifest of nothing": lambda folder: _replace(folder / "manifest.json", b""),
}


def _replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("case", DAMAGE)
def test_importing_again_puts_it_right(store: Store, sources: list[LocalSource], case: str):
    first, other = (import_source(store, source) for source in (sources[0], sources[2]))
    DAMAGE[case](first.canonical_folder.parent)
    _, damaged = verify_artifacts(store, store.digests(), unheard)
    assert first.manifest.digest in {file.artifact_digest for file in damaged}
    again = import_source(store, sources[0])
    assert not again.already_present
    assert verify_artifacts(store, store.digests(), unheard)[1] == []
    assert again.manifest.digests == first.manifest.digests
    verify(again)
    assert whole(store) == [True] * 2
    assert import_source(store, sources[0]).already_present
    assert import_source(store, sources[2]).manifest == other.manifest
    store.sweep()
    blobs = [path for path in (store.root / "blobs").rglob("*") if path.is_file()]
    assert all(f"sha256:{path.name}" == file_digest(path) for path in blobs)


@pytest.mark.parametrize("case", DAMAGE)
def test_another_model_can_be_imported_meanwhile(store: Store, sources: list[LocalSource], case: str):
    first = import_source(store, sources[0])
    DAMAGE[case](first.canonical_folder.parent)
    for source in sources[1:]:
        verify(import_source(store, source))


def test_a_blob_is_put_right_wherever_it_is_used(store: Store, sources: list[LocalSource]):
    a, b = (import_source(store, source) for source in sources[:2])
    weights = a.canonical_folder / "model.safetensors"
    assert weights.samefile(b.canonical_folder / "model.safetensors")
    flip(weights)
    for published in (a, b):
        with pytest.raises(DataLoss, match=r"model\.safetensors"):
            verify(published)
    assert not import_source(store, sources[1]).already_present
    for published in (a, b):
        verify(published)
    assert weights.samefile(b.canonical_folder / "model.safetensors")
    assert import_source(store, sources[0]).already_present


def test_a_new_artifact_does_not_link_to_a_damaged_blob(store: Store, sources: list[LocalSource]):
    a = import_source(store, sources[0])
    flip(a.canonical_folder / "model.safetensors")
    verify(import_source(store, sources[1]))
    verify(a)


def test_the_same_model_from_another_source_puts_it_right(
    tmp_path: Path, store: Store, sources: list[LocalSource]
):
    first = import_source(store, sources[0])
    copied = tmp_path / "folder"
    copied.mkdir()
    for file in first.manifest.files:
        (copied / file.path).write_bytes((first.canonical_folder / file.path).read_bytes())
    flip(first.canonical_folder / "config.json")
    again = import_source(store, LocalSource("folder", str(copied)))
    assert again.manifest.digest == first.manifest.digest
    assert not again.already_present
    assert again.manifest.source == str(copied)
    assert whole(store) == [True]

"""The store: nothing half done ever counts, whatever kills whom."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treadle.errors import DataLoss, FailedPrecondition, NotFound, ResourceExhausted, TreadleError
from treadle_registry.names import check_alias, check_digest, file_inside, source_path
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Store


def test_a_living_import_is_not_swept(tmp_path: Path):
    store = Store.open(tmp_path / "store")
    with store.staging() as staging:
        staging.write("source/file.txt", b"text")
        Store.open(tmp_path / "store")
        assert staging.path("source/file.txt").read_bytes() == b"text"
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


@pytest.fixture
def gguf_source(
    tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: Callable[..., Path]
) -> LocalSource:
    """A small file to import."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(layers=1), vocabulary)
    return LocalSource("gguf_file", str(path))


def test_the_same_source_is_the_same_artifact_in_every_store(tmp_path: Path, gguf_source: LocalSource):
    first = import_source(Store.open(tmp_path / "a"), gguf_source)
    again = import_source(Store.open(tmp_path / "a"), gguf_source)
    other = import_source(Store.open(tmp_path / "b"), gguf_source)
    assert [first.already_present, again.already_present, other.already_present] == [False, True, False]
    assert first.manifest.digests == again.manifest.digests == other.manifest.digests
    assert first.manifest.files == other.manifest.files
    renamed = Path(gguf_source.value).rename(tmp_path / "another name.gguf")
    moved = import_source(Store.open(tmp_path / "a"), LocalSource("gguf_file", str(renamed)))
    assert moved.already_present
    assert moved.manifest == first.manifest


def test_files_are_read_only_links_to_blobs(tmp_path: Path, gguf_source: LocalSource):
    store = Store.open(tmp_path / "store")
    published = import_source(store, gguf_source)
    files = [(published.canonical_folder, file) for file in published.manifest.files]
    files += [
        (published.canonical_folder.parent / "source", file) for file in published.manifest.source_files
    ]
    assert len(files) == 7
    for folder, file in files:
        path = folder / file.path
        assert path.samefile(store.blob_path(file.digest))
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o222 == 0
    assert store.delete(published.manifest.digest) == published.manifest.total_bytes
    assert store.digests() == []


def test_two_artifacts_share_blobs(
    tmp_path: Path,
    gguf_source: LocalSource,
    vocabulary: Any,
    tiny_model: Any,
    write_gguf: Callable[..., Path],
):
    store = Store.open(tmp_path / "store")
    model = tiny_model(layers=1)
    first = import_source(
        store, LocalSource("gguf_file", str(write_gguf(tmp_path / "a.gguf", model, vocabulary)))
    ).manifest
    model.extra = {"tokenizer.chat_template": "another"}
    second = import_source(
        store, LocalSource("gguf_file", str(write_gguf(tmp_path / "b.gguf", model, vocabulary)))
    ).manifest
    assert first.digests is not None
    assert second.digests is not None
    assert first.digests.compute == second.digests.compute
    assert first.digest != second.digest
    shared = {file.digest for file in first.files} & {file.digest for file in second.files}
    assert len(shared) == 5
    freed = store.delete(first.digest)
    assert 0 < freed < first.total_bytes
    kept = store.get(second.digest)
    assert all((kept.canonical_folder / file.path).is_file() for file in second.files)


def test_damage_is_told(tmp_path: Path, gguf_source: LocalSource):
    store = Store.open(tmp_path / "store")
    published = import_source(store, gguf_source)
    manifest = published.canonical_folder.parent / "manifest.json"
    text = manifest.read_text()
    for broken in ("", "{}", "[]", text[:-30], text.replace('"version": ', '"version": -')):
        manifest.write_text(broken)
        with pytest.raises(DataLoss):
            store.get(published.manifest.digest)
    manifest.unlink()
    with pytest.raises(NotFound):
        store.get(published.manifest.digest)


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, gguf_source: LocalSource, monkeypatch: pytest.MonkeyPatch
):
    store = Store.open(tmp_path / "store")
    real, left, failed = os.fsync, 0, 0

    def full(descriptor: int) -> None:
        nonlocal left, failed
        left -= 1
        if left < 0:
            failed += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for writes in range(0, 16, 3):
        left = writes
        with pytest.raises(ResourceExhausted) as caught:
            import_source(store, gguf_source)
        assert caught.value.reason == "DISK_FULL"
        assert store.digests() == []
        assert list((store.root / "tmp").iterdir()) == []
    assert failed == 6
    monkeypatch.undo()
    assert not import_source(store, gguf_source).already_present


def test_a_store_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FailedPrecondition) as caught:
        Store.open(tmp_path / "file" / "store")
    assert caught.value.reason == "STORE_NOT_WRITABLE"


HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "a b",
    "․․/x",
    "ａ",
    "-x",
    "x" * 200,
    ".hidden",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(tmp_path: Path, name: str):
    for check in (
        lambda: check_alias(name, "name"),
        lambda: check_digest(name, "digest"),
        lambda: file_inside(tmp_path, name),
        lambda: Store(tmp_path).folder(name),
        lambda: Store(tmp_path).blob_path(f"sha256:{name}"),
        lambda: Store(tmp_path).get("sha256:" + name.ljust(64, "0")[:63] + "\n"),
    ):
        with pytest.raises(TreadleError) as caught:
            check()
        assert caught.value.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("path", ["", "relative", "/a/../b", "/a\0b", "/" + "x" * 5000, "/absent/file"])
def test_hostile_paths(path: str):
    with pytest.raises(TreadleError) as caught:
        source_path(path, "folder")
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.fields[0].field == "folder"

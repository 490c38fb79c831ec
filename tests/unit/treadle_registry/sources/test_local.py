"""Sources that are found, and cannot be read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_folder import write_model
from unprivileged import unprivileged

from treadle.errors import PermissionDenied
from treadle_registry.sources.local import open_source
from treadle_registry.sources.source import LocalSource


@pytest.fixture
def folder() -> Iterator[Path]:
    """A model below a folder that everybody may enter; pytest's own are for one user."""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        model = write_model(Path(parent) / "model")
        for file in model.iterdir():
            file.chmod(0o644)
        yield model


def test_what_everybody_may_read_is_opened(folder: Path):
    with unprivileged():
        model = open_source(LocalSource("folder", str(folder)))
    assert len(model.files) == 3, model.files
    print(f"{len(model.files)} files")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_named(folder: Path, name: str):
    (folder / name).chmod(0)
    with unprivileged(), pytest.raises(PermissionDenied) as raised:
        open_source(LocalSource("folder", str(folder)))
    assert raised.value.reason == "SOURCE_NOT_READABLE"
    assert str(folder / name) in raised.value.message


def test_a_gguf_file_that_may_not_be_read_is_named(folder: Path):
    file = folder / "model.gguf"
    file.write_bytes(b"GGUF")
    file.chmod(0)
    with unprivileged(), pytest.raises(PermissionDenied) as raised:
        open_source(LocalSource("gguf_file", str(file)))
    assert raised.value.reason == "SOURCE_NOT_READABLE"
    assert str(file) in raised.value.message

"""Chat templates that have files in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_folder import write_model

from treadle.errors import InvalidArgument
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Published, Store

FOLDER = "additional_chat_templates"


def imported(store: Path, folder: Path) -> Published:
    return import_source(Store.open(store), LocalSource("folder", str(folder)))


def test_they_come_along(tmp_path: Path):
    folder = write_model(tmp_path / "model", template="{{ one }}")
    without = imported(tmp_path / "store", folder)
    (folder / FOLDER).mkdir()
    for name in ("tool_use", "rag"):
        (folder / FOLDER / f"{name}.jinja").write_text(f"{{{{ {name} }}}}")
    published = imported(tmp_path / "store", folder)
    kept = {path.name: path.read_text() for path in (published.canonical_folder / FOLDER).iterdir()}
    assert kept == {"tool_use.jinja": "{{ tool_use }}", "rag.jinja": "{{ rag }}"}
    assert published.manifest.digests is not None
    assert without.manifest.digests is not None
    assert published.manifest.digests.compute == without.manifest.digests.compute
    assert published.manifest.digests.presentation != without.manifest.digests.presentation
    # What is downloaded of a model is the same model again.
    again = imported(tmp_path / "other", published.canonical_folder)
    assert again.manifest.digests == published.manifest.digests


@pytest.mark.parametrize("what", ["the folder", "a file"])
def test_none_comes_from_elsewhere(tmp_path: Path, what: str):
    (outside := tmp_path / "outside").mkdir()
    (outside / "secret.jinja").write_text("secret")
    folder = write_model(tmp_path / "model")
    if what == "the folder":
        (folder / FOLDER).symlink_to(outside)
    else:
        (folder / FOLDER).mkdir()
        (folder / FOLDER / "secret.jinja").symlink_to(outside / "secret.jinja")
    with pytest.raises(InvalidArgument) as caught:
        imported(tmp_path / "store", folder)
    assert caught.value.reason == "PATH_OUTSIDE"
    assert not Store(tmp_path / "store").digests()

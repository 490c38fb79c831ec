"""A folder against the registry's list: whole, or the file that is not is named."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from treadle.errors import Cancelled, DataLoss
from treadle.models.stored_folder import StoredFile, StoredFolder, file_digest

NAMES = ("model.safetensors", "config.json", "additional/tool.jinja", "empty.json")


@pytest.fixture
def folder(tmp_path: Path) -> StoredFolder:
    """Four files, one of several megabytes."""
    sizes = (3_000_001, 200, 1, 0)
    for name, size in zip(NAMES, sizes, strict=True):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(random.Random(name).randbytes(size))
    files = tuple(
        StoredFile(name, file_digest(path := tmp_path / name), path.stat().st_size) for name in NAMES
    )
    return StoredFolder(tmp_path, "sha256:artifact", files)


def test_a_whole_folder(folder: StoredFolder):
    assert folder.verify() == 3_000_202
    assert folder.verify(("config.json", "not there either")) == 200
    assert folder.verify(()) == 0


def test_every_flipped_bit_is_found(folder: StoredFolder):
    rng = random.Random(0)
    found = 0
    for name, size in (("model.safetensors", 3_000_001), ("config.json", 200), ("additional/tool.jinja", 1)):
        path = folder.path / name
        whole = path.read_bytes()
        for place in {0, size - 1, *(rng.randrange(size) for _ in range(10))}:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            for names in (None, (name,)):
                with pytest.raises(DataLoss) as caught:
                    folder.verify(names)
                error = caught.value
                listed = next(file for file in folder.files if file.path == name)
                assert error.metadata == {
                    "artifact": "sha256:artifact",
                    "file": name,
                    "expected_digest": listed.digest,
                    "found_digest": file_digest(path),
                }
                for word in (name, listed.digest, file_digest(path), "import the model again"):
                    assert word in error.message
                found += 1
        path.write_bytes(whole)
    assert folder.verify() == 3_000_202
    print(f"{found} checks found a flipped bit")
    assert found > 40


@pytest.mark.parametrize("content", [b"", b"short", bytes(3_000_002)])
def test_another_length_is_told(folder: StoredFolder, content: bytes):
    (folder.path / "model.safetensors").write_bytes(content)
    with pytest.raises(DataLoss, match=f"{len(content)} bytes where 3000001 are due"):
        folder.verify()


def test_what_is_missing_and_what_is_strange(folder: StoredFolder):
    stranger = folder.path / "additional" / "model.safetensors.index.json"
    stranger.write_text("{}")
    with pytest.raises(DataLoss, match=r"model\.safetensors\.index\.json of sha256:artifact is none"):
        folder.verify()
    assert folder.verify(("config.json",)) == 200
    unlisted = replace(folder, files=folder.files[:1])
    with pytest.raises(DataLoss, match=r"config.json .* take it away"):
        unlisted.verify(("config.json",))
    stranger.unlink()
    (folder.path / "config.json").unlink()
    with pytest.raises(DataLoss, match=r"config.json .* is gone"):
        folder.verify()
    with pytest.raises(FileNotFoundError):
        replace(folder, path=folder.path / "elsewhere").verify()


def test_a_check_can_be_called_off(folder: StoredFolder):
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 1

    with pytest.raises(Cancelled):
        folder.verify(stopped=stopped)
    assert asked == 2


def test_the_state_tells_what_was_replaced(folder: StoredFolder):
    before = folder.state()
    assert folder.state() == before
    path = folder.path / "config.json"
    aside = folder.path / "aside"
    aside.write_bytes(path.read_bytes())
    aside.rename(path)
    assert folder.state() != before

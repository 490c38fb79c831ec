"""A file that arrives in pieces, from whichever process, and counts only once it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from treadle.errors import DataLoss, Unavailable
from treadle.transfer.partial_file import PartialFile


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def hashed(path: Path) -> PartialFile:
    arriving = PartialFile.open(path)
    while arriving.catch_up():
        pass
    return arriving


def test_pieces_from_many_processes_are_one_file(tmp_path: Path, rng: random.Random):
    content = rng.randbytes(3_000_000) + bytes(2 << 20) + rng.randbytes(rng.randrange(1 << 20))
    target, part, opened = tmp_path / "target", tmp_path / "part", 0
    at = 0
    while at < len(content):
        arriving = hashed(part)
        opened += 1
        assert arriving.size == at
        for _ in range(rng.randrange(1, 4)):
            piece = content[at : at + rng.randrange(1, 1 << 20)]
            arriving.append(piece)
            at += len(piece)
        arriving.close()
    arriving = hashed(part)
    arriving.finish(digest_of(content), target)
    arriving.close()
    print(f"{len(content)} bytes in {opened} openings, {target.stat().st_blocks * 512} on the disk")
    assert opened > 2
    assert target.read_bytes() == content
    assert not part.exists()
    assert target.stat().st_mode & 0o777 == 0o444


def test_zeros_take_no_room(tmp_path: Path):
    arriving = PartialFile.open(tmp_path / "part")
    for _ in range(64):
        arriving.append(bytes(1 << 20))
    arriving.finish(digest_of(bytes(64 << 20)), tmp_path / "target")
    arriving.close()
    stat = (tmp_path / "target").stat()
    print(f"{stat.st_size} bytes of zeros take {stat.st_blocks * 512} of the disk")
    assert stat.st_size == 64 << 20
    assert stat.st_blocks * 512 < 1 << 20


def test_content_of_another_hash_is_thrown_away(tmp_path: Path):
    arriving = PartialFile.open(tmp_path / "part")
    arriving.append(b"what came")
    with pytest.raises(DataLoss) as caught:
        arriving.finish(digest_of(b"what was meant"), tmp_path / "target")
    arriving.close()
    assert caught.value.reason == "CHECKSUM_MISMATCH"
    assert caught.value.metadata["found_digest"] == digest_of(b"what came")
    assert list(tmp_path.iterdir()) == []


def test_one_writes_at_a_time(tmp_path: Path):
    first = PartialFile.open(tmp_path / "part")
    with pytest.raises(Unavailable) as caught:
        PartialFile.open(tmp_path / "part")
    assert caught.value.reason == "TRANSFER_IN_PROGRESS"
    assert caught.value.retry_after_s
    first.append(b"12")
    first.close()
    second = hashed(tmp_path / "part")
    assert second.size == 2
    second.start_over()
    assert second.size == 0
    second.append(b"3")
    second.finish(digest_of(b"3"), tmp_path / "target")
    # Its name is free again, though it is still open.
    third = PartialFile.open(tmp_path / "part")
    assert third.size == 0
    second.close()
    third.close()


def test_killed_at_every_write(tmp_path: Path, rng: random.Random):
    harness = str(Path(__file__).parents[3] / "harness")
    result = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("killed_partial_file.py")),
            str(tmp_path),
            str(rng.random())[2:],
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([harness, *filter(None, sys.path)])},
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    print(told)
    assert told["killed"] >= 10
    assert told["resumed"] >= 5
    assert told["whole"] >= 1

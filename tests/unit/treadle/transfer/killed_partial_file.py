"""Brings a file that is killed at every call that changes the disk: `killed_partial_file.py FOLDER`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from functools import partial
from pathlib import Path

from fatal_call import FatalCall, dies

from treadle.transfer.partial_file import PartialFile

CHUNK = 64 << 10


def bring(content: bytes, folder: Path, fatal: int) -> None:
    """Appends what is missing and finishes, as a download does."""
    if fatal:
        FatalCall(fatal).install()
    target = folder / "target"
    if target.exists():
        return
    arriving = PartialFile.open(folder / "target.part")
    while arriving.catch_up():
        pass
    while arriving.size < len(content):
        arriving.append(content[arriving.size : arriving.size + CHUNK])
    arriving.finish(f"sha256:{hashlib.sha256(content).hexdigest()}", target)
    arriving.close()


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    # A hole in its middle, and an end that is no whole chunk.
    rng = random.Random(seed)
    content = rng.randbytes(3 * CHUNK) + bytes(2 * CHUNK) + rng.randbytes(CHUNK + rng.randrange(1, CHUNK))
    told = {"killed": 0, "resumed": 0, "whole": 0}
    fatal = 0
    while True:
        fatal += 1
        for path in folder.iterdir():
            path.unlink()
        killed = dies(partial(bring, content, folder, fatal))
        told["killed"] += killed
        target, part = folder / "target", folder / "target.part"
        told["whole"] += target.exists()
        assert not target.exists() or target.read_bytes() == content, "half a file counts"
        told["resumed"] += part.exists() and part.stat().st_size > 0
        bring(content, folder, 0)
        assert target.read_bytes() == content
        assert os.listdir(folder) == ["target"]  # noqa: PTH208
        if not killed:
            break
    print(json.dumps(told))


if __name__ == "__main__":
    main()

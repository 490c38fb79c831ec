"""What a bad disk does to a file."""

from __future__ import annotations

import os
from pathlib import Path


def flip(path: Path) -> None:
    """Changes one bit of a read-only file, and neither its size nor its times."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)
    path.chmod(0o444)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

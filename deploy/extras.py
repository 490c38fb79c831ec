"""Prints what the package and some of its extras need, one requirement a line.

    python deploy/extras.py pyproject.toml gateway otel

An image's libraries are installed from this list, in a layer that a change of the code leaves as it is.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_OWN = re.compile(r"treadle\[([a-z,]+)\]")


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """The requirements of the package and of `extras`, sorted; KeyError for an extra that there is not."""
    project = tomllib.loads(pyproject)["project"]
    found = set(project["dependencies"])
    waiting = list(extras)
    while waiting:
        for requirement in project["optional-dependencies"][waiting.pop()]:
            own = _OWN.fullmatch(requirement)
            if own:
                waiting += own[1].split(",")
            else:
                found.add(requirement)
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]).read_text(), sys.argv[2:])))

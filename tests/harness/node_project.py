"""The example client in Node: its packages installed once, its programs run as processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_PROGRAM_S = 120
_INSTALL_S = 240


@dataclass(frozen=True)
class Ran:
    """What a program wrote, and how it ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def values(self) -> list[Any]:
        """One JSON value a line."""
        return [json.loads(line) for line in self.stdout.splitlines()]


@dataclass(frozen=True)
class NodeProject:
    """A folder with a package.json, installed."""

    folder: Path

    @classmethod
    def installed(cls, folder: Path) -> NodeProject:
        """`npm ci`, unless the same lock file's packages lie there; without Node CI fails, others skip."""
        for tool in ("node", "npm"):
            if shutil.which(tool) is None:
                missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
                missing(
                    f"{tool} is not installed: the client in Node cannot be tried (Node 20 or newer, npm)"
                )
        lock = hashlib.sha256((folder / "package-lock.json").read_bytes()).hexdigest()
        stamp = folder / "node_modules" / ".installed"
        if not stamp.exists() or stamp.read_text() != lock:
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_INSTALL_S)
            assert done.returncode == 0, f"npm ci: {done.stdout[-2000:]}{done.stderr[-4000:]}"
            stamp.write_text(lock)
        return cls(folder)

    def run(
        self, script: Path, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> Ran:
        """Runs a script to its end; the environment's TREADLE_ variables are not passed on."""
        done = subprocess.run(
            ["node", str(script), *arguments],
            env=_environment(environment),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=_PROGRAM_S,
        )
        return Ran(done.returncode, done.stdout, done.stderr)


def _environment(own: Mapping[str, str] | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TREADLE_")}
    return kept | dict(own or {})

"""The `treadle` command as a process, for tests whose services run in this one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """What a command wrote, and how it ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Standard output as JSONL."""
        return [json.loads(line) for line in self.stdout.splitlines()]


@dataclass(frozen=True)
class Command:
    """Runs `treadle` against a gateway at `address`, in a home where nothing runs."""

    home: Path
    address: str

    async def start(self, *arguments: str, environment: Mapping[str, str] | None = None, **pipes: Any):
        """The process, its output piped."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TREADLE_")}
        own = {"TREADLE_HOME": str(self.home), "TREADLE_ADDRESS": self.address, "COLUMNS": "160"}
        own["TREADLE_TOKENIZER_ADDRESS"] = self.address
        piped = asyncio.subprocess.PIPE
        defaults = {"stdin": asyncio.subprocess.DEVNULL, "stdout": piped, "stderr": piped}
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "treadle.cli.main",
            *arguments,
            env=clean | own | dict(environment or {}),
            **(defaults | pipes),
        )

    async def run(self, *arguments: str, text: str | bytes | None = None, check: bool = True) -> Ended:
        """To its end; exit code 0 unless `check` is off."""
        piped = {} if text is None else {"stdin": asyncio.subprocess.PIPE}
        process = await self.start(*arguments, **piped)
        return await ended(process, text, check=check)


async def ended(process: Any, text: str | bytes | None = None, *, check: bool = True) -> Ended:
    """What a process wrote in all."""
    given = text.encode() if isinstance(text, str) else text
    async with asyncio.timeout(60):
        out, said = await process.communicate(given)
    assert b"Traceback" not in said, said.decode()
    assert not check or process.returncode == 0, said.decode()
    return Ended(process.returncode, out.decode(), said.decode())

"""A registry whose store no other process can read: it lies in a mount namespace of the registry's own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from waiting import until

from treadle.client import Artifact, ModelSource, RegistryClient
from treadle.errors import TreadleError
from treadle.local.ports import free_ports
from treadle.process import child_command


@dataclass
class DistantRegistry:
    """Its process, where it listens, and what it says of the files that it gave away."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path
    client: RegistryClient

    async def imported(self, folder: Path, alias: str) -> Artifact:
        """Imports a folder that both can read."""
        found = None
        async for progress in self.client.import_model(ModelSource("folder", str(folder)), alias=alias):
            found = progress.artifact
        assert found is not None
        assert not os.path.lexists(found.location), "the store can be read here"  # noqa: ASYNC240
        return found

    def sent(self) -> list[tuple[str, int, int]]:
        """Digest, offset and bytes of every file that went, so far."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [
            (line["blob"], line["from"], line["bytes"]) for line in lines if line["message"] == "a blob went"
        ]

    def sent_bytes(self) -> Counter[str]:
        """Bytes that went, by digest."""
        counted: Counter[str] = Counter()
        for digest, _, size in self.sent():
            counted[digest] += size
        return counted


@contextlib.asynccontextmanager
async def distant_registry(folder: Path) -> AsyncIterator[DistantRegistry]:
    """Runs one below `folder`. Who is not root mounts in a user namespace of its own."""
    (mount := folder / "elsewhere").mkdir()
    (port,) = free_ports(1)
    script = 'mount -t tmpfs -o size=256m tmpfs "$0" && exec "$@"'
    namespaces = "-m" if os.getuid() == 0 else "-rm"
    command = [
        "unshare",
        namespaces,
        "sh",
        "-c",
        script,
        str(mount),
        sys.executable,
        "-m",
        "treadle_registry",
    ]
    variables = os.environ | {
        "TREADLE_REGISTRY_ADDRESS": f"127.0.0.1:{port}",
        "TREADLE_REGISTRY_METRICS_ADDRESS": "",
        "TREADLE_STORE": str(mount / "store"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    log = folder / "registry.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220
            child_command(command), env=variables, stdout=output, stderr=output
        )

    async def is_up() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(TreadleError):
            return await client.artifacts() == []
        return False

    try:
        async with RegistryClient(f"127.0.0.1:{port}") as client:
            await until(is_up, "the registry serves", 60)
            yield DistantRegistry(process, f"127.0.0.1:{port}", log, client)
    finally:
        process.kill()
        process.wait()

"""A store that may not be written to: a read-only mount, and folders that the registry has no right to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from small_folder import write_model
from waiting import until

from treadle.client import ModelSource, RegistryClient
from treadle.errors import TreadleError
from treadle.local.ports import free_ports
from treadle.process import child_command
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Store

READ_ONLY_MOUNT = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
"""Who is not root mounts in a user namespace of its own."""
NO_OVERRIDE = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
"""Makes root obey the modes of files like anybody."""
RIGHTS = NO_OVERRIDE if os.getuid() == 0 else []
REGISTRY = [sys.executable, "-m", "treadle_registry"]
REASON = """
import sys
from pathlib import Path
from treadle.errors import FailedPrecondition
from treadle_registry.store.store import Store
try:
    Store.open(Path(sys.argv[1]))
except FailedPrecondition as error:
    print(error.reason)
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one model."""
    folder = write_model(tmp_path / "kept")
    made = Store.open(tmp_path / "store")
    import_source(made, LocalSource("folder", str(folder)))
    return made.root


def refusal(around: list[str], store: Path) -> tuple[str, str]:
    """What a registry says that does not start, and the reason; both are started as `around` says."""
    reason = subprocess.run(
        [*around, sys.executable, "-c", REASON, str(store)], capture_output=True, text=True, timeout=60
    )
    variables = os.environ | {"TREADLE_STORE": str(store), "TREADLE_REGISTRY_ADDRESS": "127.0.0.1:0"}
    ended = subprocess.run([*around, *REGISTRY], env=variables, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    print(f"{reason.stdout.strip()}: {last}")
    return last, reason.stdout.strip()


def test_a_read_only_mount_is_refused_at_the_start(store: Path):
    namespaces = "-m" if os.getuid() == 0 else "-rm"
    command = ["unshare", namespaces, "sh", "-c", READ_ONLY_MOUNT, str(store)]
    said, reason = refusal(command, store)
    assert "Read-only file system" in said
    assert "give another one in TREADLE_STORE" in said
    assert reason == "STORE_READ_ONLY"


def test_no_right_to_write_is_refused_at_the_start(store: Path):
    files = [store, *store.iterdir()]
    with without_rights(*files):
        said, reason = refusal(RIGHTS, store)
    assert "Permission denied" in said
    assert "give another one in TREADLE_STORE" in said
    assert reason == "STORE_NOT_WRITABLE"


@contextlib.contextmanager
def without_rights(*paths: Path) -> Iterator[None]:
    """Nobody may write there, until the block ends."""
    modes = {path: path.stat().st_mode for path in paths}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
async def registry(store: Path, tmp_path: Path) -> AsyncIterator[RegistryClient]:
    """A registry that obeys the modes of files."""
    (port,) = free_ports(1)
    variables = os.environ | {
        "TREADLE_STORE": str(store),
        "TREADLE_REGISTRY_ADDRESS": f"127.0.0.1:{port}",
        "TREADLE_REGISTRY_METRICS_ADDRESS": "",
    }
    log = tmp_path / "registry.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220
            child_command([*RIGHTS, *REGISTRY]), env=variables, stdout=output, stderr=output
        )

    async def is_up() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(TreadleError):
            return len(await client.artifacts()) == 1
        return False

    try:
        async with RegistryClient(f"127.0.0.1:{port}") as client:
            await until(is_up, "the registry serves", 60)
            yield client
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            assert not [line for line in lines if "failed" in line["message"]], lines
    finally:
        process.kill()
        process.wait()


PLACES = ("tmp", "artifacts", "blobs/sha256")


@pytest.mark.parametrize("place", PLACES)
async def test_a_right_that_is_lost_is_told(
    store: Path, tmp_path: Path, registry: RegistryClient, place: str
):
    folder = write_model(tmp_path / "new", seed=1)
    (kept,) = await registry.artifacts()
    with without_rights(store / place):
        for _ in range(2):
            with pytest.raises(TreadleError) as caught:
                await imported(registry, folder)
            print(f"{place}: {caught.value.message!r}")
            assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "STORE_NOT_WRITABLE")
            assert "give its user the right" in caught.value.message
            assert not caught.value.fields, "the model is not at fault"
        # What is there is served.
        assert await registry.resolve(kept.digest) == kept
        assert await registry.artifacts() == [kept]
        assert (await registry.set_alias("kept", kept.digest)).artifact_digest == kept.digest
    digest = await imported(registry, folder)
    assert {one.digest for one in await registry.artifacts()} == {kept.digest, digest}


async def imported(registry: RegistryClient, folder: Path) -> str:
    digest = ""
    async for progress in registry.import_model(ModelSource("folder", str(folder))):
        if progress.artifact is not None:
            digest = progress.artifact.digest
    return digest

"""Killed at every write: nothing half done ever counts, and the next try succeeds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft_folder import write_adapter
from small_encoder import (
    SENTENCE_FILES,
    canonical_tensors,
    encoder_config,
    foreign_tensors,
    write_encoder,
)
from small_folder import write_model

from treadle_registry.catalog.catalog import Catalog
from treadle_registry.operations.importing import import_source
from treadle_registry.rollout.deploying import Deploying
from treadle_registry.rollout.rollouts import Rollouts
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Store

MakeSource = Callable[..., LocalSource]


@pytest.fixture
def make_source(
    tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: Callable[..., Path]
) -> MakeSource:
    """A small model of each kind."""

    def gguf(name: str = "tiny", **fields: Any) -> Path:
        return write_gguf(tmp_path / f"{name}.gguf", tiny_model(layers=1, **fields), vocabulary)

    def make(kind: str, **fields: Any) -> LocalSource:
        if kind == "gguf_file":
            return LocalSource("gguf_file", str(gguf(**fields)))
        if kind == "encoder":
            raw = encoder_config()
            tensors = foreign_tensors(raw, canonical_tensors(raw))
            folder = write_encoder(tmp_path / "folder", raw, tensors, shards=2, files=SENTENCE_FILES)
            return LocalSource("folder", str(folder))
        if kind == "folder":
            store = Store.open(tmp_path / "another")
            found = import_source(store, LocalSource("gguf_file", str(gguf())))
            folder = tmp_path / "folder"
            shutil.copytree(found.canonical_folder, folder)
            return LocalSource("folder", str(folder))
        package = tmp_path / "path" / "carried_model"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise AssertionError('a package is never imported')")
        gguf().rename(package / "tiny.gguf")
        return LocalSource("package", "carried_model")

    return make


def run_killed(tmp_path: Path, store: Path, kind: str, value: str) -> dict[str, int]:
    script = Path(__file__).with_name("killed.py")
    path = tmp_path / "path"
    command = [sys.executable, str(script), str(store), kind, value, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    told: dict[str, int] = json.loads(result.stdout)
    print(f"{kind}: {told}")
    return told


@pytest.mark.parametrize(
    ("kind", "least"), [("gguf_file", 80), ("folder", 80), ("package", 80), ("encoder", 120)]
)
def test_an_import(tmp_path: Path, make_source: MakeSource, kind: str, least: int):
    source = make_source(kind)
    told = run_killed(tmp_path, Store.open(tmp_path / "store").root, source.kind, source.value)
    assert told["killed"] >= least
    assert told["half_done"] > least // 2
    # From the rename that publishes on it counts, though the import was killed.
    assert told["published"] >= 2
    assert (told["damaged"], told["whole_at_the_end"]) == (0, 1)


@pytest.mark.parametrize("kind", ["quantization", "dtype", "adapter_merge", "of an encoder"])
def test_a_derivation(tmp_path: Path, kind: str):
    store = Store.open(tmp_path / "store")
    write: Callable[[Path], Path] = write_model
    value = {"quantization": "int4", "dtype": "float32"}.get(kind, "float16")
    if kind == "of an encoder":
        write, kind = write_encoder, "dtype"
    elif kind == "adapter_merge":
        value = str(write_adapter(tmp_path / "adapter"))
    import_source(store, LocalSource("folder", str(write(tmp_path / "model"))))
    told = run_killed(tmp_path, store.root, kind, value)
    assert told["killed"] >= 60
    assert told["half_done"] > 30
    assert told["published"] >= 2
    assert (told["damaged"], told["whole_at_the_end"]) == (0, 2)


def test_an_import_that_repairs(tmp_path: Path, make_source: MakeSource):
    """Two artifacts share their weights, which are damaged; one of them is imported again."""
    store = Store.open(tmp_path / "store")
    source = make_source("gguf_file", name="first")
    first = import_source(store, source)
    weights = first.canonical_folder / "model.safetensors"
    changed = tmp_path / "changed"
    shutil.copytree(first.canonical_folder, changed)
    (changed / "chat_template.jinja").write_text("{{ another }}")
    import_source(store, LocalSource("folder", str(changed)))
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    weights.chmod(0o444)
    told = run_killed(tmp_path, store.root, source.kind, source.value)
    assert told["killed"] >= 90
    assert (told["damaged"], told["whole_at_the_end"]) == (2, 2)


def test_an_alias_that_moves(tmp_path: Path):
    """The database's log may grow by so many bytes and no more: the process dies in the write that would."""
    digests = [f"sha256:{number:064}" for number in range(3)]
    killed = moved = 0
    for room in range(0, 200_000, 700):
        folder = tmp_path / f"catalog-{room}"
        folder.mkdir()
        status = _move_alias(folder, digests, room)
        catalog = Catalog(folder)
        alias = catalog.aliases.get("prod")
        history = [entry for _, entry in catalog.aliases.history("prod", 1 << 62, 100)]
        assert catalog.database.one("PRAGMA integrity_check") == ("ok",)
        catalog.artifacts.index(dict.fromkeys(digests, 1.0))
        deploying = Deploying(Rollouts(catalog, publish=lambda changes: None))
        assert deploying.set_alias("prod", digests[0], alias.etag).digest == digests[0]
        catalog.close()
        assert alias == history[0]
        assert alias.digest in digests[1:]
        moved += alias.digest == digests[2]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGXFSZ
        killed += 1
    print(f"killed {killed} times while an alias moved; {moved} of {killed + 1} times it had")
    assert killed >= 20
    assert moved >= 1


def _move_alias(folder: Path, digests: list[str], room: int) -> int:
    """In a child: moves the alias a few times, then once more with `room` bytes left. Its wait status."""
    script = (
        "import json, os, resource, signal, sys\n"
        "from pathlib import Path\n"
        "from treadle_registry.catalog.catalog import Catalog\n"
        "from treadle_registry.rollout.deploying import Deploying\n"
        "from treadle_registry.rollout.rollouts import Rollouts\n"
        "folder, digests, room = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])\n"
        "catalog = Catalog(folder)\n"
        "catalog.artifacts.index(dict.fromkeys(digests, 1.0))\n"
        "set_alias = Deploying(Rollouts(catalog, publish=lambda changes: None)).set_alias\n"
        "for number in range(9):\n"
        "    set_alias('prod', digests[number % 2])\n"
        "set_alias('prod', digests[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "size = (folder / 'registry.db-wal').stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, resource.RLIM_INFINITY))\n"
        "set_alias('prod', digests[2])\n"
        "os._exit(0)\n"
    )
    command = [sys.executable, "-c", script, str(folder), json.dumps(digests), str(room)]
    process = subprocess.Popen(command)
    _, status = os.waitpid(process.pid, 0)
    process.returncode = 0
    return status

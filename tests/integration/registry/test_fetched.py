"""What of another registry's model is taken as it is, what is written anew, and what is not believed."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lying_registry import lying
from registry_stubs import RegistryStubs, open_registry, write_folder
from safetensors.numpy import load_file

from treadle.api.registry.v1 import artifact_pb2, source_pb2
from treadle.models.bfloat16 import round_to_bfloat16
from treadle_registry.config import RemotesConfig
from treadle_registry.formats.safetensors_file import write_bfloat16
from treadle_registry.operations import remote_import
from treadle_registry.sources.remote_source import RemoteSource
from treadle_registry.store.store import Store


def source(model: str, remote: str = "far") -> source_pb2.RegistrySource:
    return source_pb2.RegistrySource(remote=remote, model=model)


@pytest.fixture
async def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RegistryStubs]:
    """Another registry, which the settings of those that are opened after it know as "far"."""
    async with open_registry(tmp_path / "far") as made:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"far=127.0.0.1:{made.port}")
        yield made


async def test_what_no_digest_is_over_is_written_here(
    far: RegistryStubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Truncation would cut every prompt, and no digest is over it."""
    there = (await far.imported(folder=str(write_folder(tmp_path / "m")), alias="m")).artifact
    path = Path(there.location) / "tokenizer.json"
    cut = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    padded = json.loads(path.read_text()) | {"truncation": cut}
    content = json.dumps(padded).encode()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"

    def change(artifact: artifact_pb2.Artifact) -> None:
        (file,) = [file for file in artifact.files if file.path == path.name]
        file.digest, file.bytes = digest, len(content)
        artifact.source = "\x1b[2Jclean"

    async with lying(far.registry, change, {digest: content}) as port:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"liar=127.0.0.1:{port}")
        async with open_registry(tmp_path / "near") as client:
            here = (await client.imported(registry=source("m", "liar"))).artifact
    assert here.digest == there.digest
    assert digest not in {file.digest for file in here.files}
    assert json.loads((Path(here.location) / path.name).read_text())["truncation"] is None
    assert here.source == "?[2Jclean"


async def test_ends_of_line_of_a_chat_template(far: RegistryStubs, client: RegistryStubs, tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}\r\n{{ 2 }}\r"}))
    there = (await far.imported(folder=str(folder), alias="m")).artifact
    assert b"\r\n" in (Path(there.location) / "chat_template.jinja").read_bytes()
    here = (await client.imported(registry=source("m"))).artifact
    assert (here.digest, here.files) == (there.digest, there.files)


async def test_a_lie_of_the_source_is_not_what_a_folder_becomes(
    far: RegistryStubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One model's weights as made of another's files: who imports those gets what they really make."""
    folders = [write_folder(tmp_path / str(seed), seed) for seed in range(2)]
    honest, other = [(await far.imported(folder=str(folder))).artifact for folder in folders]

    def change(artifact: artifact_pb2.Artifact) -> None:
        artifact.ClearField("source_files")
        artifact.source_files.extend(honest.source_files)

    async with lying(far.registry, change) as port:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"liar=127.0.0.1:{port}")
        async with open_registry(tmp_path / "near") as client:
            come = (await client.imported(registry=source(other.digest, "liar"))).artifact
            assert come.source_files == honest.source_files
            assert (await client.imported(folder=str(folders[0]))).artifact.digest == honest.digest
            assert (await client.imported(folder=str(folders[1]))).artifact.digest == other.digest


def in_shards(folder: Path, count: int) -> Path:
    """The folder with its weights as bfloat16 in several files."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(count):
        file = f"part-{number}.safetensors"
        names = sorted(whole)[number::count]
        weight_map |= dict.fromkeys(names, file)
        values = {name: round_to_bfloat16(whole[name].astype(np.float32)) for name in names}
        with (folder / file).open("wb") as out:
            write_bfloat16(
                out.write,
                {name: whole[name].shape for name in names},
                lambda name, values=values: [values[name].data.cast("B")],
            )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


async def test_shards(far: RegistryStubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They come as they are; an index that sends the reader to the wrong one does not."""
    folder = in_shards(write_folder(tmp_path / "m"), 3)
    there = (await far.imported(folder=str(folder), alias="m")).artifact
    name = "model.safetensors.index.json"
    index = json.loads((Path(there.location) / name).read_text())
    files = sorted(index["weight_map"].values())
    index["weight_map"] = dict.fromkeys(index["weight_map"], files[0])
    content = json.dumps(index).encode()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"

    def change(artifact: artifact_pb2.Artifact) -> None:
        (file,) = [file for file in artifact.files if file.path == name]
        file.digest, file.bytes = digest, len(content)

    async with lying(far.registry, change, {digest: content}) as port:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"far=127.0.0.1:{far.port}, liar=127.0.0.1:{port}")
        for remote in ("far", "liar"):
            async with open_registry(tmp_path / f"from-{remote}") as client:
                here = (await client.imported(registry=source("m", remote))).artifact
            assert (here.digest, here.files) == (there.digest, there.files), remote
    assert len(set(files)) == 3
    print(f"{len(here.files)} files, {len(set(files))} shards")


async def test_two_imports_that_share_files(
    far: RegistryStubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another one ends, and takes up what both have fetched, just before this one does."""
    there = (await far.imported(folder=str(write_folder(tmp_path / "m")), alias="m")).artifact
    store, config = Store.open(tmp_path / "near"), RemotesConfig()
    fetch, ended = remote_import._fetch, []

    def fetch_and_wait(*arguments: Any) -> None:
        fetch(*arguments)
        if not ended:
            ended.append("begun")
            ended.append(remote_import.import_remote(store, RemoteSource("far", "m"), config).manifest.digest)

    monkeypatch.setattr(remote_import, "_fetch", fetch_and_wait)
    mine = await asyncio.to_thread(remote_import.import_remote, store, RemoteSource("far", "m"), config)
    assert ended[1] == mine.manifest.digest == there.digest
    assert mine.already_present
    assert store.digests() == [there.digest]
    print(f"{len(ended)} imports of {there.digest}")

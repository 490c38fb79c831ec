"""What a repository is, without its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_models import REPOSITORY, SINGLE, bfloat16_shards, model_files
from hub_server import HubServer

from treadle.errors import InvalidArgument, NotFound
from treadle_registry.formats.canonical import facts_of
from treadle_registry.formats.gguf_reader import GgufFile
from treadle_registry.formats.safetensors_file import read_header
from treadle_registry.sources.hub import open_hub
from treadle_registry.sources.hub_client import HubClient
from treadle_registry.sources.hub_headers import hub_headers
from treadle_registry.sources.hub_source import HubSource

SOURCE = HubSource(REPOSITORY)
BIG = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}


def test_a_single_file(hub: HubServer, client: HubClient, tmp_path: Path):
    files = model_files(**BIG)
    commit = hub.add(REPOSITORY, files)
    (tmp_path / SINGLE).write_bytes(files[SINGLE])
    with hub_headers(SOURCE, client) as headers:
        assert headers.origin == f"hub:{REPOSITORY}@{commit}"
        assert headers.weights == (SINGLE,)
        assert all(path.stat().st_size == len(files[name]) for name, path in headers.files.items())
        assert headers.files["README.md"].read_bytes() == files["README.md"]
        assert read_header(headers.files[SINGLE]) == read_header(tmp_path / SINGLE)
        facts = facts_of(headers.opened(linked=False).model.check())
        kept = headers.files[SINGLE]
    assert facts.license == "apache-2.0"
    assert hub.sent(SINGLE) < len(files[SINGLE]) // 10
    assert not kept.exists()
    assert not client.cache.exists()
    print(f"{hub.sent(SINGLE)} of {len(files[SINGLE])} bytes; {facts.parameters} parameters")


def test_shards(hub: HubServer, client: HubClient):
    files = bfloat16_shards(model_files(**BIG), 3)
    hub.add(REPOSITORY, files)
    with hub_headers(SOURCE, client) as headers:
        assert len(headers.weights) == 3
        facts = facts_of(headers.opened(linked=False).model.check())
    sent, whole = (
        sum(size(name) for name in headers.weights) for size in (hub.sent, lambda name: len(files[name]))
    )
    assert sent < whole // 2
    print(f"{sent} of {whole} bytes; {facts.parameters} parameters")


def test_a_header_longer_than_the_first_read(
    hub: HubServer, client: HubClient, monkeypatch: pytest.MonkeyPatch
):
    files = model_files(**BIG)
    hub.add(REPOSITORY, files)
    monkeypatch.setattr("treadle_registry.sources.hub_headers._FIRST_READ", 100)
    with hub_headers(SOURCE, client) as headers:
        assert facts_of(headers.opened(linked=False).model.check()).parameters
    length = 8 + int.from_bytes(files[SINGLE][:8], "little")
    assert hub.sent(SINGLE) == length > 100
    print(f"{length} bytes in two reads")


@pytest.mark.parametrize("first_read", [64, 1 << 20])
def test_a_gguf_file(
    hub: HubServer,
    client: HubClient,
    tmp_path: Path,
    tiny_model: Callable[..., object],
    write_gguf: Callable[..., Path],
    vocabulary: object,
    monkeypatch: pytest.MonkeyPatch,
    first_read: int,
):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(hidden=256, inner=512, layers=3), vocabulary)
    hub.add(REPOSITORY, {"m.gguf": path.read_bytes(), "other.gguf": bytes(9000)})
    monkeypatch.setattr("treadle_registry.sources.hub_headers._FIRST_READ", first_read)
    with hub_headers(dataclasses.replace(SOURCE, gguf_file="m.gguf"), client) as headers:
        assert headers.is_gguf
        with GgufFile(headers.files["m.gguf"]) as found, GgufFile(path) as whole:
            assert found.metadata == whole.metadata
            assert found.tensors == whole.tensors
        assert facts_of(headers.opened(linked=False).model.check()).num_layers == 3
    size = path.stat().st_size
    assert hub.sent("m.gguf") < size
    assert hub.sent("other.gguf") == 0
    print(f"{hub.sent('m.gguf')} of {size} bytes in {len(hub.of_file('m.gguf')) // 2} reads")


def test_out_of_the_cache(hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]):
    open_hub(SOURCE, client)
    before = len(hub.requests)
    with hub_headers(dataclasses.replace(SOURCE, local_files_only=True), client) as headers:
        assert headers.weights == (SINGLE,)
        assert headers.files[SINGLE].stat().st_size == len(files[SINGLE])
        assert facts_of(headers.opened(linked=False).model.check()).license == "apache-2.0"
    assert len(hub.requests) == before
    with pytest.raises(NotFound), hub_headers(HubSource("a/b", local_files_only=True), client):
        raise AssertionError
    print("0 requests")


def test_what_claims_too_much_is_not_fetched(
    hub: HubServer, client: HubClient, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("treadle_registry.sources.hub_headers._LONGEST_HEADER", 4096)
    monkeypatch.setattr("treadle_registry.sources.hub_headers._FIRST_READ", 1024)
    hub.add(REPOSITORY, files | {SINGLE: (1 << 62).to_bytes(8, "little") + bytes(100_000)})
    with hub_headers(SOURCE, client) as headers, pytest.raises(InvalidArgument, match="header claims"):
        headers.opened(linked=False).model.check()
    assert hub.sent(SINGLE) <= 4096
    hub.add(REPOSITORY, {"m.gguf": b"GGUF" + b"\xff" * 100_000})
    with pytest.raises(InvalidArgument), hub_headers(dataclasses.replace(SOURCE, gguf_file="m.gguf"), client):
        raise AssertionError
    assert hub.sent("m.gguf") <= 4096
    print(f"{hub.sent(SINGLE)} and {hub.sent('m.gguf')} bytes")


def test_what_cannot_be_imported_can_be_looked_at(hub: HubServer, client: HubClient, files: dict[str, bytes]):
    odd = {"config.json": b'{"model_type": "nobody", "auto_map": {}, "quantization_config": {"bits": 4}}'}
    hub.add(REPOSITORY, {name: data for name, data in (files | odd).items() if name != "tokenizer.json"})
    with hub_headers(SOURCE, client) as headers:
        assert headers.files["config.json"].read_bytes() == odd["config.json"]
        assert "tokenizer.json" not in headers.files
        assert read_header(headers.files[SINGLE])

"""What goes wrong with a hub, each with its status, its reason and a way out; and nothing left half done."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_models import INDEX, REPOSITORY, SINGLE, bfloat16_shards
from hub_server import HubServer
from huggingface_hub import constants
from unprivileged import unprivileged

from treadle.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    TreadleError,
    Unauthenticated,
    Unavailable,
)
from treadle_registry.config import HubConfig
from treadle_registry.sources.hub import open_hub
from treadle_registry.sources.hub_client import HubClient
from treadle_registry.sources.hub_source import HubSource

SOURCE = HubSource(REPOSITORY)
TOKEN = "hf_" + "s3cr3t" * 4


def weights_asked(hub: HubServer) -> int:
    """Requests for weights of any kind."""
    kinds = (".safetensors", ".bin", ".gguf", ".h5")
    return sum(request.path.endswith(kinds) or request.host == "cdn" for request in hub.requests)


def refusal(
    source: HubSource, client: HubClient, kind: type[TreadleError], reason: str, *said: str
) -> TreadleError:
    """What opening the source raises."""
    with pytest.raises(kind) as raised:
        open_hub(source, client)
    assert raised.value.reason == reason, raised.value.message
    for words in said:
        assert words in raised.value.message
    assert TOKEN not in raised.value.message
    return raised.value


def test_no_network(hub: HubServer, client: HubClient, commit: str):
    hub.stop()
    refusal(SOURCE, client, Unavailable, "HUB_UNREACHABLE", hub.url, "HF_HUB_OFFLINE=1", "--offline")
    assert not hub.requests
    assert not client.cache.exists()
    print("refused connections, nothing on disk")


def test_a_hub_that_only_fails(hub: HubServer, client: HubClient, commit: str):
    fault = hub.fail("status", "", times=1000, status=502)
    error = refusal(SOURCE, client, Unavailable, "HUB_UNREACHABLE", "502")
    assert error.retry_after_s
    assert fault.happened == 3
    print(f"{fault.happened} attempts")


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"{}", b"[]", b'{"sha": "../x", "id": "a"}', b""])
def test_what_answers_is_no_hub(hub: HubServer, client: HubClient, commit: str, body: bytes):
    hub.answers = body
    refusal(SOURCE, client, Unavailable, "HUB_UNREACHABLE", "HF_ENDPOINT")


def test_unknown_names(hub: HubServer, client: HubClient, commit: str):
    refusal(HubSource("nobody/nothing"), client, NotFound, "REPOSITORY_NOT_FOUND", "private", "HF_TOKEN")
    refusal(HubSource(REPOSITORY, "v9"), client, NotFound, "REVISION_NOT_FOUND", "v9")
    refusal(HubSource(REPOSITORY, "0" * 40), client, NotFound, "REVISION_NOT_FOUND")
    refusal(HubSource(REPOSITORY, variant="fp16"), client, NotFound, "VARIANT_NOT_FOUND", "none")
    refusal(HubSource(REPOSITORY, gguf_file="m.gguf"), client, NotFound, "HUB_FILE_NOT_FOUND", "none")
    assert weights_asked(hub) == 0
    assert not client.cache.exists()
    print(f"{len(hub.requests)} requests, nothing on disk")


def test_a_file_that_goes_meanwhile(hub: HubServer, client: HubClient, commit: str):
    fault = hub.fail("status", SINGLE, status=404, headers={"X-Error-Code": "EntryNotFound"})
    refusal(SOURCE, client, NotFound, "HUB_FILE_NOT_FOUND", SINGLE)
    assert fault.happened == 1


def test_a_gated_repository(hub: HubServer, client: HubClient, files: dict[str, bytes]):
    hub.add(REPOSITORY, files, gated=True)
    refusal(SOURCE, client, Unauthenticated, "GATED_REPOSITORY", "accept its conditions", "HF_TOKEN")
    hub.tokens.add(TOKEN)
    with_token = HubClient(TOKEN, cache=client.cache)
    refusal(SOURCE, with_token, PermissionDenied, "GATED_REPOSITORY", "ask for access")
    assert weights_asked(hub) == 0
    assert not list(client.cache.glob("models--*/snapshots/*/*"))
    assert not list(client.cache.glob("models--*/blobs/*"))
    hub.repositories[REPOSITORY].readers.add(TOKEN)
    assert open_hub(SOURCE, with_token).model.files[SINGLE].read_bytes() == files[SINGLE]


def test_a_token_that_nobody_has(hub: HubServer, client: HubClient, commit: str):
    refusal(
        SOURCE, HubClient(TOKEN, cache=client.cache), Unauthenticated, "HUB_TOKEN_REFUSED", "HF_TOKEN_PATH"
    )


def test_the_token_of_the_settings_file(
    tmp_path: Path, hub: HubServer, client: HubClient, files: dict[str, bytes]
):
    hub.add(REPOSITORY, files, gated=True)
    hub.tokens.add(TOKEN)
    hub.repositories[REPOSITORY].readers.add(TOKEN)
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    HubClient.of(HubConfig(token_file=path)).listing(SOURCE)
    assert hub.requests[-1].token == TOKEN
    for content in (b"", b"a\nb", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(FailedPrecondition, match="TREADLE_REGISTRY_HUB_TOKEN_FILE") as raised:
            HubClient.of(HubConfig(token_file=path)).listing(SOURCE)
        assert raised.value.reason == "HUB_TOKEN_UNREADABLE"
    path.unlink()
    with pytest.raises(FailedPrecondition, match="token"):
        HubClient.of(HubConfig(token_file=path)).listing(SOURCE)
    assert len(hub.requests) == 1


def test_a_token_that_cannot_be_read_is_told_before_anything_is_asked(
    hub: HubServer, commit: str, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "token"
    path.mkdir()
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(path))
    refusal(SOURCE, client, FailedPrecondition, "HUB_TOKEN_UNREADABLE", str(path))
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\N{SNOWMAN}")
    refusal(SOURCE, HubClient(cache=client.cache), FailedPrecondition, "HUB_TOKEN_UNREADABLE", "HF_TOKEN")
    assert not hub.requests


def test_pickle_is_refused_before_anything_comes(hub: HubServer, client: HubClient, files: dict[str, bytes]):
    hub.add(REPOSITORY, {name: data for name, data in files.items() if name != SINGLE})
    refusal(SOURCE, client, InvalidArgument, "PICKLE_WEIGHTS", "safetensors", "save_pretrained")
    assert len(hub.requests) == 1
    assert not client.cache.exists()
    print("1 request: the list of files")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"config.json": b"{"}, "CORRUPT_CONFIG"),
        ({"config.json": b"[]"}, "CORRUPT_CONFIG"),
        ({"config.json": None}, "MISSING_FILE"),
        ({"tokenizer.json": None}, "MISSING_FILE"),
        ({"config.json": b'{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}'}, "REMOTE_CODE"),
        ({"config.json": b'{"model_type": "nobody"}'}, "UNSUPPORTED_ARCHITECTURE"),
    ],
)
def test_a_config_that_is_wrong_is_told_before_the_weights_come(
    hub: HubServer, client: HubClient, files: dict[str, bytes], changed: dict[str, bytes | None], reason: str
):
    made = {name: data for name, data in (files | changed).items() if data is not None}
    hub.add(REPOSITORY, made)
    with pytest.raises(TreadleError) as raised:
        open_hub(SOURCE, client)
    assert raised.value.reason == reason
    assert (
        next(iter(changed)).removesuffix(".json") in raised.value.message or b"nobody" in made["config.json"]
    )
    assert weights_asked(hub) == 0
    print(f"{len(hub.requests)} requests, none for weights")


def test_an_index_that_names_missing_shards(hub: HubServer, client: HubClient, files: dict[str, bytes]):
    sharded = bfloat16_shards(files, 3)
    del sharded["model-00002-of-00003.safetensors"]
    hub.add(REPOSITORY, sharded)
    refusal(SOURCE, client, InvalidArgument, "MISSING_FILE", INDEX, "model-00002-of-00003.safetensors")
    assert weights_asked(hub) == 0


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter; pytest's own are for one user."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_cache_that_may_not_be_written(
    hub: HubServer,
    client: HubClient,
    commit: str,
    files: dict[str, bytes],
    open_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(open_folder / "none"))
    client.cache = open_folder / "hub"
    client.cache.mkdir()
    client.cache.chmod(0o555)
    with unprivileged():
        refusal(SOURCE, client, PermissionDenied, "HUB_CACHE_NOT_WRITABLE", str(client.cache), "HF_HUB_CACHE")
    assert weights_asked(hub) == 0
    client.cache.chmod(0o755)
    open_hub(SOURCE, client)
    for path, _, _ in os.walk(client.cache):
        Path(path).chmod(0o555)
    before = weights_asked(hub)
    with unprivileged():
        opened = open_hub(SOURCE, client)
    assert opened.model.files[SINGLE].read_bytes() == files[SINGLE]
    assert weights_asked(hub) == before
    for path, _, _ in os.walk(client.cache):
        Path(path).chmod(0o755)
    print("refused where it must write, served where it must not")


def test_quantised_weights_are_refused_by_their_headers(
    hub: HubServer, client: HubClient, files: dict[str, bytes]
):
    config = json.loads(files["config.json"]) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    hub.add(REPOSITORY, files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(InvalidArgument, match="GPTQ") as raised:
        open_hub(SOURCE, client)
    assert raised.value.reason == "CORRUPT_QUANTIZATION"
    assert 0 < hub.sent(SINGLE) < len(files[SINGLE])
    assert not [path for path in client.cache.glob("models--*/snapshots/*/*") if path.name == SINGLE]
    print(f"{hub.sent(SINGLE)} of {len(files[SINGLE])} bytes")

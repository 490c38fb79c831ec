"""Nothing leaves the machine where nothing may, and what is missing is named."""

from __future__ import annotations

import pytest
from hub_machine import HubMachine
from hub_models import INDEX, REPOSITORY, SINGLE, bfloat16_shards
from hub_server import HubServer

from treadle.errors import NotFound
from treadle_registry.sources.hub_source import HubSource

MODES = ["HF_HUB_OFFLINE", "local_files_only"]


def asked_offline(hub: HubServer, mode: str, **wanted: str) -> tuple[HubSource, dict[str, str]]:
    """A source, and the environment of who imports it."""
    local = mode == "local_files_only"
    source = HubSource(REPOSITORY, local_files_only=local, **wanted)  # type: ignore[arg-type]
    # Whatever would go elsewhere meets the same record.
    proxies = {f"{kind}_PROXY": hub.url for kind in ("HTTP", "HTTPS", "ALL")} | {"NO_PROXY": ""}
    return source, proxies if local else proxies | {"HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("revision", ["", "v1", "commit"])
def test_it_answers_from_disk(hub: HubServer, machine: HubMachine, commit: str, mode: str, revision: str):
    online = machine.run(HubSource(REPOSITORY, revision="" if revision == "commit" else revision))
    before = len(hub.requests)
    source, environment = asked_offline(hub, mode, revision=commit if revision == "commit" else revision)
    for validate_only in (False, True):
        again = machine.run(source, validate_only=validate_only, **environment)
        assert again.manifest.source == f"hub:{REPOSITORY}@{commit}"
        assert again.manifest.digest == ("" if validate_only else online.manifest.digest)
    sent = len(hub.requests) - before
    assert before > 5
    assert sent == 0, hub.requests[before:]
    print(f"{before} requests online, {sent} offline")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "missing", ["everything", "revision", "config.json", "tokenizer.json", SINGLE, "variant"]
)
def test_it_names_what_is_missing(hub: HubServer, machine: HubMachine, commit: str, mode: str, missing: str):
    if missing != "everything":
        machine.run(HubSource(REPOSITORY))
    wanted = {"revision": {"revision": "v2"}, "variant": {"variant": "fp16"}}.get(missing, {})
    if missing.endswith((".json", ".safetensors")):
        (machine.cache / "models--river--sea" / "snapshots" / commit / missing).unlink()
    before = len(hub.requests)
    source, environment = asked_offline(hub, mode, **wanted)
    with pytest.raises(NotFound) as raised:
        machine.run(source, **environment)
    assert raised.value.reason == "FILE_NOT_CACHED"
    assert raised.value.fields[0].field == "hub"
    said = {"everything": "'main'", "revision": "'v2'", "variant": "fp16"}.get(missing, missing)
    assert said in raised.value.message
    assert "HF_HUB_OFFLINE" in raised.value.message
    sent = len(hub.requests) - before
    assert sent == 0, hub.requests[before:]
    print(f"{sent} requests; {raised.value.message}")


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_shard_is_named(hub: HubServer, machine: HubMachine, files: dict[str, bytes], mode: str):
    hub.add(REPOSITORY, bfloat16_shards(files, 3))
    online = machine.run(HubSource(REPOSITORY))
    before = len(hub.requests)
    source, environment = asked_offline(hub, mode)
    assert machine.run(source, **environment).manifest.digest == online.manifest.digest
    (shard,) = machine.cache.glob("models--*/snapshots/*/model-00002-of-00003.safetensors")
    shard.unlink()
    with pytest.raises(NotFound, match="model-00002-of-00003") as raised:
        machine.run(source, **environment)
    assert raised.value.reason == "FILE_NOT_CACHED"
    (index,) = machine.cache.glob(f"models--*/snapshots/*/{INDEX}")
    index.unlink()
    with pytest.raises(NotFound, match="or index"):
        machine.run(source, **environment)
    assert len(hub.requests) == before
    print("0 requests")

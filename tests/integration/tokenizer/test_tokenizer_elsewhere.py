"""A tokenizer on a machine that cannot read the registry's store: it fetches what it needs, and no more."""

from __future__ import annotations

import json
from pathlib import Path

from damage import flip
from distant_registry import distant_registry
from registry_stubs import open_registry
from small_folder import write_model
from started_service import started
from tokenizer_process import inputs

from treadle.api.tokenizer.v1 import tokenizer_pb2 as pb
from treadle.api.tokenizer.v1 import tokenizer_pb2_grpc
from treadle.client import Artifact
from treadle.rpc import open_channel

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


async def encode(registry: str, cache: Path, log: Path) -> list[int]:
    """What a fresh tokenizer process makes of a text and of a chat."""
    settings = {"TREADLE_REGISTRY_ADDRESS": registry, "TREADLE_NODE_CACHE": str(cache)}
    with started("tokenizer", log, settings) as (_, address):
        async with open_channel(address) as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            request = pb.EncodeRequest(model="m", inputs=inputs("the river runs"))
            encoded = await stub.Encode(request, timeout=60, wait_for_ready=True)
            chat = pb.RenderChatRequest(model="m", messages=[{"role": "user", "content": "old bridges"}])
            rendered = await stub.RenderChat(chat, timeout=60)
            assert rendered.text == "old bridges"
            return list(encoded.encodings[0].ids)


def cached(cache: Path, artifact: Artifact) -> Path:
    return cache / "artifacts" / artifact.digest.removeprefix("sha256:")


async def test_each_file_is_fetched_once_a_node(tmp_path: Path):
    model, cache = write_model(tmp_path / "model", template=TEMPLATE), tmp_path / "node"
    async with distant_registry(tmp_path) as registry:
        artifact = await registry.imported(model, "m")
        files = {file.path: file for file in artifact.files}
        first = await encode(registry.address, cache, tmp_path / "first.log")
        assert len(first) == 3
        needed = {name for name in files if name.startswith(("tokenizer", "generation", "chat_template"))}
        sent = registry.sent_bytes()
        assert sent == {files[name].digest: files[name].size for name in needed}
        assert files["model.safetensors"].digest not in sent
        assert {path.name for path in cached(cache, artifact).iterdir()} == needed
        # Another process on the node finds it all.
        assert await encode(registry.address, cache, tmp_path / "second.log") == first
        assert registry.sent_bytes() == sent
        # What is damaged there is fetched again, and nothing else.
        flip(cached(cache, artifact) / "tokenizer.json")
        assert await encode(registry.address, cache, tmp_path / "third.log") == first
        again = registry.sent_bytes() - sent
        assert again == {files["tokenizer.json"].digest: files["tokenizer.json"].size}
        logs = [json.loads(line) for line in (tmp_path / "second.log").read_text().splitlines()]
        assert not [line for line in logs if line["message"] == "files were fetched into the node cache"]
    size = files["model.safetensors"].size
    print(f"{sum(sent.values())} bytes in {len(sent)} files for the first process, 0 for the second,")
    print(f"{sum(again.values())} for one with a damaged file; the weights have {size}")


async def test_where_the_store_can_be_read_nothing_is_copied(tmp_path: Path):
    model, cache = write_model(tmp_path / "model", template=TEMPLATE), tmp_path / "node"
    async with open_registry(tmp_path / "store") as registry:
        await registry.imported(folder=str(model), alias="m")
        address = f"127.0.0.1:{registry.port}"
        assert len(await encode(address, cache, tmp_path / "log")) == 3
    assert not (tmp_path / "node" / "artifacts").is_dir()

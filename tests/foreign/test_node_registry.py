"""A model store from Node: uploads that go on, an import, a watch, downloads, planning, refusals."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from blobs import CHUNK, begun_upload, digest_of, messages, upload
from node_project import NodeProject
from registry_stubs import RegistryStubs, open_registry, write_folder

from treadle.api.registry.v1 import registry_pb2_grpc, transfer_pb2
from treadle.errors import ResourceExhausted
from treadle.rpc import RpcServer

STORES = Path(__file__).with_name("stores.js")

MAX_UPLOAD_BYTES = 24 << 20

Ask = Callable[..., Awaitable[list[Any]]]


@pytest.fixture
async def stubs(tmp_path: Path) -> AsyncIterator[RegistryStubs]:
    """A registry on an empty store, as Python asks it."""
    async with open_registry(tmp_path / "store", max_upload_bytes=MAX_UPLOAD_BYTES) as made:
        yield made


@pytest.fixture
async def ask(node: NodeProject, stubs: RegistryStubs) -> Ask:
    """What the example makes of a command, against that registry."""

    async def run(command: str, **argument: object) -> list[Any]:
        environment = {"TREADLE_ADDRESS": stubs.address}
        ran = await asyncio.to_thread(node.run, STORES, [command, json.dumps(argument)], environment)
        assert ran.returncode == 0, ran.stderr
        return ran.values

    return run


async def test_a_model_goes_up_is_named_and_comes_down(ask: Ask, tmp_path: Path):
    folder = write_folder(tmp_path / "model")
    (imported,) = await ask("importFolder", folder=str(folder), alias="node")
    artifact = imported["artifact"]
    assert artifact["facts"]["modelType"] == "llama"
    notices = await ask("watchUntil", alias="node", digest=artifact["digest"])
    assert [notice["change"] for notice in notices] == ["reset", "alias"]
    (resolved,) = await ask("call", method="ResolveModel", message={"model": "node"})
    assert resolved["artifact"]["digest"] == artifact["digest"]
    came = 0
    for file in artifact["files"]:
        path = tmp_path / "down"
        assert await ask("download", digest=file["digest"], path=str(path)) == [True]
        assert f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" == file["digest"]
        came += path.stat().st_size
    assert came == sum(file["bytes"] for file in artifact["files"]) > 0
    (again,) = await ask("upload", path=str(folder / "model.safetensors"))
    assert again["sent"] == 0, "what the store has is not sent again"
    print(f"{came} bytes of {len(artifact['files'])} files came down as they are")


async def test_an_upload_goes_on_where_it_was(
    ask: Ask, stubs: RegistryStubs, tmp_path: Path, rng: random.Random
):
    content = rng.randbytes(9 * CHUNK + rng.randrange(CHUNK))
    (path := tmp_path / "file").write_bytes(content)
    begun = await upload(stubs, messages(content)[:5])
    assert begun == 4 * CHUNK
    (sent,) = await ask("upload", path=str(path))
    assert sent == {"digest": digest_of(content), "sent": len(content) - begun}
    there = await stubs.call("GetUpload", digest=sent["digest"])
    assert (there.committed_bytes, there.complete) == (len(content), True)
    print(f"{begun} of {len(content)} bytes were there, {sent['sent']} were sent")


async def test_a_refused_upload_hears_why(ask: Ask, stubs: RegistryStubs, tmp_path: Path, rng: random.Random):
    """Each of several large files, which a client that sent at once would be in the middle of."""
    heard = 0
    for number in range(3):
        (path := tmp_path / f"large-{number}").write_bytes(rng.randbytes(MAX_UPLOAD_BYTES + 1))
        (refused,) = await ask("upload", path=str(path))
        error = refused["error"]
        assert (error["code"], error["reason"]) == ("RESOURCE_EXHAUSTED", "UPLOADS_FULL")
        assert str(MAX_UPLOAD_BYTES) in error["message"]
        heard += 1
    assert not [file for file in (stubs.store / "uploads").iterdir() if file.stat().st_size]
    content = rng.randbytes(3 * CHUNK)
    (path := tmp_path / "busy").write_bytes(content)
    call = await begun_upload(stubs, content)
    assert await call.initial_metadata()
    (refused,) = await ask("upload", path=str(path))
    assert refused["error"]["reason"] == "TRANSFER_IN_PROGRESS"
    for message in messages(content)[2:]:
        await call.write(message)
    await call.done_writing()
    assert (await call).committed_bytes == len(content)
    assert await ask("upload", path=str(path)) == [{"digest": digest_of(content), "sent": 0}]
    print(f"{heard + 1} refusals were heard")


class Refusing(registry_pb2_grpc.RegistryServiceServicer):
    """Takes the first message of an upload, listens for more, and refuses."""

    def __init__(self) -> None:
        self.first = self.early = 0

    async def GetUpload(self, request: object, context: object) -> transfer_pb2.GetUploadResponse:
        return transfer_pb2.GetUploadResponse()

    async def UploadBlob(self, requests: AsyncIterator[Any], context: object) -> None:
        self.first += (await anext(requests)).digest.startswith("sha256:")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                async for _ in requests:
                    self.early += 1
        raise ResourceExhausted("no more of that", reason="UPLOADS_FULL")


async def test_nothing_is_sent_before_it_is_wanted(node: NodeProject, tmp_path: Path):
    (path := tmp_path / "file").write_bytes(bytes(8 * CHUNK))
    server, refusing = RpcServer("127.0.0.1:0"), Refusing()
    server.add(
        registry_pb2_grpc.add_RegistryServiceServicer_to_server,
        refusing,
        "treadle.api.registry.v1.RegistryService",
    )
    async with server.running(grace_s=0.1):
        environment = {"TREADLE_ADDRESS": f"127.0.0.1:{server.port}"}
        arguments = ["upload", json.dumps({"path": str(path)})]
        ran = await asyncio.to_thread(node.run, STORES, arguments, environment)
    (refused,) = ran.values
    print(f"{refusing.first} upload began, {refusing.early} messages came before an answer")
    assert (refusing.first, refusing.early) == (1, 0)
    assert (refused["error"]["code"], refused["error"]["reason"]) == ("RESOURCE_EXHAUSTED", "UPLOADS_FULL")


async def test_a_plan_and_an_estimate(ask: Ask, tmp_path: Path):
    await ask("importFolder", folder=str(write_folder(tmp_path / "model")), alias="node")
    (estimate,) = await ask("call", method="EstimateMemory", message={"model": "node", "contextLength": 128})
    assert estimate["totalBytes"] >= estimate["weightBytes"] + estimate["cacheBytes"] > 0
    message = {"model": "node", "freeMemory": {"0": 1 << 30, "cpu": 1 << 30}}
    (plan,) = await ask("call", method="PlanDeviceMap", message=message)
    assert plan["deviceMap"] == {"": "0"}


async def test_refusals_have_a_reason_and_a_field(ask: Ask, tmp_path: Path):
    hub = {"hub": {"repository": "../../etc", "revision": "main"}}
    (refused,) = await ask("call", method="ImportModel", message=hub)
    assert (refused["error"]["code"], refused["error"]["fields"]) == ("INVALID_ARGUMENT", ["hub.repository"])
    message = {"name": "node", "artifactDigest": "sha256:" + "0" * 64}
    (unknown,) = await ask("call", method="SetAlias", message=message)
    assert (unknown["error"]["code"], unknown["error"]["reason"]) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    (absent,) = await ask("download", digest="sha256:" + "0" * 64, path=str(tmp_path / "none"))
    assert absent["error"]["code"] == "NOT_FOUND"

"""The client in Node where ports ask who calls: TLS, client certificates, keys; and when to try again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
from node_project import NodeProject

from treadle.api.inference.v1 import inference_pb2, inference_pb2_grpc
from treadle.errors import ResourceExhausted
from treadle.rpc import RpcServer
from treadle.security import Role, ServerSecurity
from treadle.security.key_file import KeyFile, add_key
from treadle.security.keys import new_key
from treadle.security.server_security import ServerTls

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
ASKS = Path(__file__).with_name("asks.js")


class FullGateway(inference_pb2_grpc.InferenceServiceServicer):
    """Says what it serves, and that it is full."""

    async def ListModels(self, request, context):
        return inference_pb2.ListModelsResponse(models=[{"model": "toy"}])

    async def Generate(self, request, context):
        raise ResourceExhausted("the lane is full", reason="LANE_FULL", retry_after_s=1.25)


@dataclass(frozen=True)
class Guarded:
    address: str
    key: str
    ask: Callable[..., Any]
    """`await ask("models", TREADLE_API_KEY=…)`: what the client in Node is told."""


@pytest.fixture(params=["mutual TLS", "plain"])
async def guarded(request, node: NodeProject, tmp_path: Path) -> AsyncIterator[Guarded]:
    key, record = new_key("node", [Role.INFER])
    add_key(tmp_path / "keys.json", record)
    tls, files = None, {}
    if request.param == "mutual TLS":
        ca = trustme.CA()
        issued = ca.issue_cert("127.0.0.1")
        names = {name: tmp_path / f"{name}.pem" for name in ("CA", "CERTIFICATE", "PRIVATE_KEY")}
        ca.cert_pem.write_to_path(names["CA"])
        names["CERTIFICATE"].write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(names["PRIVATE_KEY"])
        tls = ServerTls(names["CERTIFICATE"], names["PRIVATE_KEY"], names["CA"])
        files = {f"TREADLE_TLS_{name}": str(path) for name, path in names.items()}
    security = ServerSecurity(tls=tls, keys=KeyFile.read(tmp_path / "keys.json"))
    server = RpcServer("127.0.0.1:0", security=security)
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, FullGateway(), SERVICE)
    async with server.running(0):

        async def ask(command: str, argument: object = None, **environment: str) -> Any:
            settings = {"TREADLE_ADDRESS": f"127.0.0.1:{server.port}"} | files | environment
            shown = {name: value for name, value in settings.items() if value}
            arguments = [command, json.dumps(argument or {})]
            ran = await asyncio.to_thread(node.run, ASKS, arguments, shown)
            assert ran.returncode == 0, ran.stderr
            (said,) = ran.values
            return said

        yield Guarded(f"127.0.0.1:{server.port}", key, ask)


async def test_a_key_opens_and_its_lack_is_told(guarded: Guarded, tmp_path: Path):
    assert [model["model"] for model in await guarded.ask("models", TREADLE_API_KEY=guarded.key)] == ["toy"]
    (tmp_path / "client.key").write_text(guarded.key + "\n")
    assert await guarded.ask("models", TREADLE_API_KEY_FILE=str(tmp_path / "client.key"))
    refused = [await guarded.ask("models"), await guarded.ask("models", TREADLE_API_KEY="trd_node_wrong")]
    assert [(said["error"]["code"], said["error"]["reason"]) for said in refused] == [
        ("UNAUTHENTICATED", "KEY_MISSING"),
        ("UNAUTHENTICATED", "KEY_INVALID"),
    ]


async def test_when_to_try_again(guarded: Guarded):
    said = await guarded.ask("generate", {"generation": {}}, TREADLE_API_KEY=guarded.key)
    error = said["error"]
    assert (error["code"], error["reason"], error["retryAfterMs"]) == (
        "RESOURCE_EXHAUSTED",
        "LANE_FULL",
        1250,
    )


@pytest.mark.parametrize("guarded", ["mutual TLS"], indirect=True)
@pytest.mark.parametrize("missing", ["TREADLE_TLS_CA", "TREADLE_TLS_CERTIFICATE"])
async def test_without_its_files_no_connection_is_made(guarded: Guarded, missing: str):
    without = {missing: ""} | ({"TREADLE_TLS_PRIVATE_KEY": ""} if missing.endswith("CERTIFICATE") else {})
    said = await guarded.ask("models", TREADLE_API_KEY=guarded.key, **without)
    assert said["error"]["code"] == "UNAVAILABLE"
    assert not said["error"]["fromSuite"]

"""The suite with mutual TLS and keys: who may call what, on every port, and what a run leaves behind."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import trustme
from google.longrunning import operations_proto_pb2
from running_suite import Suite, running_suite
from waiting import until

from treadle.api.inference.v1 import inference_pb2, inference_pb2_grpc
from treadle.api.registry.v1 import registry_pb2
from treadle.api.tokenizer.v1 import tokenizer_pb2
from treadle.api.training.v1 import training_pb2
from treadle.api.worker.v1 import worker_pb2
from treadle.client import AsyncClient, Credentials
from treadle.errors import NotFound, PermissionDenied
from treadle.rpc import from_rpc_error, from_status, open_channel
from treadle.security import Role
from treadle.security.key_file import add_key, revoke_key
from treadle.security.keys import new_key
from treadle.security.permissions import allowed_roles

PORTS = {
    "gateway": [inference_pb2.DESCRIPTOR],
    "registry": [registry_pb2.DESCRIPTOR, operations_proto_pb2.DESCRIPTOR],
    "tokenizer": [tokenizer_pb2.DESCRIPTOR],
    "trainer": [training_pb2.DESCRIPTOR],
    "worker": [worker_pb2.DESCRIPTOR],
}


@dataclass(frozen=True)
class Guarded:
    suite: Suite
    keys: dict[str, str]
    """Each key's text, by its name."""
    credentials: Credentials
    """The certificates, without a key."""
    folder: Path
    """Of the certificates."""

    def shows(self, key: str) -> Credentials:
        return dataclasses.replace(self.credentials, api_key=self.keys.get(key, key))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("secrets")
    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1", "localhost")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(folder / "cert.key")
    keys = {}
    for name, roles, tenants, expires in (
        ("suite", [Role.ADMIN], None, None),
        ("infer", [Role.INFER], None, None),
        ("train", [Role.TRAIN], None, None),
        ("serve", [Role.SERVE], None, None),
        ("monitor", [Role.MONITOR], None, None),
        ("shop", [Role.INFER], ["shop"], None),
        ("lab", [Role.INFER], ["lab"], None),
        ("expired", [Role.ADMIN], None, datetime.now(UTC) - timedelta(seconds=1)),
    ):
        keys[name], record = new_key(name, roles, tenants=tenants, expires_at=expires)
        add_key(folder / "keys.json", record)
    (folder / "suite.key").write_text(keys["suite"] + "\n")
    environment = {
        "TREADLE_TLS_CERTIFICATE": str(folder / "cert.pem"),
        "TREADLE_TLS_PRIVATE_KEY": str(folder / "cert.key"),
        "TREADLE_TLS_CLIENT_CA": str(folder / "ca.pem"),
        "TREADLE_TLS_CA": str(folder / "ca.pem"),
        "TREADLE_KEYS_FILE": str(folder / "keys.json"),
        "TREADLE_API_KEY_FILE": str(folder / "suite.key"),
    }
    credentials = Credentials.from_files(
        ca=folder / "ca.pem", certificate=folder / "cert.pem", private_key=folder / "cert.key"
    )
    with running_suite(tmp_path_factory.mktemp("home"), "--port", "0", environment=environment) as suite:
        yield Guarded(suite, keys, credentials, folder)


async def called(
    channel: grpc.aio.Channel, method: object, path: str, *, refused: bool = True
) -> grpc.StatusCode:
    """The status of a call with an empty message; a stream of messages is left empty where it is refused.

    To grpc.aio's client the end of a call that it still writes to is INTERNAL, whatever the server said.
    """
    kind = (
        f"{'stream' if method.client_streaming else 'unary'}_"
        f"{'stream' if method.server_streaming else 'unary'}"
    )
    call = getattr(channel, kind)(path)
    try:
        if method.client_streaming and refused:
            return await call(timeout=10).code()
        answer = call(iter([b""]) if method.client_streaming else b"", timeout=10)
        if method.server_streaming:
            async for _ in answer:
                break
        else:
            await answer
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("port", PORTS)
async def test_each_method_without_with_a_wrong_an_expired_and_a_foreign_key(guarded, port):
    address = guarded.suite.addresses[port]
    refused = 0
    methods = [
        (method, f"/{service.full_name}/{method.name}")
        for file in PORTS[port]
        for service in file.services_by_name.values()
        for method in service.methods
    ]
    assert methods
    for key in ("", "trd_infer_" + "0" * 64, "expired"):
        async with open_channel(address, guarded.shows(key)) as channel:
            for method, path in methods:
                assert await called(channel, method, path) == grpc.StatusCode.UNAUTHENTICATED, (key, path)
                refused += 1
    for role in ("infer", "train", "serve", "monitor"):
        async with open_channel(address, guarded.shows(role)) as channel:
            for method, path in methods:
                if Role(role) in allowed_roles(path):
                    continue
                assert await called(channel, method, path) == grpc.StatusCode.PERMISSION_DENIED, (role, path)
                refused += 1
    async with open_channel(address, guarded.shows("suite")) as channel:
        for method, path in methods:
            if method.name not in ("Drain", "WatchJob", "WatchModels"):
                status = await called(channel, method, path, refused=False)
                assert status not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED), (
                    path
                )
    assert refused >= 4 * len(methods)
    print(f"{port}: {len(methods)} methods, {refused} refusals")


@pytest.mark.parametrize("port", PORTS)
async def test_each_port_asks_for_tls_and_a_certificate(guarded, port):
    with_roots = Credentials(guarded.keys["suite"], tls=True, ca=guarded.credentials.ca)
    for credentials in (Credentials(guarded.keys["suite"]), with_roots):
        async with open_channel(guarded.suite.addresses[port], credentials) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await check(b"", timeout=10)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    async with open_channel(guarded.suite.addresses[port], guarded.credentials) as channel:
        assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10) == b"\x08\x01"


async def test_a_request_belongs_to_its_tenant(guarded):
    address = guarded.suite.addresses["gateway"]
    async with (
        AsyncClient(address, model="smollm2", credentials=guarded.shows("shop")) as shop,
        AsyncClient(address, model="smollm2", credentials=guarded.shows("lab")) as lab,
    ):
        stream = shop.stream(
            "The loom was", max_new_tokens=8, temperature=0.0, request_id="mine", detach=True
        )
        async for _ in stream:
            pass
        assert stream.answer.text
        again = shop.attach("mine")
        async for _ in again:
            pass
        assert again.answer.text == stream.answer.text
        with pytest.raises(NotFound):
            await anext(lab.attach("mine"))
        denied = 0
        for attempt in (
            lambda: anext(lab.attach("mine", tenant="shop")),
            lambda: lab.cancel("mine", tenant="shop"),
            lambda: lab.generate("x", tenant="shop", max_new_tokens=1),
            lambda: anext(lab.stream("x", tenant="default", max_new_tokens=1)),
        ):
            with pytest.raises(PermissionDenied) as refused:
                await attempt()
            assert refused.value.reason == "TENANT_FOREIGN"
            assert refused.value.fields[0].field.endswith("tenant")
            denied += 1
        assert denied == 4


async def test_one_foreign_item_of_a_batch_fails_alone(guarded):
    async with open_channel(guarded.suite.addresses["gateway"], guarded.shows("shop")) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        def item(tenant: str) -> inference_pb2.BatchGenerateRequest:
            request = inference_pb2.BatchGenerateRequest()
            request.generation.model, request.generation.text = "smollm2", "The loom was"
            request.generation.tenant, request.generation.stopping.max_new_tokens = tenant, 2
            return request

        items = [item(""), item("lab"), item("shop")]
        outcomes = {answer.index: answer async for answer in stub.BatchGenerate(iter(items), timeout=60)}
    assert [outcomes[index].WhichOneof("outcome") for index in range(3)] == ["response", "error", "response"]
    assert from_status(outcomes[1].error).reason == "TENANT_FOREIGN"


async def test_an_error_never_shows_the_key(guarded):
    async with open_channel(guarded.suite.addresses["gateway"], guarded.shows("expired")) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await inference_pb2_grpc.InferenceServiceStub(channel).ListModels(
                inference_pb2.ListModelsRequest(), timeout=10
            )
    failure = from_rpc_error(error.value)
    assert failure.reason == "KEY_EXPIRED"
    assert guarded.keys["expired"] not in str(error.value)


def test_the_command_shows_its_key_and_certificate(guarded):
    folder = guarded.folder
    environment = os.environ | {
        "TREADLE_HOME": str(guarded.suite.home),
        "TREADLE_TLS_CERTIFICATE": str(folder / "cert.pem"),
        "TREADLE_TLS_PRIVATE_KEY": str(folder / "cert.key"),
        "TREADLE_TLS_CA": str(folder / "ca.pem"),
    }
    command = [
        str(Path(sys.executable).parent / "treadle"),
        "generate",
        "The loom was",
        "--max-new-tokens",
        "2",
    ]
    with_key = subprocess.run(
        command,
        env=environment | {"TREADLE_API_KEY": guarded.keys["shop"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert with_key.returncode == 0, with_key.stderr
    without = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert without.returncode == 1
    assert "KEY_MISSING" in without.stderr


def test_no_key_stands_in_what_the_run_wrote(guarded):
    read = 0
    needles = [key.encode() for key in guarded.keys.values()]
    for path in guarded.suite.home.rglob("*"):
        if path.is_file() and path.stat().st_size < 50_000_000:
            content = path.read_bytes()
            assert not any(needle in content for needle in needles), path
            read += 1
    assert read > 8
    print(f"{read} files read")


async def test_every_metrics_port_takes_new_and_revoked_keys_up(guarded):
    """The keys of both of a service's ports are the same, and read again."""
    keys_file = guarded.folder / "keys.json"
    context = ssl.create_default_context(cafile=guarded.folder / "ca.pem")
    context.load_cert_chain(guarded.folder / "cert.pem", guarded.folder / "cert.key")
    targets = json.loads((guarded.suite.home / "run" / "metrics-targets.json").read_text())
    key, record = new_key("latecomer", [Role.MONITOR])

    def scrape(address: str) -> int:
        asked = urllib.request.Request(
            f"https://{address}/metrics", headers={"Authorization": f"Bearer {key}"}
        )
        try:
            with urllib.request.urlopen(asked, timeout=10, context=context) as answer:
                return answer.status
        except urllib.error.HTTPError as refused:
            return refused.code

    async def until_all(status: int) -> None:
        for target in targets:
            (address,) = target["targets"]

            async def says(address=address) -> bool:
                return await asyncio.to_thread(scrape, address) == status

            await until(says, f"{target['labels']['service']} answers {status}")

    await until_all(401)
    add_key(keys_file, record)
    await until_all(200)
    revoke_key(keys_file, "latecomer")
    await until_all(401)
    print(f"{len(targets)} metrics ports took a new key up, and its end")

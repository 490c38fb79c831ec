"""A server's port with TLS, mutual TLS and keys, called rightly and wrongly."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from treadle.errors import FailedPrecondition, Unauthenticated
from treadle.rpc import RpcServer, from_rpc_error, open_channel
from treadle.security import Credentials, Role, ServerSecurity
from treadle.security.key_file import KeyFile, add_key, revoke_key
from treadle.security.keys import new_key
from treadle.security.server_security import ServerTls


@dataclass(frozen=True)
class Identity:
    certificate: Path
    private_key: Path


@dataclass(frozen=True)
class Authority:
    ca: trustme.CA
    folder: Path

    @property
    def pem(self) -> Path:
        path = self.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(path)
        return path

    def issue(self, name: str) -> Identity:
        issued = self.ca.issue_cert(name, "127.0.0.1")
        certificate, private_key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(private_key)
        return Identity(certificate, private_key)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(trustme.CA(), tmp_path)


async def check(address: str, credentials: Credentials | None = None) -> bool:
    async with open_channel(address, credentials) as channel:
        response = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="liveness"), timeout=5
        )
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def services(address: str, credentials: Credentials) -> list[str]:
    """What reflection lists: it asks for a key, unlike health."""
    async with open_channel(address, credentials) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        try:
            async for answer in stub.ServerReflectionInfo(iter([question]), timeout=5):
                return [service.name for service in answer.list_services_response.service]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    return []


async def refused(address: str, credentials: Credentials | None) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await check(address, credentials)
    return error.value.code()


def of(identity: Identity, client_ca: Path | None = None) -> ServerSecurity:
    return ServerSecurity(tls=ServerTls(identity.certificate, identity.private_key, client_ca))


async def test_tls(authority, tmp_path):
    stranger = Authority(trustme.CA(), tmp_path / "stranger")
    stranger.folder.mkdir()
    server = RpcServer("127.0.0.1:0", security=of(authority.issue("server")))
    async with server.running(grace_s=0.1):
        address = f"127.0.0.1:{server.port}"
        assert await check(address, Credentials.from_files(ca=authority.pem))
        refusals = [
            await refused(address, None),
            await refused(address, Credentials.from_files(ca=stranger.pem)),
            await refused(address, Credentials(tls=True)),
        ]
        assert refusals == [grpc.StatusCode.UNAVAILABLE] * 3


async def test_mutual_tls(authority, tmp_path):
    stranger = Authority(trustme.CA(), tmp_path / "stranger")
    stranger.folder.mkdir()
    server = RpcServer("127.0.0.1:0", security=of(authority.issue("server"), authority.pem))
    async with server.running(grace_s=0.1):
        address = f"127.0.0.1:{server.port}"

        def caller(identity: Identity) -> Credentials:
            return Credentials.from_files(
                ca=authority.pem, certificate=identity.certificate, private_key=identity.private_key
            )

        assert await check(address, caller(authority.issue("client")))
        assert await refused(address, Credentials.from_files(ca=authority.pem)) == grpc.StatusCode.UNAVAILABLE
        assert await refused(address, caller(stranger.issue("client"))) == grpc.StatusCode.UNAVAILABLE


async def test_a_renewed_certificate_is_taken_up_without_a_restart(authority, tmp_path):
    identity = authority.issue("server")
    server = RpcServer("127.0.0.1:0", security=of(identity))
    async with server.running(grace_s=0.1):
        address = f"127.0.0.1:{server.port}"
        old_roots = Credentials.from_files(ca=authority.pem)
        assert await check(address, old_roots)
        renewed = Authority(trustme.CA(), tmp_path / "renewed")
        renewed.folder.mkdir()
        other = renewed.issue("server")
        # Half a renewal: the pair does not fit, and the old one goes on.
        identity.certificate.write_bytes(other.certificate.read_bytes())
        assert await check(address, old_roots)
        identity.private_key.write_bytes(other.private_key.read_bytes())
        assert await check(address, Credentials.from_files(ca=renewed.pem))
        assert await refused(address, old_roots) == grpc.StatusCode.UNAVAILABLE


async def test_a_pair_that_does_not_fit_is_refused_at_the_start(authority):
    one, other = authority.issue("one"), authority.issue("other")
    server = RpcServer(
        "127.0.0.1:0", security=ServerSecurity(tls=ServerTls(one.certificate, other.private_key))
    )
    with pytest.raises(FailedPrecondition) as error:
        await server.start()
    assert error.value.reason == "TLS_UNUSABLE"


@pytest.mark.parametrize("encrypted", [True, False])
async def test_keys_are_taken_up_and_revoked_while_the_server_runs(authority, tmp_path, encrypted):
    path = tmp_path / "keys.json"
    first, record = new_key("first", [Role.MONITOR])
    add_key(path, record)
    identity = authority.issue("server")
    tls = ServerTls(identity.certificate, identity.private_key) if encrypted else None
    server = RpcServer("127.0.0.1:0", security=ServerSecurity(tls=tls, keys=KeyFile.read(path)))
    ca = authority.pem if encrypted else None
    async with server.running(grace_s=0.1):
        address = f"127.0.0.1:{server.port}"
        assert await check(address, Credentials.from_files(ca=ca)), "a probe has no key"
        listed = await services(address, Credentials.from_files(ca=ca, api_key=first))
        assert "grpc.health.v1.Health" in listed
        reasons = []
        second, record = new_key("second", [Role.INFER])
        for shown in ("", second):
            with pytest.raises(Unauthenticated) as error:
                await services(address, Credentials.from_files(ca=ca, api_key=shown))
            reasons.append(error.value.reason)
        assert reasons == ["KEY_MISSING", "KEY_INVALID"]
        add_key(path, record)
        revoke_key(path, "first")
        while True:
            try:
                assert await services(address, Credentials.from_files(ca=ca, api_key=second))
                break
            except Unauthenticated:
                await asyncio.sleep(0.1)
        with pytest.raises(Unauthenticated) as error:
            await services(address, Credentials.from_files(ca=ca, api_key=first))
        assert error.value.reason == "KEY_INVALID"


async def test_an_open_port_beyond_loopback_is_not_opened():
    with pytest.raises(FailedPrecondition) as error:
        await RpcServer("0.0.0.0:0").start()
    assert error.value.reason == "OPEN_TO_STRANGERS"


async def test_nothing_of_a_strangers_message_is_parsed(tmp_path):
    path = tmp_path / "keys.json"
    key, record = new_key("any", [Role.ADMIN])
    add_key(path, record)
    parsed = []

    async def echo(request: bytes, context: object) -> bytes:
        return request

    def deserialize(data: bytes) -> bytes:
        parsed.append(len(data))
        return data

    method = grpc.unary_unary_rpc_method_handler(echo, request_deserializer=deserialize)

    def add(servicer: object, server: grpc.aio.Server) -> None:
        server.add_registered_method_handlers("test.Echo", {"Echo": method})

    server = RpcServer("127.0.0.1:0", security=ServerSecurity(keys=KeyFile.read(path)))
    server.add(add, object(), "test.Echo")
    async with server.running(grace_s=0.1):
        statuses = []
        for shown in ("", key):
            async with open_channel(f"127.0.0.1:{server.port}", Credentials(api_key=shown)) as channel:
                try:
                    await channel.unary_unary("/test.Echo/Echo")(b"x" * 1000, timeout=5)
                    statuses.append("OK")
                except grpc.aio.AioRpcError as error:
                    statuses.append(error.code().name)
    assert statuses == ["UNAUTHENTICATED", "OK"]
    assert parsed == [1000]

"""Where a server may bind, and what its configuration must say."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from treadle.api.inference.v1 import inference_pb2
from treadle.api.registry.v1 import registry_pb2
from treadle.api.tokenizer.v1 import tokenizer_pb2
from treadle.api.training.v1 import training_pb2
from treadle.api.worker.v1 import worker_pb2
from treadle.errors import FailedPrecondition, PermissionDenied, Unauthenticated
from treadle.security import Role, ServerSecurity, TransportConfig
from treadle.security.key_file import KeyFile, add_key
from treadle.security.keys import new_key
from treadle.security.permissions import allowed_roles
from treadle.security.server_security import ServerTls

LOOPBACK = ["127.0.0.1:1", "127.8.9.1:0", "localhost:5", "[::1]:50051", "unix:/run/treadle.sock"]
ANYWHERE = [
    "0.0.0.0:50051",
    "[::]:50051",
    "10.0.0.1:1",
    "example.org:443",
    "localhost.example.org:1",
    ":1",
    "x",
]


@pytest.mark.parametrize("address", LOOPBACK)
def test_loopback_needs_no_guard(address):
    ServerSecurity().check_address(address)


@pytest.mark.parametrize("address", ANYWHERE)
def test_beyond_loopback_somebody_must_ask_who_calls(address, tmp_path):
    with pytest.raises(FailedPrecondition, match="TREADLE_KEYS_FILE") as refused:
        ServerSecurity().check_address(address)
    assert refused.value.reason == "OPEN_TO_STRANGERS"
    pem = Path("x.pem")
    with pytest.raises(FailedPrecondition):
        ServerSecurity(tls=ServerTls(pem, pem)).check_address(address)  # encrypted, but for anybody
    for guarded in (
        ServerSecurity(tls=ServerTls(pem, pem, client_ca=pem)),
        ServerSecurity(keys=KeyFile(tmp_path / "keys.json")),
        ServerSecurity(trusted_network=True),
    ):
        guarded.check_address(address)


def test_every_method_of_the_contracts_has_roles_and_what_changes_things_is_for_admins():
    files = (inference_pb2, registry_pb2, tokenizer_pb2, training_pb2, worker_pb2)
    for_all, for_admins = [], []
    for file in files:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                roles = allowed_roles(f"/{service.full_name}/{method.name}")
                assert roles is not None, "a contract's method is called without a key"
                (for_all if roles else for_admins).append(method.name)
    assert set(for_admins) == {
        *("ImportModel", "DeleteArtifact", "SetAlias", "DeleteAlias", "SetDeployment", "DeleteDeployment"),
        *("AcquireLease", "RenewLease", "ReleaseLease", "EvictArtifacts", "VerifyArtifact", "UploadBlob"),
        *("InspectModel", "DeriveArtifact", "PromoteAlias", "RollBackAlias", "GetUpload"),
        *("LoadModel", "UnloadModel", "Drain"),
    }
    assert len(for_all) > 30
    assert allowed_roles("/a.Stranger/Method") == frozenset()
    assert allowed_roles("/grpc.health.v1.Health/Check") is None
    print(f"{len(for_all)} methods for roles, {len(for_admins)} for admins")


def test_scraping_is_for_monitors(tmp_path):
    path = tmp_path / "keys.json"
    texts = {}
    for role in Role:
        texts[role], record = new_key(role, [role])
        add_key(path, record)
    security = ServerSecurity(keys=KeyFile.read(path))
    allowed = []
    for role, text in texts.items():
        try:
            security.authorize_scrape(f"Bearer {text}")
            allowed.append(role)
        except PermissionDenied:
            pass
    assert allowed == [Role.MONITOR, Role.ADMIN]
    with pytest.raises(Unauthenticated):
        security.authorize_scrape(None)
    ServerSecurity().authorize_scrape(None)


def test_the_configuration_says_what_does_not_go_together(monkeypatch, tmp_path):
    assert TransportConfig().server() == ServerSecurity()
    refused = 0
    for variables in (
        {"TLS_CERTIFICATE": "c.pem"},
        {"TLS_PRIVATE_KEY": "k.pem"},
        {"TLS_CLIENT_CA": "ca.pem"},
        {"API_KEY": "trd_a_b", "API_KEY_FILE": "key"},
    ):
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(f"TREADLE_{name}", value)
            with pytest.raises(ValidationError):
                TransportConfig()
            refused += 1
    assert refused == 4
    for name, reason in (("KEYS_FILE", "KEYS_UNREADABLE"), ("API_KEY_FILE", "KEY_UNREADABLE")):
        with monkeypatch.context() as environment:
            environment.setenv(f"TREADLE_{name}", str(tmp_path / "nothing"))
            with pytest.raises(FailedPrecondition) as missing:
                TransportConfig().server(), TransportConfig().credentials()
            assert missing.value.reason == reason


def test_a_key_shows_in_no_repr(monkeypatch):
    monkeypatch.setenv("TREADLE_API_KEY", "trd_a_secret")
    config = TransportConfig()
    assert config.credentials().api_key == "trd_a_secret"
    assert "secret" not in repr(config).replace("SecretStr", "")
    assert "secret" not in repr(config.credentials())

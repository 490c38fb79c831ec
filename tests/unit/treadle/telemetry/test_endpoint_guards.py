"""Keys and TLS hold for the metrics port as for the others."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme

from treadle.errors import FailedPrecondition
from treadle.security import Role, ServerSecurity
from treadle.security.key_file import KeyFile, add_key
from treadle.security.keys import new_key
from treadle.security.server_security import ServerTls
from treadle.telemetry import endpoint
from treadle.telemetry.endpoint import MetricsEndpoint
from treadle.telemetry.service import running_telemetry

LOOPBACK = "127.0.0.1:0"


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """A key of each role; their hashes are in keys.json."""
    made = {}
    for role in Role:
        made[str(role)], record = new_key(role, [role])
        add_key(tmp_path / "keys.json", record)
    return made


async def test_a_scraper_shows_a_monitors_key(registry, ask, get, keys, tmp_path):
    security = ServerSecurity(keys=KeyFile.read(tmp_path / "keys.json"))
    async with MetricsEndpoint(LOOPBACK, registry, authorize=security.authorize_scrape) as served:
        found = {
            role: (await ask(served.port, get(Authorization=f"Bearer {key}"))).status
            for role, key in keys.items()
        }
        bare = await ask(served.port, get())
        wrong = [
            await ask(served.port, get(Authorization=shown))
            for shown in ("Bearer x", "Basic x", "Bearer trd_monitor_" + "0" * 64, "Bearer é", "é" * 4000)
        ]
    assert found == {"infer": 403, "train": 403, "serve": 403, "monitor": 200, "admin": 200}
    assert [answer.status for answer in (bare, *wrong)] == [401] * 6
    assert bare.headers["www-authenticate"] == "Bearer"
    assert not any(b"treadle:seen" in answer.body for answer in (bare, *wrong))
    print(f"by role: {found}; {len(wrong) + 1} times 401")


@pytest.fixture
def authority(tmp_path: Path) -> tuple[trustme.CA, ServerTls]:
    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1")
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    return ca, ServerTls(tmp_path / "server.pem", tmp_path / "server.pem", tmp_path / "ca.pem")


async def test_mutual_tls(registry, ask, get, authority, monkeypatch):
    monkeypatch.setattr(endpoint, "DEADLINE_S", 1.0)
    ca, tls = authority
    stranger, known = ssl.create_default_context(), ssl.create_default_context()
    for context in (stranger, known):
        ca.configure_trust(context)
    ca.issue_cert("scraper").configure_cert(known)
    async with MetricsEndpoint(LOOPBACK, registry, ssl_context=tls.ssl_context()) as served:
        assert (await ask(served.port, get(), known)).status == 200
        assert (await ask(served.port, get(), stranger)).status == 0
        assert (await ask(served.port, get())).status == 0, "plain text on a TLS port"
        # A handshake that stops in the middle: its connection ends, and the others are served meanwhile.
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"\x16\x03\x01\x02\x00\x01")
        assert (await ask(served.port, get(), known)).status == 200
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.transport.abort()
        for _ in range(2 * endpoint.MAX_CONNECTIONS):
            await ask(served.port, b"\x16\x03\x01garbage")
        assert (await ask(served.port, get(), known)).status == 200


async def test_strangers_are_kept_out(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    with pytest.raises(FailedPrecondition) as refused:
        async with running_telemetry("worker", "0.0.0.0:0", ServerSecurity()):
            pass
    assert refused.value.reason == "OPEN_TO_STRANGERS"
    async with running_telemetry("worker", "0.0.0.0:0", ServerSecurity(trusted_network=True)):
        pass

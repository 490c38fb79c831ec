"""The look that a container's health check takes, as the process that it is."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import trustme

from treadle.rpc import RpcServer
from treadle.security import ServerSecurity
from treadle.security.server_security import ServerTls


async def look(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """The exit code, and all that was printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "treadle.health", *arguments),
        env=os.environ | (environment or {}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_readiness_and_liveness_are_told_apart():
    server = RpcServer("127.0.0.1:0")
    async with server.running():
        address = f"127.0.0.1:{server.port}"
        assert await look(address) == (1, f"{address}: NOT_SERVING\n")
        assert await look(address, "--service", "liveness") == (0, f"{address}: SERVING\n")
        await server.set_ready(True)
        assert await look(address) == (0, f"{address}: SERVING\n")
        assert (await look(address, "--service", "none"))[0] == 1
    code, output = await look(address)
    assert code == 1
    assert "UNAVAILABLE" in output


async def test_a_port_with_mutual_tls_is_asked_with_the_services_own_identity(tmp_path: Path):
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    ca, certificate, key = (tmp_path / name for name in ("ca.pem", "service.pem", "service.key"))
    authority.cert_pem.write_to_path(ca)
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    server = RpcServer("127.0.0.1:0", security=ServerSecurity(tls=ServerTls(certificate, key, ca)))
    settings = {
        "TREADLE_TLS_CERTIFICATE": str(certificate),
        "TREADLE_TLS_PRIVATE_KEY": str(key),
        "TREADLE_TLS_CLIENT_CA": str(ca),
        "TREADLE_TLS_CA": str(ca),
    }
    async with server.running():
        await server.set_ready(True)
        address = f"127.0.0.1:{server.port}"
        assert await look(address, environment=settings) == (0, f"{address}: SERVING\n")
        assert (await look(address))[0] == 1
        code, output = await look(address, environment=settings | {"TREADLE_TLS_CA": str(tmp_path / "none")})
        assert code == 1
        assert "none" in output
        assert "Traceback" not in output


async def test_a_look_in_plain_text_imports_grpc_and_little_more():
    code = (
        "import sys, treadle.health.__main__;"
        "print([name for name in ('pydantic', 'treadle.rpc', 'rich', 'torch') if name in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.decode() == "[]\n"

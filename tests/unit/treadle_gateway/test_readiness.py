"""Readiness: all that is needed, and the registry only once."""

from __future__ import annotations

import asyncio
import contextlib

from treadle_gateway import readiness
from treadle_gateway.readiness import Readiness


async def test_the_registry_is_needed_once(monkeypatch):
    there = {"redis": True, "registry": False, "tokenizer": True}

    def check(name: str):
        async def answer() -> bool:
            return there[name]

        return answer

    ready = Readiness(check("redis"), check("registry"), check("tokenizer"))
    assert not await ready.look()
    there["registry"] = True
    assert await ready.look()
    there["registry"] = False
    assert await ready.look()
    for name in ("redis", "tokenizer"):
        there[name] = False
        assert not await ready.look()
        there[name] = True

    said: list[bool] = []
    monkeypatch.setattr(readiness, "READY_EVERY_S", 0.001)
    monkeypatch.setattr(readiness, "NOT_READY_EVERY_S", 0.001)

    async def set_ready(value: bool) -> None:
        said.append(value)

    keeping = asyncio.create_task(ready.keep(set_ready))
    for value in (True, False, True):
        there["redis"] = value
        await asyncio.sleep(0.05)
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping
    assert said == [True, False, True]

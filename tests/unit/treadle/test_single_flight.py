"""One call a key, whoever waits for it and however it ends."""

from __future__ import annotations

import asyncio

import pytest

from treadle.errors import Unavailable
from treadle.models.remembered import RememberedNames
from treadle.single_flight import SingleFlight


async def test_those_who_ask_at_once_share_a_call_and_its_error():
    flights: SingleFlight[str, int] = SingleFlight()

    async def fails() -> int:
        await asyncio.sleep(0)
        raise Unavailable("away")

    results = await asyncio.gather(*(flights.run("key", fails) for _ in range(5)), return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 5
    assert flights.num_started == 1

    async def one() -> int:
        return 1

    assert await flights.run("key", one) == 1
    assert flights.num_started == 2


async def test_a_forgotten_name_is_not_answered_from_memory():
    answers: list[object] = ["first", Unavailable("away"), Unavailable("away")]

    async def ask(name: str) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    names: RememberedNames[object] = RememberedNames(ask, fresh_s=0.0, max_names=2)
    assert [await names.get("tiny") for _ in range(2)] == ["first", "first"]
    names.forget("tiny")
    with pytest.raises(Unavailable):
        await names.get("tiny")
    assert not answers

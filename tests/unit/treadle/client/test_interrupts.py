"""Ctrl-C in the client without an event loop: it may come at any instruction."""

from __future__ import annotations

import asyncio

import pytest

from treadle.client.loop_thread import LoopThread


class Interrupted:
    """A loop that is interrupted before, or after, it was told the first thing."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, told: bool) -> None:
        self._loop, self._told, self._times = loop, told, 0

    def __getattr__(self, name: str):
        return getattr(self._loop, name)

    def call_soon_threadsafe(self, callback, *args):
        self._times += 1
        if self._times > 1:
            return self._loop.call_soon_threadsafe(callback, *args)
        if self._told:
            self._loop.call_soon_threadsafe(callback, *args)
        raise KeyboardInterrupt


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_what_was_interrupted_has_unwound_before_the_next_call(told):
    for _ in range(50):
        thread = LoopThread()

        async def numbers():
            while True:
                await asyncio.sleep(10)
                yield 1

        generator = numbers()

        async def step(generator=generator):
            return await anext(generator)

        thread._loop = Interrupted(thread._loop, told=told)
        with pytest.raises(KeyboardInterrupt):
            thread.run(step())
        thread.run(generator.aclose())  # RuntimeError where it still ran
        thread.close()


def test_an_outcome_and_an_error_come_through():
    thread = LoopThread()

    async def outcome(value):
        await asyncio.sleep(0)
        if value is None:
            raise ValueError("none")
        return value

    assert thread.run(outcome(7)) == 7
    with pytest.raises(ValueError, match="none"):
        thread.run(outcome(None))
    thread.close()

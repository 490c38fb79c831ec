"""Asks for the leases of deployments that nobody named here, while there is room for more models."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from treadle_worker.models.wanted import Claim

LOOK_EVERY_S = 1.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 15.0
"""Between two tries for one claim: so late is it noticed that another worker has died."""


class TakingUp:
    """`run` is a task."""

    def __init__(
        self, candidates: Callable[[], list[Claim]], ask: Callable[[Claim], Awaitable[bool]]
    ) -> None:
        """`ask` asks the registry for a claim, and says whether it is this worker's now."""
        self._candidates = candidates
        self._ask = ask
        self._pauses: dict[Claim, tuple[float, float]] = {}
        """Of claims that were refused: when to ask again, and the pause after that."""
        self._woken = asyncio.Event()

    def wake(self, alias: str = "") -> None:
        """What is wanted of an alias (empty: of any) has changed: it is asked for at once."""
        self._pauses = {} if not alias else {c: p for c, p in self._pauses.items() if c.name != alias}
        self._woken.set()

    async def run(self) -> None:
        """Takes up what it can, for ever."""
        while True:
            self._woken.clear()
            while await self._take_one():
                pass
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def _take_one(self) -> bool:
        """Tries each candidate that is due, until one is granted."""
        loop = asyncio.get_running_loop()
        candidates = self._candidates()
        self._pauses = {claim: pause for claim, pause in self._pauses.items() if claim in candidates}
        # Workers that hear of a deployment at once would all ask for the same one first.
        for claim in random.sample(candidates, len(candidates)):
            due, pause_s = self._pauses.get(claim, (0.0, _FIRST_PAUSE_S))
            if loop.time() < due:
                continue
            if await self._ask(claim):
                return True
            again_s = pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads, keeps no secret
            self._pauses[claim] = loop.time() + again_s, min(2 * pause_s, _LONGEST_PAUSE_S)
        return False

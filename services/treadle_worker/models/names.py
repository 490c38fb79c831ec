"""The models that the settings name, and what they mean until the registry's watch says it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from treadle.deployments import ModelWatch
from treadle.errors import NotFound, TreadleError
from treadle_worker.jobs import Artifact
from treadle_worker.models.registry import Registry
from treadle_worker.models.wanted import is_digest

logger = logging.getLogger(__name__)

_WATCH_FIRST_S = 5.0
"""How long the watch may take to say something, before the names are asked for one by one."""
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0


class NamedModels:
    """`run` is a task."""

    def __init__(
        self, names: Iterable[str], watch: ModelWatch, registry: Registry, changed: Callable[[], None]
    ) -> None:
        self.names = list(names)
        self.resolved: dict[str, Artifact] = {}
        """Aliases to what they meant when the registry was asked."""
        self._watch = watch
        self._registry = registry
        self._changed = changed

    @property
    def meanings(self) -> dict[str, str]:
        """`resolved` as digests."""
        return {name: artifact.digest for name, artifact in self.resolved.items()}

    def artifact(self, digest: str) -> Artifact | None:
        """One that the registry has answered with."""
        return next((one for one in self.resolved.values() if one.digest == digest), None)

    async def run(self) -> None:
        """Asks for the names until the watch knows them."""
        try:
            async with asyncio.timeout(_WATCH_FIRST_S):
                await self._watch.asked.wait()
        except TimeoutError:
            logger.warning("the registry's watch says nothing, the names are asked for")
        async with asyncio.TaskGroup() as group:
            for name in self.names:
                if not is_digest(name):
                    group.create_task(self._resolve(name), name=f"name {name}")

    async def _resolve(self, name: str) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._watched(name):
            try:
                await self._ask(name)
                return
            except TreadleError as error:
                logger.warning("the model is not resolved yet", extra={"model": name, "reason": error.reason})
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _watched(self, name: str) -> bool:
        known = self._watch.known
        return known is not None and (name in known.aliases or name in known.deployments)

    async def _ask(self, name: str) -> None:
        if self._watch.known is not None:
            raise NotFound(f"the registry has no alias {name!r}", reason="MODEL_NOT_FOUND")
        self.resolved[name] = await self._registry.resolve(name)
        self._changed()

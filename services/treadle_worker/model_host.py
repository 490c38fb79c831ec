"""Keeps one model served: resolves it, loads it, runs its engine, and starts another when that one dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from treadle.errors import TreadleError, Unavailable
from treadle.models.profile import ServingProfile
from treadle.text.tokenizer import Tokenizer
from treadle_worker.config import EngineConfig
from treadle_worker.engine_protocol import EngineEvent, Failed, Ready
from treadle_worker.engine_run import STALLED_S, Engine, EngineRun, Links
from treadle_worker.jobs import Artifact

logger = logging.getLogger(__name__)

Resolve = Callable[[str], Awaitable[Artifact]]
StartEngine = Callable[[Path, EngineConfig], Awaitable[Engine]]

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0
_STABLE_S = 60.0
"""A run that lasted so long starts the pauses anew."""


class ModelHost:
    """One model; `run` is a task. `changed` is called when what it has to say in the heartbeat changes."""

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        links: Links,
        *,
        resolve: Resolve,
        start_engine: StartEngine,
        changed: Callable[[], None],
    ) -> None:
        self.model = model
        self.config = config
        self._links = links
        self._resolve = resolve
        self._start_engine = start_engine
        self._changed = changed
        self.artifact: Artifact | None = None
        """Known once the registry has answered."""
        self.profile = ""
        self.ready: Ready | None = None
        """While an engine is ready."""
        self.running: EngineRun | None = None
        self.draining = False
        self.num_engine_starts = 0

    async def run(self) -> None:
        """Serves the model for ever."""
        self.artifact = await self._resolved()
        self.profile = ServingProfile(self.artifact.compute_digest, self.config.dtype).id
        self._changed()
        pause_s = _FIRST_PAUSE_S
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                await self._serve(self.artifact)
            except TreadleError as error:
                logger.error(
                    "the engine is gone, another is started",
                    extra={"model": self.model, "reason": error.reason, "cause": error.message},
                )
            except Exception:
                # A fault of ours must not take the other models with it.
                logger.exception("an engine's run failed", extra={"model": self.model})
            if loop.time() - started > _STABLE_S:
                pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _resolved(self) -> Artifact:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await self._resolve(self.model)
            except TreadleError as error:
                logger.warning(
                    "the model is not resolved yet", extra={"model": self.model, "reason": error.reason}
                )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _serve(self, artifact: Artifact) -> None:
        """One life of an engine; raises how it ended."""
        folder = Path(artifact.folder)
        engine = await self._start_engine(folder, self.config)
        self.num_engine_starts += 1
        try:
            # The engine loads meanwhile.
            tokenizer = await asyncio.to_thread(Tokenizer.load, folder, digest=artifact.tokenizer_digest)
            events = engine.events()
            self.ready = await _until_ready(events)
            logger.info("the model is ready", extra={"model": self.model, "profile": self.profile})
            self.running = EngineRun(engine, self.ready, self.profile, tokenizer, self._links)
            self._changed()
            await self.running.run(events, claims=not self.draining)
        finally:
            self.ready = self.running = None
            self._changed()
            await engine.stop()

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, and finishes those that run if there is time."""
        self.draining = True
        if self.running is not None:
            await self.running.drain(timeout_s)

    @property
    def state(self) -> str:
        """ "loading" (bounded by the engine's own signs of life), "ready" or "draining"."""
        if self.draining:
            return "draining"
        return "loading" if self.ready is None else "ready"


async def _until_ready(events: AsyncIterator[EngineEvent]) -> Ready:
    """The engine's Ready; raises Unavailable where it fails, or gives no sign of life."""
    while True:
        try:
            async with asyncio.timeout(STALLED_S):
                event = await anext(events)
        except TimeoutError:
            raise Unavailable(
                f"the engine gave no sign of life for {STALLED_S:.0f} s while loading",
                reason="ENGINE_STALLED",
            ) from None
        except StopAsyncIteration:
            raise Unavailable("the engine ended while loading", reason="ENGINE_DIED") from None
        if isinstance(event, Ready):
            return event
        if isinstance(event, Failed):
            raise Unavailable(event.message, reason="ENGINE_NOT_LOADED")

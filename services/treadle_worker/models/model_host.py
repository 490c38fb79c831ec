"""Keeps one model served: loads it, runs its engine, and starts another when that one dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from treadle.errors import DataLoss, TreadleError
from treadle.models.stored_folder import StoredFolder
from treadle.text.tokenizer import Tokenizer
from treadle_worker.config import EngineConfig
from treadle_worker.engine_protocol import EngineEvent, Ready
from treadle_worker.engine_run import Engine, EngineRun, Links
from treadle_worker.jobs import Artifact
from treadle_worker.metrics import ModelMetrics
from treadle_worker.models.device_turns import Seat
from treadle_worker.models.loading import load
from treadle_worker.models.obtaining import Obtain, obtained, where_it_lies
from treadle_worker.models.turns import telling
from treadle_worker.models.warm_up import warm_up
from treadle_worker.resident_memory import resident_bytes

logger = logging.getLogger(__name__)

StartEngine = Callable[[Path, EngineConfig], Awaitable[Engine]]

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0
_STABLE_S = 60.0
"""A run that lasted so long starts the pauses anew."""
_LOOK_EVERY_S = 2.0
"""Between two looks whether damaged files were put right."""


class ModelHost:
    """One model; `run` is a task. `changed` is called when what it has to say in the heartbeat changes."""

    def __init__(
        self,
        name: str,
        artifact: Artifact,
        config: EngineConfig,
        warm_up_prompts: Sequence[str],
        links: Links,
        metrics: ModelMetrics,
        *,
        obtain: Obtain = where_it_lies,
        start_engine: StartEngine,
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        """For people: the alias or digest that it was first served for."""
        self.artifact = artifact
        """Whose folder the next engine loads. One of equal weights and tokenizer may take its place."""
        self.config = config = config.resolved(is_encoder=artifact.is_encoder)
        self.profile = config.profile(artifact.compute_digest).id
        self._warm_up_prompts = warm_up_prompts
        self._links = links
        self._metrics = metrics
        self._obtain = obtain
        self._start_engine = start_engine
        self._changed = changed
        self.ready: Ready | None = None
        """While an engine is ready."""
        self.announced: Ready | None = None
        """The engine that a heartbeat has said to be ready."""
        self.failure: TreadleError | None = None
        """Why it could not be loaded, until it is."""
        self.running: EngineRun | None = None
        self.retiring = False
        """No more requests are wanted; those that come are served."""
        self.draining = False
        """No more requests are taken."""
        self.num_engine_starts = 0

    async def run(self) -> None:
        """Serves the model for ever."""
        pause_s = _FIRST_PAUSE_S
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            artifact = self.artifact
            files = await asyncio.to_thread(_state, artifact.folder)
            try:
                async with obtained(self._obtain, artifact, self._not_obtained) as readable:
                    await self._serve(readable)
            except DataLoss as error:
                logger.error(
                    "the model is not served: its files are damaged",
                    extra={"model": self.name, "reason": error.reason, "cause": error.message},
                )
                if files is not None:
                    # Loading it again would find the same, at the cost of reading all of it.
                    await _until_changed(artifact.folder, files)
                    continue
            except TreadleError as error:
                logger.error(
                    "the engine is gone, another is started",
                    extra={"model": self.name, "reason": error.reason, "cause": error.message},
                )
            except Exception:
                # A fault of ours must not take the other models with it.
                logger.exception("an engine's run failed", extra={"model": self.name})
            if loop.time() - started > _STABLE_S:
                pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _not_obtained(self, error: TreadleError) -> None:
        self.failure = error
        self._changed()

    async def _serve(self, artifact: Artifact) -> None:
        """One life of an engine; raises how it ended."""
        engine = await self._start_engine(artifact.folder.path, self.config)
        self.num_engine_starts += 1
        try:
            events = engine.events()
            try:
                ready, tokenizer = await load(artifact, events)
            except TreadleError as error:
                self.failure = error
                raise
            async with self._links.turns.joined(self.config.device, engine, ready) as seat:
                try:
                    await self._run(engine, ready, tokenizer, telling(events, seat), seat)
                finally:
                    # It may compute until it has ended: nobody gets the turn before.
                    await engine.stop()
        finally:
            self.ready = self.running = None
            self._metrics.engine_gone()
            self._changed()
            await engine.stop()

    async def _run(
        self,
        engine: Engine,
        ready: Ready,
        tokenizer: Tokenizer,
        events: AsyncIterator[EngineEvent],
        seat: Seat,
    ) -> None:
        """From an engine that has loaded to its end."""
        seat.set_wants(bool(self._warm_up_prompts))
        try:
            commands = await warm_up(engine, events, ready, tokenizer, self._warm_up_prompts)
        except TreadleError as error:
            self.failure = error
            raise
        seat.set_wants(False)
        self.ready, self.failure = ready, None
        self._metrics.engine_ready(partial(resident_bytes, ready.process_id), ready.device_memory)
        logger.info("the model is ready", extra={"model": self.name, "profile": self.profile})
        self.running = EngineRun(
            engine,
            ready,
            self.profile,
            tokenizer,
            self._links,
            self._metrics,
            seat=seat,
            num_commands=commands,
        )
        self._changed()
        await self.running.run(events, claims=not self.draining)

    @property
    def is_announced(self) -> bool:
        """Whether a heartbeat has said that the engine of now is ready."""
        return self.ready is not None and self.announced is self.ready

    def close(self) -> None:
        """The model is gone from this worker."""
        self._metrics.close()

    def retire(self) -> None:
        """Says that no more requests are wanted; what comes is served until `drain`."""
        self.retiring = True
        self._changed()

    def keep(self) -> None:
        """Takes `retire` back."""
        self.retiring = False
        self._changed()

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, and finishes those that run if there is time."""
        self.draining = True
        if self.running is not None:
            await self.running.drain(timeout_s)

    @property
    def state(self) -> str:
        """ "loading" (bounded by the engine's own signs of life), "ready", "draining", or "failed" from the
        first try that failed to one that does not."""
        if self.draining or self.retiring:
            return "draining"
        if self.ready is not None:
            return "ready"
        return "loading" if self.failure is None else "failed"


def _state(folder: StoredFolder) -> object:
    """What `_until_changed` compares."""
    try:
        return folder.state()
    except OSError:
        return None


async def _until_changed(folder: StoredFolder, before: object) -> None:
    """Waits until the folder's files are others than they were."""
    while True:
        if await asyncio.to_thread(_state, folder) != before:
            return
        await asyncio.sleep(_LOOK_EVERY_S)

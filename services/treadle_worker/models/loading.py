"""From a started engine to one that is ready: it loads, and the files that it loads are checked meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator

from treadle.errors import FailedPrecondition, Unavailable
from treadle.models.stored_folder import StoredFolder
from treadle.text.tokenizer import Tokenizer
from treadle_worker.engine_protocol import EngineEvent, Failed, Ready
from treadle_worker.engine_run import STALLED_S
from treadle_worker.jobs import Artifact

logger = logging.getLogger(__name__)


async def load(artifact: Artifact, events: AsyncIterator[EngineEvent]) -> tuple[Ready, Tokenizer]:
    """The engine's Ready and the model's tokenizer, once every file of the model has proved to be whole.

    Raises DataLoss (DAMAGED_FILE) whatever else went wrong when a file is not what the registry says;
    Unavailable where the engine fails or gives no sign of life, and FailedPrecondition for a tokenizer or
    a folder that cannot be read here.
    """
    async with _checking(artifact.folder) as check:
        loading = asyncio.create_task(_load(artifact, events), name="load")
        try:
            done, _ = await asyncio.wait({check, loading}, return_when=asyncio.FIRST_EXCEPTION)
            if loading in done and loading.exception() is not None:
                await asyncio.wait({check})
            check.result()
            return loading.result()
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)


async def _load(artifact: Artifact, events: AsyncIterator[EngineEvent]) -> tuple[Ready, Tokenizer]:
    tokenizer = await asyncio.to_thread(
        Tokenizer.load, artifact.folder.path, digest=artifact.tokenizer_digest
    )
    return await _until_ready(events), tokenizer


@contextlib.asynccontextmanager
async def _checking(folder: StoredFolder) -> AsyncIterator[asyncio.Task[None]]:
    """The check as a task; its thread, which nobody can cancel, is told to stop at the block's end."""
    stop = threading.Event()
    check = asyncio.create_task(_check(folder, stop), name="check")
    try:
        yield check
    finally:
        stop.set()
        await asyncio.gather(check, return_exceptions=True)


async def _check(folder: StoredFolder, stop: threading.Event) -> None:
    started = time.monotonic()
    try:
        size = await asyncio.to_thread(folder.verify, stopped=stop.is_set)
    except OSError as error:
        raise FailedPrecondition(
            f"the files of {folder.artifact_digest} cannot be read on this worker: {error.strerror}; give it "
            "the registry's store under the same path",
            reason="MODEL_NOT_READABLE",
        ) from error
    took = round((time.monotonic() - started) * 1e3)
    logger.info(
        "the model's files are whole",
        extra={"artifact": folder.artifact_digest, "bytes": size, "milliseconds": took},
    )


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

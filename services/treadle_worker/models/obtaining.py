"""An artifact's files where this machine can read them: where the registry has them, or in the node cache."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from treadle.errors import TreadleError
from treadle.models.stored_folder import StoredFolder
from treadle_worker.jobs import Artifact

Obtain = Callable[[StoredFolder], contextlib.AbstractAsyncContextManager[StoredFolder]]
"""A folder that has the files until the block ends; it may take as long as a model is large."""


@contextlib.asynccontextmanager
async def where_it_lies(folder: StoredFolder) -> AsyncIterator[StoredFolder]:
    """The registry's own folder."""
    yield folder


@contextlib.asynccontextmanager
async def obtained(
    obtain: Obtain, artifact: Artifact, failed: Callable[[TreadleError], None]
) -> AsyncIterator[Artifact]:
    """The artifact with a folder that can be read here; `failed` is told of the error that is raised else."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            folder = await stack.enter_async_context(obtain(artifact.folder))
        except TreadleError as error:
            failed(error)
            raise
        yield replace(artifact, folder=folder)

"""Inspections: each a short-lived process, since headers are a stranger's and reading them is computation."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from treadle.errors import DeadlineExceeded, ResourceExhausted
from treadle_registry.formats.inspection import Inspection
from treadle_registry.operations.job import InspectJob
from treadle_registry.operations.job_runner import JobProcess
from treadle_registry.operations.progress import unheard
from treadle_registry.registry import Registry
from treadle_registry.sources.source import LocalSource, LookedAt
from treadle_registry.store.store import Published

_MAX_RUNNING = 2
_MAX_WAITING = 16
_LONGEST_S = 120.0
"""Headers of the largest models are read in some seconds; those that were made to be slow end here."""
_RETRY_AFTER_S = 2.0


class Inspections:
    """At most two at once, and a few behind them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._turn = asyncio.Semaphore(_MAX_RUNNING)
        self._asked = 0

    async def inspect_source(self, source: LookedAt) -> Inspection:
        """What a source's model is.

        Raises what an import raises where there is nothing to look at, ResourceExhausted when too many wait,
        and DeadlineExceeded.
        """
        source.check()
        if self._asked >= _MAX_RUNNING + _MAX_WAITING:
            raise ResourceExhausted(
                f"{self._asked} inspections run or wait already",
                reason="TOO_MANY_INSPECTIONS",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._asked += 1
        try:
            async with asyncio.timeout(_LONGEST_S), self._turn:
                found = await JobProcess(self._registry.store.root, InspectJob(source)).run(unheard)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the model's headers were not read within {_LONGEST_S:.0f} s; an import may take longer",
                reason="INSPECTION_TOO_LONG",
            ) from error
        finally:
            self._asked -= 1
        assert isinstance(found, Inspection)
        return found

    async def inspect_model(self, model: str) -> Inspection:
        """What the artifact of an alias or digest is; raises NotFound beside the others."""
        published, _ = await self._registry.resolve(model)
        found = await self.inspect_source(await self._registry.in_thread(_kept_source, published))
        facts = published.manifest.facts
        # Manifests from before types were counted lack them.
        facts = replace(facts, dtypes=facts.dtypes or found.facts.dtypes)
        return replace(found, facts=facts, refusal=None, task_facts=published.manifest.task_facts)


def _kept_source(published: Published) -> LocalSource:
    """The files as they came, or the canonical ones of an artifact that was made of another."""
    kept = published.canonical_folder.parent / "source"
    for path in sorted(kept.glob("*.gguf")):
        return LocalSource("gguf_file", str(path))
    folder = kept if (kept / "config.json").exists() else published.canonical_folder
    return LocalSource("folder", str(folder))

"""Room is made: what was used least recently goes first, and never what is leased, aliased or deployed.

Looking and deleting are one call in the registry's thread: between them nobody is given a lease.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from treadle.errors import DataLoss, FailedPrecondition, NotFound, TreadleError, Unavailable
from treadle_registry.registry import Registry
from treadle_registry.store.blob_use import BlobUse, Share

logger = logging.getLogger(__name__)

_NO_BOUND = 1 << 63
"""Bytes; more than any store has."""


@dataclass(frozen=True, slots=True)
class Fate:
    """Whether an artifact goes or is kept, and why; `size` is what its going frees, in bytes."""

    digest: str
    size: int
    reason: str
    kept: bool
    last_use_time: float


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """Every artifact, the least recently used first, and the store's bytes before and after."""

    fates: tuple[Fate, ...]
    bytes_before: int
    bytes_after: int

    @property
    def going(self) -> list[str]:
        """The digests of those that go."""
        return [fate.digest for fate in self.fates if not fate.kept]


def plan_eviction(
    shares: Mapping[str, Share],
    last_uses: Mapping[str, float],
    held: Mapping[str, Sequence[str]],
    target_bytes: int,
) -> EvictionPlan:
    """What goes so that no more than `target_bytes` remain, or as near to that as what is held allows.

    `shares` has the files of every artifact, `held` why some must stay. An artifact whose files others keep
    is not deleted for nothing.
    """
    use = BlobUse(shares)
    before = use.total
    order = sorted(shares, key=lambda digest: (last_uses.get(digest, 0.0), digest))
    going: dict[str, int] = {}
    for digest in order:
        if use.total <= target_bytes:
            break
        if not held.get(digest):
            going[digest] = use.remove(digest)
    for digest in reversed(list(going)):
        total = use.total
        use.put_back(digest)
        if use.total == total:
            del going[digest]
        else:
            use.remove(digest)
    fates = []
    freed = BlobUse(shares)
    for digest in order:
        if digest in going:
            fates.append(
                Fate(
                    digest,
                    freed.remove(digest),
                    "not used for the longest time",
                    False,
                    last_uses.get(digest, 0.0),
                )
            )
        else:
            reason = "; ".join(held.get(digest, ())[:3]) or _why_kept(use, digest)
            fates.append(Fate(digest, use.freed_by(digest), reason, True, last_uses.get(digest, 0.0)))
    return EvictionPlan(tuple(fates), before, use.total)


def _why_kept(use: BlobUse, digest: str) -> str:
    return "there is room for it" if use.freed_by(digest) else "frees nothing: others have the same files"


class Eviction:
    """Keeps the store to its quota.

    `quota` is in bytes, 0 for none; leases are unknown for `unknown_s` after a start.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        quota: int,
        unknown_s: float,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._registry, self._quota, self._clock = registry, quota, clock
        self._free_bytes = free_bytes or (lambda: shutil.disk_usage(registry.store.root).free)
        self._known_at = clock() + unknown_s

    @property
    def unknown_s(self) -> float:
        """Seconds until leases are known; 0: they are."""
        return max(0.0, self._known_at - self._clock())

    async def evict(
        self, target_bytes: int | None = None, *, dry_run: bool = False, spared: str = ""
    ) -> EvictionPlan:
        """Deletes until `target_bytes` (None: the quota) hold everything, or says what would go.

        `spared` is kept whatever its use. Raises Unavailable (LEASES_UNKNOWN) soon after a start.
        """
        target = (self._quota or _NO_BOUND) if target_bytes is None else target_bytes
        plan = await self._registry.in_thread(self._evict, target, dry_run, spared)
        if not dry_run and plan.going:
            logger.info(
                "artifacts were evicted",
                extra={
                    "artifacts": plan.going,
                    "bytes_before": plan.bytes_before,
                    "bytes_after": plan.bytes_after,
                },
            )
        return plan

    def _evict(self, target: int, dry_run: bool, spared: str) -> EvictionPlan:
        registry, unknown_s = self._registry, self.unknown_s
        if unknown_s and not dry_run:
            raise Unavailable(
                f"the registry has just started, and who holds leases may not have come back yet; in "
                f"{unknown_s:.0f} s artifacts can be evicted (a dry run can be had now)",
                reason="LEASES_UNKNOWN",
                retry_after_s=unknown_s,
            )
        registry.leasing.lapse()
        last_uses = registry.uses.last()
        held = registry.rollouts.held()
        if spared in last_uses:
            held.setdefault(spared, []).append("just imported")
        if unknown_s:
            for digest in last_uses:
                held.setdefault(digest, []).append(f"leases are unknown for {unknown_s:.0f} s more")
        plan = plan_eviction(self._shares(last_uses), last_uses, held, target)
        if plan.going and not dry_run:
            registry.remove(plan.going)
        return plan

    def _shares(self, digests: Mapping[str, float]) -> dict[str, Share]:
        shares = {}
        for digest in digests:
            try:
                shares[digest] = Share.of(self._registry.readings.read(digest).manifest)
            except (DataLoss, NotFound, FailedPrecondition) as error:
                # Its files are not known: it neither counts nor goes.
                logger.error("an artifact is left out", extra={"artifact": digest, "reason": error.message})
        return shares

    async def make_room(self, *, spared: str = "") -> None:
        """Evicts what is above the quota; what cannot be is logged. `spared` is kept whatever its use."""
        if not self._quota:
            return
        plan = await self._tried(self._quota, spared)
        if plan is not None and plan.bytes_after > self._quota:
            logger.warning(
                "the store is over its quota, and the rest of it is held",
                extra={"quota": self._quota, "bytes": plan.bytes_after},
            )

    async def make_room_on_disk(self, needed_bytes: int) -> bool:
        """Evicts what the disk lacks of so many bytes, where there is a quota; whether anything went.

        What cannot be evicted is logged.
        """
        if not self._quota:
            return False
        lacking = needed_bytes - await self._registry.in_thread(self._free_bytes)
        if lacking <= 0:
            return False
        now = await self.evict(dry_run=True)
        plan = await self._tried(max(0, now.bytes_before - lacking), "")
        return plan is not None and bool(plan.going)

    async def _tried(self, target: int, spared: str) -> EvictionPlan | None:
        try:
            return await self.evict(target, spared=spared)
        except TreadleError as error:
            logger.warning("no room could be made", extra={"reason": error.reason, "cause": error.message})
        except Exception:
            logger.exception("no room could be made")
        return None

"""How many requests this gateway holds at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from treadle.errors import ResourceExhausted, TreadleError

RETRY_AFTER_S = 1.0


class Slot:
    """A place that one request takes; released once, however often that is said."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission

    def release(self) -> None:
        """Gives the place back."""
        if self._admission is not None:
            self._admission.held -= 1
            self._admission = None


class Admission:
    """Takes requests up to a limit and refuses the rest at once, before any work."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0
        """Requests held now."""

    def admit(self) -> Slot:
        """A slot, to release at the request's end; raises ResourceExhausted (GATEWAY_FULL)."""
        if self.held >= self._limit:
            raise ResourceExhausted(
                f"the gateway holds {self.held} requests and takes no more; try again later",
                reason="GATEWAY_FULL",
                retry_after_s=RETRY_AFTER_S,
            )
        self.held += 1
        return Slot(self)

    @contextlib.contextmanager
    def taking(self, refused: Callable[[TreadleError], None]) -> Iterator[Slot]:
        """A slot for a request that is looked at: where it is not taken it is given back, and `refused` is
        told why. Raises as `admit`."""
        try:
            slot = self.admit()
            try:
                yield slot
            except BaseException:
                slot.release()
                raise
        except TreadleError as error:
            refused(error)
            raise

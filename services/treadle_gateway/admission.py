"""How many requests this gateway holds at once."""

from __future__ import annotations

from treadle.errors import ResourceExhausted

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

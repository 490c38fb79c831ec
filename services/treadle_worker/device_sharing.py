"""Whether other engines use the device, too, as an engine knows it: by turns that it is given and loses."""

from __future__ import annotations

import math
from collections.abc import Callable

SHARED_S = 1.0
"""So long after the device went from one engine to another, it counts as shared."""


class DeviceSharing:
    """While the device is shared, steps are kept short: another engine waits for their end."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = -math.inf

    def handed_over(self) -> None:
        """Another engine had the device until now, or is about to have it.

        Both count: where the other one's turn took longer than SHARED_S, its next one is still wanted.
        """
        self._until = self._clock() + SHARED_S

    @property
    def is_shared(self) -> bool:
        """Whether steps are to be short."""
        return self._clock() < self._until

"""A running suite, asked in raw bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from raw_calls import Asker, asking
from running_suite import Suite


@pytest.fixture
async def asker(suite: Suite) -> AsyncIterator[Asker]:
    """Raw channels to every service of the one suite."""
    async with asking(suite) as made:
        yield made

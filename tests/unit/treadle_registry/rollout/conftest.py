"""A registry's deployments and leases without its store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_parts import RolloutParts, digest_of


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[RolloutParts]:
    """With the artifacts 0 to 7."""
    made = RolloutParts(tmp_path, map(digest_of, range(8)))
    yield made
    made.close()

"""The whole suite, started as a user starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running_suite import Suite, running_suite


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """One suite for the whole run, with the packaged SmolLM2 as "smollm2"."""
    with running_suite(tmp_path_factory.mktemp("home"), "--port", "0") as running:
        yield running

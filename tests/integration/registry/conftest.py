"""A registry over real gRPC, on a store of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from registry_stubs import RegistryStubs, open_registry


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[RegistryStubs]:
    """A registry on an empty store."""
    async with open_registry(tmp_path / "store") as made:
        yield made


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[RegistryStubs]:
    """A registry with room for one transfer each way, and for few bytes."""
    settings = {"max_uploads": 1, "max_downloads": 1, "max_upload_bytes": 40 << 20}
    async with open_registry(tmp_path / "store", **settings) as made:
        yield made

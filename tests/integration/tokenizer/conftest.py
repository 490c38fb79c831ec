"""One tokenizer process a module, and the library that it must agree with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tokenizer_process import (
    HeldRegistry,
    Service,
    running_registry,
    running_service,
    until_ready,
)
from tokenizers import Tokenizer as Backend


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> AsyncIterator[Service]:
    registry = HeldRegistry()
    registry.add("smollm2", smollm2_folder, number=1)
    async with (
        running_registry(registry) as server,
        running_service(
            registry, f"127.0.0.1:{server.port}", tmp_path_factory.mktemp("tokenizer"), smollm2_folder
        ) as running,
    ):
        await until_ready(running.channel)
        yield running


@pytest.fixture(scope="module")
def oracle(smollm2_folder: Path) -> Backend:
    return Backend.from_file(str(smollm2_folder / "tokenizer.json"))

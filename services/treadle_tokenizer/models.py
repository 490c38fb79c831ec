"""From a model's name to its tokenizer and chat template in memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from treadle.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from treadle.models.remembered import RememberedNames
from treadle.models.stored_folder import StoredFolder
from treadle.text.chat_template import ChatTemplate
from treadle.text.tokenizer import Tokenizer
from treadle_tokenizer.load_once import LoadOnce

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
"""What Tokenizer.load reads."""
_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
"""What ChatTemplate.load reads."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Artifact:
    """What the registry says of a model: its digests, and its canonical folder."""

    digest: str
    tokenizer_digest: str
    presentation_digest: str
    folder: StoredFolder


class Registry(Protocol):
    """Names to artifacts."""

    async def resolve(self, model: str) -> Artifact:
        """The artifact that an alias or digest means now; raises TreadleError, NotFound among them."""


class Obtain(Protocol):
    """Files of an artifact, where this machine can read them."""

    def __call__(
        self, folder: StoredFolder, names: Collection[str]
    ) -> contextlib.AbstractAsyncContextManager[StoredFolder]:
        """A folder that has the files until the block ends; raises TreadleError."""


@contextlib.asynccontextmanager
async def where_it_lies(folder: StoredFolder, names: Collection[str]) -> AsyncIterator[StoredFolder]:
    """The registry's own folder."""
    yield folder


@dataclass(frozen=True, slots=True)
class Model:
    """A model, ready for text."""

    artifact_digest: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


class Models:
    """Resolves names through the registry and keeps what it loaded, by digest.

    What the registry said is taken for granted for `resolve_ttl_s`, and longer while the registry is away:
    then it is asked again after as long. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        obtain: Obtain = where_it_lies,
        resolve_ttl_s: float = 1.0,
        max_resolved: int = 1024,
        max_loaded: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._obtain = obtain
        self._names = RememberedNames(self._ask, fresh_s=resolve_ttl_s, max_names=max_resolved, clock=clock)
        self._tokenizers: LoadOnce[str, Tokenizer] = LoadOnce(max_loaded)
        self._templates: LoadOnce[tuple[str, str], ChatTemplate | None] = LoadOnce(4 * max_loaded)

    @property
    def num_loads(self) -> int:
        """Tokenizers that were loaded from disk so far."""
        return self._tokenizers.num_loads

    async def get(self, model: str) -> Model:
        """The model behind an alias or digest.

        Raises NotFound, Unavailable where the registry is away and was never asked for it,
        FailedPrecondition, reason TOKENIZER_NOT_LOADABLE, where its files cannot be used, and DataLoss where
        they are not those that the registry has listed.
        """
        artifact = await self._resolve(model)

        def load_tokenizer(folder: StoredFolder) -> Tokenizer:
            started = time.monotonic()
            folder.verify(_TOKENIZER_FILES)
            tokenizer = Tokenizer.load(folder.path, digest=artifact.tokenizer_digest)
            took = round((time.monotonic() - started) * 1e3)
            logger.info(
                "tokenizer loaded",
                extra={"tokenizer_digest": artifact.tokenizer_digest, "milliseconds": took},
            )
            return tokenizer

        tokenizer = await self._tokenizers.get(
            artifact.tokenizer_digest, lambda: self._load(load_tokenizer, artifact, _TOKENIZER_FILES)
        )

        def load_template(folder: StoredFolder) -> ChatTemplate | None:
            folder.verify(_TEMPLATE_FILES)
            return ChatTemplate.load(folder.path, tokenizer.special_tokens)

        # Its special tokens are the tokenizer's part, the rest is the presentation's.
        template = await self._templates.get(
            (artifact.tokenizer_digest, artifact.presentation_digest),
            lambda: self._load(load_template, artifact, _TEMPLATE_FILES),
        )
        return Model(artifact.digest, tokenizer, template)

    async def _load(self, load: Callable[[StoredFolder], T], artifact: Artifact, names: Collection[str]) -> T:
        """Loads from where this machine can read the files `names`."""
        async with self._obtain(artifact.folder, names) as folder:
            return await _in_thread(partial(load, folder), artifact)

    async def close(self) -> None:
        """Calls off what is under way."""
        await self._names.close()
        await self._tokenizers.close()
        await self._templates.close()

    async def _resolve(self, model: str) -> Artifact:
        try:
            return await self._names.get(model)
        except (Unavailable, DeadlineExceeded) as error:
            raise Unavailable(
                f"the registry is away: {error.message}", reason="REGISTRY_UNAVAILABLE", retry_after_s=1.0
            ) from error

    async def _ask(self, model: str) -> Artifact:
        try:
            return await self._registry.resolve(model)
        except (Unavailable, DeadlineExceeded):
            raise
        except Exception:
            self._names.forget(model)
            raise


async def _in_thread(load: Callable[[], T], artifact: Artifact) -> T:
    try:
        return await asyncio.to_thread(load)
    except OSError as error:
        raise FailedPrecondition(
            f"the files of {artifact.digest} cannot be read here: {error.strerror}",
            reason="TOKENIZER_NOT_LOADABLE",
        ) from error

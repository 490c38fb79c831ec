"""Which of the ways to attend on CUDA an engine takes: decided once, at load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch

from treadle.errors import FailedPrecondition
from treadle.models.config import ModelConfig
from treadle_worker.cuda.attention import AttentionBackend
from treadle_worker.cuda.flash_attn import FlashAttnBackend
from treadle_worker.cuda.flashinfer import FlashInferBackend
from treadle_worker.cuda.sdpa import SdpaBackend

BackendName = Literal["auto", "sdpa", "flash_attn", "flashinfer"]
_log = logging.getLogger(__name__)


class _Package(NamedTuple):
    """A backend that needs a package."""

    refuses: Callable[[ModelConfig, int, torch.dtype], str]
    build: Callable[[torch.device], AttentionBackend]


PACKAGES: Mapping[str, _Package] = {
    "flash_attn": _Package(FlashAttnBackend.refuses, lambda device: FlashAttnBackend()),
    "flashinfer": _Package(FlashInferBackend.refuses, FlashInferBackend),
}
"""In the order in which "auto" asks for them."""


def choose_backend(
    name: BackendName, config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionBackend | None:
    """The backend of that name; None where the device's attention is not the CUDA one.

    "auto": on CUDA flash-attn, else flashinfer, where they are installed and can read the cache, else torch's
    own. An int8 cache is left to plain torch operations. "sdpa" runs on a CPU, too, for tests. Raises
    FailedPrecondition, with the reason, for a name that cannot be had.
    """
    if name == "auto":
        return _best(config, block_size, dtype, device) if device.type == "cuda" else None
    if dtype is torch.int8:
        raise _refused(name, "it reads no int8 cache")
    if name == "sdpa":
        return SdpaBackend()
    package = PACKAGES[name]
    if device.type != "cuda":
        raise _refused(name, f"it is for CUDA, not for {device}")
    if reason := package.refuses(config, block_size, dtype):
        raise _refused(name, reason)
    try:
        return package.build(device)
    except ImportError as error:
        raise _refused(name, f"the package cannot be imported: {error}") from error


def _best(
    config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionBackend | None:
    if dtype is torch.int8:
        return None
    for name, package in PACKAGES.items():
        reason = package.refuses(config, block_size, dtype)
        try:
            if not reason:
                return package.build(device)
        except ImportError as error:
            reason = str(error)
        _log.info("attention does without a package", extra={"package": name, "reason": reason})
    return SdpaBackend()


def _refused(name: str, reason: str) -> FailedPrecondition:
    return FailedPrecondition(
        f'attention_backend = "{name}" cannot be had: {reason}; use "auto"',
        reason="ATTENTION_BACKEND_NOT_AVAILABLE",
    )

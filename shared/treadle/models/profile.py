"""The serving profile: what one request's numbers depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

DEFAULT_DTYPE = "bfloat16"
DEFAULT_ENCODER_DTYPE = "float32"
"""Encoders are small, and their vectors are compared in the fourth digit."""


@dataclass(frozen=True, slots=True)
class ServingProfile:
    """A compute digest and how it is computed; its id names the lanes.

    Requests in one lane may be answered by any worker that has the profile ready.
    """

    compute_digest: str
    dtype: str
    quantization: str = ""
    cache_dtype: str = ""

    @property
    def id(self) -> str:
        """ "p-" and 16 hexadecimal digits."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return "p-" + hashlib.sha256(canonical.encode()).hexdigest()[:16]


def served_dtype(asked: str, *, is_encoder: bool) -> str:
    """The dtype that "auto" means for a model; any other is taken as it is."""
    if asked != "auto":
        return asked
    return DEFAULT_ENCODER_DTYPE if is_encoder else DEFAULT_DTYPE

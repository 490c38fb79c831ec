"""How an artifact is made of another one: what is asked, and what is recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from treadle.errors import invalid_field
from treadle_registry.names import check_source_path
from treadle_registry.store.digests import digest_json

DERIVER = "treadle-derive/1"
"""Who derives; raised whenever the same parent and parameters would give other bytes."""

Kind = Literal["dtype", "quantization", "adapter_merge"]
FloatType = Literal["float32", "float16", "bfloat16"]
_VALUES = {"dtype": get_args(FloatType), "quantization": ("int8", "int4", "mxfp4")}


@dataclass(frozen=True, slots=True)
class Derivation:
    """A dtype ("float32"), a quantisation ("int8"), or an adapter that is merged.

    `value` of a merge is the digest over the adapter's two files, empty while nobody has read them; `folder`
    is where they lay.
    """

    kind: Kind
    value: str
    folder: str = ""

    def check(self) -> None:
        """Raises InvalidArgument that names the field."""
        if self.kind == "adapter_merge":
            check_source_path(self.folder, self.field)
        elif self.value not in _VALUES[self.kind]:
            raise invalid_field(
                self.field, f"must be one of {', '.join(_VALUES[self.kind])}; got {self.value[:100]!r}"
            )

    @property
    def field(self) -> str:
        """The request's field that says it."""
        return (
            "derivation.adapter_merge.folder" if self.kind == "adapter_merge" else f"derivation.{self.kind}"
        )

    def key(self, parent_digest: str) -> str:
        """What is the same for equal results: parent, parameters and tool, not a folder's name."""
        digest = digest_json({"parent": parent_digest, "kind": self.kind, "value": self.value, "by": DERIVER})
        return digest.removeprefix("sha256:")

    def __str__(self) -> str:
        return f"merged with {self.folder}" if self.kind == "adapter_merge" else f"as {self.value}"

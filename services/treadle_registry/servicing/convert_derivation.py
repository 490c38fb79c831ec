"""Between derivations and the contract's messages."""

from __future__ import annotations

from treadle.api.registry.v1 import artifact_pb2
from treadle.errors import invalid_field
from treadle_registry.store.derivation import Derivation


def derivation_from_proto(derivation: artifact_pb2.Derivation) -> Derivation:
    """What is to be made; raises InvalidArgument where nothing is said."""
    match derivation.WhichOneof("kind"):
        case "dtype":
            return Derivation("dtype", derivation.dtype)
        case "quantization":
            return Derivation("quantization", derivation.quantization)
        case "adapter_merge":
            return Derivation("adapter_merge", "", derivation.adapter_merge.folder)
        case _:
            raise invalid_field("derivation", "give one of dtype, quantization and adapter_merge")


def derivation_to_proto(derivation: Derivation) -> artifact_pb2.Derivation:
    """What was made."""
    if derivation.kind == "dtype":
        return artifact_pb2.Derivation(dtype=derivation.value)
    if derivation.kind == "quantization":
        return artifact_pb2.Derivation(quantization=derivation.value)
    merge = artifact_pb2.AdapterMerge(folder=derivation.folder, digest=derivation.value)
    return artifact_pb2.Derivation(adapter_merge=merge)

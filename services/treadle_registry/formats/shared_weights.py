"""Weights that are bfloat16 already: the source's files are the canonical ones, under their names there."""

from __future__ import annotations

from collections.abc import Sequence

from treadle_registry.formats.canonical import WEIGHTS
from treadle_registry.formats.json_files import json_bytes
from treadle_registry.formats.safetensors_file import TensorDigests, hash_tensors, read_header
from treadle_registry.operations.progress import Report, Stage, StageMeter
from treadle_registry.store.staging import Staging

INDEX = "canonical/model.safetensors.index.json"


def share_weights(staging: Staging, weights: Sequence[str], report: Report) -> TensorDigests:
    """Names staged source files as canonical ones, nothing rewritten; several get an index.

    Raises InvalidArgument (CORRUPT_WEIGHTS).
    """
    shards = len(weights)
    names = {
        name: WEIGHTS if shards == 1 else f"canonical/model-{number:05d}-of-{shards:05d}.safetensors"
        for number, name in enumerate(sorted(weights), 1)
    }
    tensors = {name: read_header(staging.path(f"source/{name}")) for name in names}
    total = sum(tensor.size for shard in tensors.values() for tensor in shard.values())
    meter = StageMeter(report, Stage.CONVERTING, total)
    digests: TensorDigests = {}
    weight_map: dict[str, str] = {}
    for name, canonical in names.items():
        staging.share(f"source/{name}", canonical)
        for tensor, digest, size in hash_tensors(staging.path(canonical), tensors[name]):
            digests[tensor] = (tensors[name][tensor].dtype, tensors[name][tensor].shape, digest)
            weight_map[tensor] = canonical.removeprefix("canonical/")
            meter.add(size)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        staging.write(INDEX, json_bytes(index))
    return digests

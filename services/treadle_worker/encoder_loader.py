"""From EngineStart to an encoder's engine: the device, the model and its kernels, checked to fit."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from treadle.models.encoder_config import EncoderConfig
from treadle.models.profile import served_dtype
from treadle.nn.linear import warm_up
from treadle.nn.loader import load_encoder
from treadle_worker.batch_former import BatchFormer
from treadle_worker.cuda.memory import MemoryWatch, use
from treadle_worker.encoder_engine import EncoderEngine, TextWork, tasks_of
from treadle_worker.encoder_runner import EncoderRunner
from treadle_worker.engine_loader import WARM_ROWS, choose_device
from treadle_worker.engine_protocol import AddTask, EngineStart, TaskInput
from treadle_worker.weight_room import check_room

ATTENTION_COST = 3.0
"""What an operation of attention takes, beside one of a product."""
_log = logging.getLogger(__name__)


def load_encoder_engine(start: EngineStart) -> EncoderEngine:
    """Reads the model.

    Raises what `load_encoder` does for a folder that is no encoder of ours, and for a quantisation that
    encoders do not have; MemoryError, with the figures, where the weights or the largest step do not fit.
    """
    if start.num_threads is not None:
        torch.set_num_threads(start.num_threads)
    device = choose_device(start.device)
    dtype = served_dtype(start.dtype, is_encoder=True)
    use(device)
    folder, kernels, quantization = Path(start.model_folder), start.kernels, start.quantization
    check_room(folder, dtype, device, quantization=quantization, kernels=kernels)
    model = load_encoder(folder, getattr(torch, dtype), device, quantization=quantization, kernels=kernels)
    config, budget = model.config, start.max_num_batched_task_tokens
    with torch.inference_mode():
        warm_up(model, min(budget, WARM_ROWS))
    max_model_len = min(start.max_model_len or config.max_input_tokens, config.max_input_tokens)
    runner = EncoderRunner(model, device)
    if device.type == "cuda":
        check_largest_step(runner, budget, max_model_len)
        torch.cuda.reset_peak_memory_stats(device)
    _log.info(
        "the encoder is there",
        extra={"dtype": dtype, "native_products": model.is_native, "tasks": list(tasks_of(config))},
    )
    return EncoderEngine(
        runner,
        BatchFormer(budget, quadratic_tokens=quadratic_tokens(config)),
        config,
        max_model_len=max_model_len,
        max_num_seqs=start.max_num_seqs,
        max_shared_step_ms=start.max_inter_token_ms / 2,
        device_memory=MemoryWatch(device),
    )


def quadratic_tokens(config: EncoderConfig) -> float:
    """The length at which attention takes as long as a layer's products.

    A token costs 2 (4 E E + 2 E I) operations in products and 4 E L in attention among L tokens.
    """
    return (2 * config.hidden_size + config.intermediate_size) / ATTENTION_COST


def check_largest_step(runner: EncoderRunner, max_num_batched_tokens: int, max_model_len: int) -> None:
    """Computes steps as large as there may be, of long texts and of short ones.

    Raises MemoryError where one does not fit.
    """
    assert runner.model is not None, "a runner that was just made"
    asks = AddTask(request_id="", task=tasks_of(runner.model.config)[0], inputs=[], pooling="mean")
    tokens = max(max_num_batched_tokens, max_model_len)
    try:
        for length in (max_model_len, min(16, max_model_len)):
            text = TaskInput(token_ids=[0] * length)
            runner.run([TextWork(text, asks)] * (tokens // length))
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"a step of max_num_batched_task_tokens = {max_num_batched_tokens}, or of a text of "
            f"{max_model_len} tokens, does not fit: {error}; give the encoder fewer of either"
        ) from error

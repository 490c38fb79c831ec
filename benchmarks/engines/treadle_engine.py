"""Treadle's engine, run as in its own process: the one file here that knows how it is loaded and asked."""

from __future__ import annotations

import time
from pathlib import Path

import torch

import treadle
from engines.protocol import Generation, arguments, serve
from treadle_worker.batch import ScheduledChunk
from treadle_worker.config import EngineConfig
from treadle_worker.engine import Engine
from treadle_worker.engine_process import load_engine
from treadle_worker.engine_protocol import AddRequest, EngineStart, SamplingParams
from treadle_worker.model_runner import ModelRunner

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_QUANTIZED = ("int8", "int4")


def settings(dtype: str) -> dict[str, object]:
    """EngineConfig's fields for a form of the weights: "bf16", "fp32", "int8", "int4".

    Raises ValueError for one that this engine does not have.
    """
    if dtype in _DTYPES:
        return {"dtype": _DTYPES[dtype]}
    if dtype in _QUANTIZED and "quantization" in EngineConfig.model_fields:
        return {"quantization": dtype}
    raise ValueError(f"this engine has no {dtype} weights; it has: {', '.join(_DTYPES)}")


def load(model: Path, dtype: str, **options: object) -> Engine:
    """An engine as the worker starts one; `options` are further fields of EngineConfig."""
    config = EngineConfig.model_validate({"device": "cpu"} | settings(dtype) | options)
    return load_engine(EngineStart(model_folder=str(model), **config.model_dump()))


def prompt_logits(engine: Engine, token_ids: list[int], start: int, num_tokens: int) -> torch.Tensor:
    """Float32 logits [num_tokens, vocabulary] of one sequence's next tokens, into the cache's first blocks.

    What stands before `start` was given by earlier calls.
    """
    blocks = engine.scheduler.block_manager
    table = list(range(blocks.num_blocks_for(len(token_ids))))
    assert isinstance(engine.runner, ModelRunner)
    chunk = ScheduledChunk(token_ids[start : start + num_tokens], start, table, False)
    return engine.runner.prompt_logits([chunk])


class TreadleEngine:
    """Requests in, steps until all have ended."""

    version = treadle.__version__

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._number = 0

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> Generation:
        """See `protocol.Engine`."""
        started = time.perf_counter()
        indices: dict[str, int] = {}
        sampling = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
        for index, prompt in enumerate(prompts):
            self._number += 1
            indices[str(self._number)] = index
            request = AddRequest(request_id=str(self._number), prompt_token_ids=prompt, sampling=sampling)
            self.engine.add_request(request)
        count = len(prompts)
        generation = Generation(0.0, [None] * count, [None] * count, [0] * count)
        while self.engine.has_work:
            outputs = self.engine.step().outputs
            now = time.perf_counter() - started
            for output in outputs:
                if output.error:
                    raise RuntimeError(output.error)
                index = indices[output.request_id]
                if generation.output_tokens[index] == 0:
                    generation.first_token_s[index] = now
                generation.last_token_s[index] = now
                generation.output_tokens[index] += len(output.token_ids)
        return generation


def main() -> None:
    """Serves the protocol."""
    options = arguments(__doc__ or "").parse_args()
    serve(
        lambda: TreadleEngine(
            load(
                Path(options.model),
                options.dtype,
                num_threads=options.threads,
                max_num_seqs=options.max_num_seqs,
                max_model_len=options.max_model_len,
                enable_prefix_caching=options.prefix_caching,
            )
        )
    )


if __name__ == "__main__":
    main()

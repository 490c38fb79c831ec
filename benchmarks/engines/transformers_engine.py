"""transformers' `generate`, eager, with scaled-dot-product attention."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers

from engines.protocol import Generation, arguments, serve

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class _Clock(transformers.StoppingCriteria):
    """Asked after every token; never stops anything."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class TransformersEngine:
    """A model; prompts of one length make a batch without padding, and others are refused."""

    version = transformers.__version__

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> Generation:
        """See `protocol.Engine`."""
        input_ids, clock = torch.tensor(prompts), _Clock()
        started = time.perf_counter()
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
        first, last = clock.times[0] - started, clock.times[-1] - started
        count = len(prompts)
        new_tokens = output.shape[1] - input_ids.shape[1]
        return Generation(0.0, [first] * count, [last] * count, [new_tokens] * count)


def main() -> None:
    """Serves the protocol."""
    options = arguments(__doc__ or "").parse_args()

    def load() -> TransformersEngine:
        torch.set_num_threads(options.threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model, dtype=_DTYPES[options.dtype], attn_implementation="sdpa"
        )
        return TransformersEngine(model.eval())

    serve(load)


if __name__ == "__main__":
    main()

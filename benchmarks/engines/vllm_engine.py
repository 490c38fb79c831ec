"""vLLM's CPU build, as its offline class `LLM` runs it: the model in a worker process, compiled."""

from __future__ import annotations

from typing import Any

import vllm

from engines.protocol import Generation, arguments, serve

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class VllmEngine:
    """One `LLM`. It tells no times of single tokens: asking for them would slow it down."""

    version = vllm.__version__

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> Generation:
        """See `protocol.Engine`."""
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False
        )
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
        )
        unknown = [None] * len(prompts)
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        return Generation(0.0, list(unknown), list(unknown), counts)


def main() -> None:
    """Serves the protocol."""
    options = arguments(__doc__ or "").parse_args()
    serve(
        lambda: VllmEngine(
            vllm.LLM(
                model=options.model,
                dtype=_DTYPES[options.dtype],
                max_model_len=options.max_model_len,
                max_num_seqs=options.max_num_seqs,
                enable_prefix_caching=options.prefix_caching,
                disable_log_stats=True,
            )
        )
    )


if __name__ == "__main__":
    main()

"""llama.cpp through the `xllamacpp` wheel: its server's loop, called in this process."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp

from engines.protocol import Generation, arguments, serve


def parameters(model: str, threads: int, max_num_seqs: int, max_model_len: int) -> Any:
    """llama.cpp's settings: a slot with a cache of its own for each sequence that may run."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = max_num_seqs
    params.n_ctx = max_num_seqs * max_model_len
    params.kv_unified = False
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.n_batch = params.n_ubatch = 512
    params.cache_ram_mib = 0
    params.verbosity = 0
    return params


class LlamaCppEngine:
    """A server without its port; every call is a thread that waits for one completion."""

    version = xllamacpp.__version__

    def __init__(self, params: Any, threads: int) -> None:
        self._server = xllamacpp.Server(params)
        self._pool = ThreadPoolExecutor(threads)

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> Generation:
        """See `protocol.Engine`. The last event of a stream has no token of its own."""
        count = len(prompts)
        generation = Generation(0.0, [None] * count, [None] * count, [0] * count)
        started, lock = time.perf_counter(), threading.Lock()

        def complete(index: int) -> None:
            def heard(event: dict[str, Any]) -> bool:
                now = time.perf_counter() - started
                with lock:
                    if generation.first_token_s[index] is None:
                        generation.first_token_s[index] = now
                    generation.last_token_s[index] = now
                    if usage := event.get("usage"):
                        generation.output_tokens[index] = usage["completion_tokens"]
                return False

            request = {
                "prompt": prompts[index],
                "max_tokens": max_new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "cache_prompt": False,
            }
            self._server.handle_completions(request, heard)

        for done in [self._pool.submit(complete, index) for index in range(count)]:
            done.result()
        return generation


def main() -> None:
    """Serves the protocol."""
    options = arguments(__doc__ or "").parse_args()
    params = parameters(options.model, options.threads, options.max_num_seqs, options.max_model_len)
    serve(lambda: LlamaCppEngine(params, options.max_num_seqs))


if __name__ == "__main__":
    main()

"""What a GPU does with the worker's engine: prompts, single streams and batches, against transformers.

Weights are random, of a known model's shape, so that nothing is fetched: greedy answers make no sense, and
speculation is off. Engines take turns in one process; each has the load once before it is timed. Tells also
what share of a decode step is the time in which the weights and the keys could be read once.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from treadle_worker.config import EngineConfig
from treadle_worker.cuda.memory import release
from treadle_worker.engine import Engine
from treadle_worker.engine_loader import load_engine
from treadle_worker.engine_protocol import AddRequest, EngineStart, SamplingParams

SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, False),
}
"""Hidden and intermediate size, layers, query and key heads, vocabulary, tied."""
LOADS = ((1, 128, 128), (32, 128, 128), (128, 512, 128))
"""Sequences at once, tokens of each prompt and of each answer."""
PROMPT = 1024


def make_model(shape: str, folder: Path) -> LlamaConfig:
    """A random model in bfloat16."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return config


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random ones, no two alike."""
    return [[random.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


class Treadle:
    """The engine, in this process."""

    def __init__(self, folder: Path, backend: str, eager: bool) -> None:
        config = EngineConfig(
            device="cuda",
            attention_backend=backend,
            enforce_eager=eager,
            max_num_seqs=128,
            max_num_batched_tokens=8192,
            max_model_len=2048,
            max_memory_percent=60,
            num_speculative_tokens=0,
            enable_prefix_caching=False,
            max_inter_token_ms=0,
        )
        torch.cuda.synchronize()
        started = time.perf_counter()
        self.engine: Engine = load_engine(EngineStart(model_folder=str(folder), **config.model_dump()))
        self.load_s = time.perf_counter() - started
        self.step_s: list[float] = []

    def generate(self, asked: list[list[int]], new_tokens: int) -> None:
        """All at once, greedily."""
        params = SamplingParams(temperature=0.0, max_new_tokens=new_tokens)
        for index, prompt in enumerate(asked):
            self.engine.add_request(
                AddRequest(request_id=str(index), prompt_token_ids=prompt, sampling=params)
            )
        self.step_s = []
        while self.engine.has_work:
            started = time.perf_counter()
            self.engine.step()
            self.step_s.append(time.perf_counter() - started)

    def close(self) -> None:
        """Lets go of everything."""
        self.engine.close()


class Transformers:
    """`generate`, with its own attention of choice."""

    def __init__(self, folder: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0}
        ).eval()

    @torch.inference_mode()
    def generate(self, asked: list[list[int]], new_tokens: int) -> None:
        """All at once, greedily."""
        ids = torch.tensor(asked, device="cuda")
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )


def timed(run: Callable[[], None]) -> float:
    """Seconds, with everything on the device done."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(generate: Callable[[list[list[int]], int], None], vocabulary: int, runs: int) -> dict[str, float]:
    """Output tokens a second of each load, and prompt tokens a second; medians."""
    found = {}
    for count, length, new in LOADS:
        asked = prompts(count, length, vocabulary)
        generate(asked, 8)
        seconds = statistics.median(timed(lambda: generate(asked, new)) for _ in range(runs))  # noqa: B023
        found[f"{count} x ({length}+{new}) tok/s"] = count * new / seconds
    one = prompts(8, PROMPT, vocabulary)
    generate(one, 1)
    found[f"prefill 8 x {PROMPT} tok/s"] = (
        8 * PROMPT / statistics.median(timed(lambda: generate(one, 1)) for _ in range(runs))
    )
    return found


def floor_s(shape: str, count: int, keys: int, bandwidth: float) -> float:
    """Seconds to read the weights and the keys and values of `count` sequences once."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, _ = SHAPES[shape]
    head = hidden // heads
    layer = hidden * (2 * hidden + 2 * kv_heads * head) + 3 * hidden * intermediate
    weights = 2 * (layers * layer + vocabulary * hidden)
    return (weights + count * keys * layers * 2 * kv_heads * head * 2) / bandwidth


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of a large copy."""
    one = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    other = torch.empty_like(one)
    other.copy_(one)
    seconds = statistics.median(timed(lambda: other.copy_(one)) for _ in range(7))
    return 2 * one.numel() / seconds


def main() -> None:
    """A line a figure, and the last line JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--backend", nargs="+", default=["sdpa"], help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    random.seed(0)
    bandwidth = copy_bandwidth()
    results: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_s": bandwidth,
    }
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            vocabulary = make_model(shape, folder).vocab_size
            engines = [(f"{backend}, graphs", backend, False) for backend in options.backend]
            engines += [(f"{options.backend[0]}, eager", options.backend[0], True)]
            for label, backend, eager in engines:
                ours = Treadle(folder, backend, eager)
                found = measure(ours.generate, vocabulary, options.runs)
                found["load s"] = ours.load_s
                for count, length, new in LOADS:
                    ours.generate(prompts(count, length, vocabulary), new)
                    step = statistics.median(ours.step_s[-new // 2 :])
                    found[f"decode step of {count} ms"] = 1e3 * step
                    keys = length + 3 * new // 4
                    found[f"share of reading, {count}"] = floor_s(shape, count, keys, bandwidth) / step
                found["graphs"] = len(ours.engine.runner.graphs.sizes) if ours.engine.runner.graphs else 0
                ours.close()
                del ours
                _tell(results, f"{shape}, treadle {label}", found)
            if not options.no_peer:
                peer = Transformers(folder)
                _tell(results, f"{shape}, transformers", measure(peer.generate, vocabulary, options.runs))
                del peer
        release(torch.device("cuda"))
    print(json.dumps(results))


def _tell(results: dict[str, object], name: str, found: dict[str, float]) -> None:
    results[name] = {key: float(f"{value:.4g}") for key, value in found.items()}
    print(name, *(f"  {key}: {value:.4g}" for key, value in found.items()), sep="\n", flush=True)


if __name__ == "__main__":
    main()

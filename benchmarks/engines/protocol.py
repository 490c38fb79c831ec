"""How a benchmark talks with an engine: JSON lines on standard input and output.

An engine's script runs in that engine's own environment and knows nothing of Treadle's, so this file needs
the standard library alone. The script loads its model once, says `{"ready": …}`, and answers every
`{"prompts": [[ids]], "max_new_tokens": n, "mode": "batch", "pause_s": 0}` with a `Generation`, until its
input ends. Decoding is greedy and goes past the end of text, so every prompt gets exactly `max_new_tokens`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, TextIO

Mode = Literal["batch", "one"]
"""All prompts at once, or one after another, each after a pause."""


@dataclass
class Generation:
    """What a call took; lists have an entry a prompt, times are seconds since the call's start."""

    wall_s: float = 0.0
    first_token_s: list[float | None] = field(default_factory=list)
    """None where the engine does not tell. In mode "one" since that prompt's start."""
    last_token_s: list[float | None] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)


class Engine(Protocol):
    """A loaded model."""

    version: str

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> Generation:
        """All prompts at once; `wall_s` is filled in by the caller."""
        ...


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every engine's script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="a Hugging Face folder, or a GGUF file for llama.cpp")
    parser.add_argument("--dtype", default="bf16", help="bf16, or what the engine has beside it")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the engine; all cores")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences that run at once")
    parser.add_argument("--max-model-len", type=int, default=2048, help="prompt and answer together")
    parser.add_argument("--prefix-caching", action="store_true", help="reuse the cache of equal beginnings")
    return parser


def serve(load: Callable[[], Engine]) -> None:
    """Loads the engine and answers calls until standard input ends.

    Only answers reach standard output: what libraries print there goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    try:
        engine = load()
    except Exception as error:
        _say(answers, {"error": f"{type(error).__name__}: {error}"})
        raise SystemExit(1) from error
    _say(answers, {"ready": {"version": engine.version, "load_s": time.perf_counter() - started}})
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = _run(engine, call["prompts"], call["max_new_tokens"], call["mode"], call["pause_s"])
        except Exception as error:
            _say(answers, {"error": f"{type(error).__name__}: {error}"})
            raise SystemExit(1) from error
        _say(answers, asdict(answer))


def _run(
    engine: Engine, prompts: list[list[int]], max_new_tokens: int, mode: Mode, pause_s: float
) -> Generation:
    started = time.perf_counter()
    if mode == "batch":
        total = engine.generate(prompts, max_new_tokens)
    else:
        total = Generation()
        for prompt in prompts:
            time.sleep(pause_s)
            one = engine.generate([prompt], max_new_tokens)
            total.first_token_s += one.first_token_s
            total.last_token_s += one.last_token_s
            total.output_tokens += one.output_tokens
    total.wall_s = time.perf_counter() - started
    if total.output_tokens != [max_new_tokens] * len(prompts):
        raise RuntimeError(f"asked for {max_new_tokens} tokens a prompt, got {total.output_tokens}")
    return total


def _say(answers: TextIO, message: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(message), file=answers, flush=True)

"""How surprised is a model by a text? Prints one JSON line: {"perplexity": …}.

The first `--tokens` tokens of the text in windows that do not overlap; of each window every token but the
first is predicted from those before it. Chunked as the engine chunks a prompt, so its own path is measured.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from engines.treadle_engine import load, prompt_logits
from harness import models

from treadle.text.tokenizer import Tokenizer

_CHUNK = 256


def perplexity(folder: Path, ids: list[int], dtype: str, window: int) -> float:
    """Raises ValueError for a form of the weights that the engine does not have."""
    engine = load(folder, dtype, max_num_batched_tokens=_CHUNK, kv_cache_bytes=256 << 20)
    loss, count = 0.0, 0
    for begin in range(0, len(ids), window):
        part = ids[begin : begin + window]
        for start in range(0, len(part), _CHUNK):
            logits = prompt_logits(engine, part, start, _CHUNK)
            targets = torch.tensor(part[start + 1 : start + 1 + _CHUNK], dtype=torch.int64)
            rows = logits[: len(targets)].double().log_softmax(-1)
            loss -= rows.gather(1, targets[:, None]).sum().item()
            count += len(targets)
    return math.exp(loss / count)


def main() -> None:
    """Reads the options, prints the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=models.ALIAS, help="a folder, or a model of the local store (default: %(default)s)"
    )
    parser.add_argument("--text", type=Path, required=True, help="a file of plain text")
    parser.add_argument(
        "--tokens", type=int, default=32_768, help="of the text's start (default: %(default)s)"
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--dtype", default="bf16", help="bf16, int8 or int4 (default: %(default)s)")
    options = parser.parse_args()
    folder = models.find(options.model)
    ids = Tokenizer.load(folder).encode(options.text.read_text(), add_special_tokens=False)[: options.tokens]
    value = perplexity(folder, ids, options.dtype, options.window)
    print(
        json.dumps({"perplexity": value, "model": options.model, "dtype": options.dtype, "tokens": len(ids)})
    )


if __name__ == "__main__":
    main()

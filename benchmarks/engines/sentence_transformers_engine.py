"""sentence-transformers' `encode`, on the CPU, with its own defaults: batches of 32, the longest first.

Runs in its own environment. Says `{"ready": …}` once, and answers every `{"sentences": […], "out": path}`
with `{"wall_s": …}`, the float32 rows written to the path, until its input ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import numpy as np
import sentence_transformers
import torch


def main() -> None:
    """Serves the folder's model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a sentence-transformers folder")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(os.cpu_count() or 1)
    model = sentence_transformers.SentenceTransformer(options.model, device="cpu")
    print(json.dumps({"ready": {"version": sentence_transformers.__version__}}), file=answers, flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        started = time.perf_counter()
        rows = model.encode(call["sentences"], show_progress_bar=False)
        took = time.perf_counter() - started
        np.asarray(rows, "<f4").tofile(call["out"])
        print(json.dumps({"wall_s": took}), file=answers, flush=True)


if __name__ == "__main__":
    main()

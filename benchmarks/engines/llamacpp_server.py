"""llama.cpp's own HTTP server, out of the `xllamacpp` wheel: prints its address, ends with its input."""

from __future__ import annotations

import os
import sys

import xllamacpp

from engines.llamacpp_engine import parameters
from engines.protocol import arguments


def main() -> None:
    """Only the address reaches standard output."""
    options = arguments(__doc__ or "").parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    params = parameters(options.model, options.threads, options.max_num_seqs, options.max_model_len)
    server = xllamacpp.Server(params)
    print(server.listening_address, file=answers, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

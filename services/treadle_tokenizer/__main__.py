"""`python -m treadle_tokenizer`: the tokenizer as a process."""

from __future__ import annotations

import os

from treadle.process import leave_on_sigterm


def main() -> None:
    """Reads the environment and serves until SIGTERM or SIGINT."""
    leave_on_sigterm()
    from treadle.rpc import run_service
    from treadle_tokenizer.config import TokenizerConfig
    from treadle_tokenizer.server import serve

    # The library's own threads would be shared by all requests, so that a large one held up the small ones;
    # it looks at this variable at its first batch.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    run_service("tokenizer", TokenizerConfig, serve)


if __name__ == "__main__":
    main()

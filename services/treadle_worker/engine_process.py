"""The engine's process: `python -m treadle_worker.engine_process --fd N --parent PID`.

It is spawned, never forked, reads what to load from its socket, says that it loads until it is ready, and
then turns: take every command that waits, one step, one message. It blocks only when it has nothing to
do, or when the I/O process reads too slowly. It ends with its parent, at a Shutdown, and after a failure,
which it names first.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from treadle.process import die_with_parent
from treadle.telemetry import configure_logging
from treadle_worker.block_manager import BlockManager
from treadle_worker.engine_protocol import (
    AbortRequest,
    AddRequest,
    EngineCommand,
    EngineCommands,
    EngineEvent,
    EngineStart,
    Failed,
    Loading,
    Ready,
    Shutdown,
)
from treadle_worker.framing import FrameSocket
from treadle_worker.scheduler import Scheduler

if TYPE_CHECKING:
    import torch

    from treadle_worker.engine import Engine

LOADING_INTERVAL_S = 1.0
WARM_ROWS = 1024
"""Of a step; larger ones meet their sizes as they come."""
_log = logging.getLogger(__name__)


def main() -> None:
    """Serves one engine on an inherited socket until the other end closes."""
    parser = argparse.ArgumentParser(prog="treadle_worker.engine_process")
    parser.add_argument("--fd", type=int, required=True, help="an inherited, connected stream socket")
    parser.add_argument("--parent", type=int, required=True, help="the process to die with")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the supervisor decides
    configure_logging("engine")
    frames = FrameSocket(socket.socket(fileno=arguments.fd))
    try:
        serve(frames)
    except (EOFError, ConnectionError):
        _log.info("the worker closed the channel")
    except Exception as error:
        _log.exception("the engine failed")
        with suppress(ConnectionError):
            _send(frames, Failed(message=f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error


def serve(frames: FrameSocket) -> None:
    """Loads what the first message asks for, then runs until Shutdown.

    Raises EOFError or ConnectionError when the other end is gone.
    """
    first, *later = _receive_first(frames)
    start = msgspec.msgpack.decode(first, type=EngineStart)
    engine = _load(frames, start)
    blocks = engine.scheduler.block_manager
    _send(
        frames,
        Ready(
            max_model_len=engine.max_model_len,
            vocab_size=engine.vocab_size,
            num_blocks=blocks.num_blocks,
            block_size=blocks.block_size,
            max_num_seqs=engine.scheduler.max_num_seqs,
            process_id=os.getpid(),
        ),
    )
    decoder = msgspec.msgpack.Decoder(EngineCommands)
    while True:
        messages = [*later, *frames.receive(0.0 if engine.has_work or later else None)]
        later = []
        for message in messages:
            for command in decoder.decode(message).commands:
                if isinstance(command, Shutdown):
                    return
                _apply(engine, command)
        _send(frames, engine.step())


def _receive_first(frames: FrameSocket) -> list[bytes]:
    while not (messages := frames.receive(None)):
        pass
    return messages


def _apply(engine: Engine, command: EngineCommand) -> None:
    match command:
        case AddRequest():
            engine.add_request(command)
        case AbortRequest(request_id=request_id):
            engine.abort(request_id)


def _load(frames: FrameSocket, start: EngineStart) -> Engine:
    """Loads in a thread, and says so meanwhile: the other end counts on a sign of life."""
    with ThreadPoolExecutor(1, thread_name_prefix="load") as executor:
        loading = executor.submit(load_engine, start)
        while not loading.done():
            _send(frames, Loading(stage="loading the model"))
            wait([loading], timeout=LOADING_INTERVAL_S)
        return loading.result()


def load_engine(start: EngineStart) -> Engine:
    """Reads the model and sets aside its cache.

    Raises OSError and ValueError for a folder that is no model of ours, and MemoryError where the cache
    would hold no block.
    """
    import torch

    from treadle.nn.linear import warm_up
    from treadle.nn.loader import load_model
    from treadle_worker.engine import Engine
    from treadle_worker.kv_cache import KVCache, bytes_per_block
    from treadle_worker.model_runner import ModelRunner
    from treadle_worker.sampler import Sampler

    if start.num_threads is not None:
        torch.set_num_threads(start.num_threads)
    device, dtype = choose_device(start.device), getattr(torch, start.dtype)
    model = load_model(Path(start.model_folder), dtype, device)
    with torch.inference_mode():
        warm_up(model, min(start.max_num_batched_tokens, WARM_ROWS))
    block_bytes = bytes_per_block(model.config, start.block_size, dtype)
    num_blocks = start.num_blocks or start.kv_cache_bytes // block_bytes
    if num_blocks < 1:
        raise MemoryError(
            f"kv_cache_bytes = {start.kv_cache_bytes} holds no block: one of {start.block_size} tokens "
            f"takes {block_bytes} bytes"
        )
    cache = KVCache(num_blocks, start.block_size, model.config, dtype, device)
    context = model.config.max_position_embeddings
    return Engine(
        ModelRunner(model, cache),
        Scheduler(
            BlockManager(num_blocks, start.block_size, enable_prefix_caching=start.enable_prefix_caching),
            max_num_seqs=min(start.max_num_seqs, start.max_num_batched_tokens),
            max_num_batched_tokens=start.max_num_batched_tokens,
        ),
        Sampler(),
        vocab_size=model.config.vocab_size,
        max_model_len=min(start.max_model_len or context, context),
    )


def choose_device(name: str) -> torch.device:
    """The device of that name; for "auto" CUDA, then mps, then the CPU.

    Where the accelerator is not there the CPU takes its place, with a warning. Raises RuntimeError and
    ValueError for what is no device of these three kinds.
    """
    import torch

    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    device = torch.device(name)
    if device.type not in there:
        raise ValueError(f"the device {name!r} is not supported; these are: {', '.join(there)}, auto")
    if (device.index or 0) < there[device.type]:
        return device
    _log.warning("the device is not there; the CPU is used", extra={"device": name})
    return torch.device("cpu")


def _send(frames: FrameSocket, event: EngineEvent) -> None:
    frames.send(msgspec.msgpack.encode(event))


if __name__ == "__main__":
    main()

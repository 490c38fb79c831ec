"""The engine's process: `python -m treadle_worker.engine_process --fd N --parent PID`.

It is spawned, never forked, reads what to load from its socket, says that it loads until it is ready, and
then goes round: take every command that waits, one step, one message. It blocks only when it has nothing to
do, when another engine has the turn at the device, or when the I/O process reads too slowly. It ends with its
parent, at a Shutdown, and after a failure, which it names first.

Messages have no thread of their own: to encode and send what 256 sequences got, and to look for commands,
takes 40 to 80 microseconds a step, about what handing it to a thread takes.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from treadle.models.families import is_encoder, read_any_config
from treadle.process import die_with_parent
from treadle.telemetry import configure_logging
from treadle_worker.engine_protocol import (
    AbortRequest,
    AddRequest,
    AddTask,
    EngineCommand,
    EngineCommands,
    EngineEvent,
    EngineStart,
    Failed,
    Loading,
    Ready,
    Shutdown,
    StepOutputs,
    Turn,
    TurnOver,
)
from treadle_worker.framing import FrameSocket

LOADING_INTERVAL_S = 1.0
_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What the process needs of an engine: a decoder's (engine.py) or an encoder's (encoder_engine.py)."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do or say anything."""
        ...

    def ready(self) -> Ready:
        """Its sizes, and what can be asked of it."""
        ...

    def add_request(self, request: AddRequest) -> None:
        """Takes a request in; one that cannot be run is answered by what is said next."""
        ...

    def add_task(self, task: AddTask) -> None:
        """Takes a task in, likewise."""
        ...

    def abort(self, request_id: str) -> None:
        """Drops a request or a task, if it is there."""
        ...

    def shares_device(self) -> None:
        """Another engine uses the device, too: it had it until now, or is about to."""
        ...

    def step(self) -> StepOutputs:
        """Computes one batch, and says what it made and what was decided since it last said anything."""
        ...

    def report(self) -> StepOutputs:
        """What a step says, without computing anything."""
        ...

    def close(self) -> None:
        """Gives back all memory."""
        ...


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
    _send(frames, engine.ready())
    decoder = msgspec.msgpack.Decoder(EngineCommands)
    has_turn = True
    while True:
        is_busy = later or (has_turn and engine.has_work)
        messages = [*later, *frames.receive(0.0 if is_busy else None)]
        later, is_told = [], False
        for message in messages:
            for command in decoder.decode(message).commands:
                if isinstance(command, Shutdown):
                    engine.close()
                    return
                if isinstance(command, Turn):
                    has_turn = command.granted
                    engine.shares_device()
                    if not has_turn:
                        _send(frames, TurnOver())
                else:
                    _apply(engine, command)
                    is_told = True
        if has_turn and engine.has_work:
            _send(frames, engine.step())
        elif is_told:
            _send(frames, engine.report())


def _receive_first(frames: FrameSocket) -> list[bytes]:
    while not (messages := frames.receive(None)):
        pass
    return messages


def _apply(engine: Engine, command: EngineCommand) -> None:
    match command:
        case AddRequest():
            engine.add_request(command)
        case AddTask():
            engine.add_task(command)
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
    """See `engine_loader` and `encoder_loader`; raises what they do.

    torch comes in with them, which takes seconds: the loading thread waits for that.
    """
    if is_encoder(read_any_config(Path(start.model_folder))):
        from treadle_worker.encoder_loader import load_encoder_engine

        return load_encoder_engine(start)
    from treadle_worker.engine_loader import load_engine

    return load_engine(start)


def _send(frames: FrameSocket, event: EngineEvent) -> None:
    frames.send(msgspec.msgpack.encode(event))


if __name__ == "__main__":
    main()

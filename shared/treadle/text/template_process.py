"""The child process that renders chat templates: one JSON object a line in, one out.

    python -m treadle.text.template_process PARENT_PID

A request has `template`, `messages`, `add_generation_prompt`, `special_tokens`, `arguments`,
`max_characters` and `cpu_s`. An answer has `text`; or `refused` (the template raised an exception of its own
on the conversation), `argument` (one that it does not take) or `failed`, with a message for people. The
process bounds its own memory and processor time; whoever started it kills it when its patience is over.
"""

from __future__ import annotations

import json
import resource
import sys
from collections import OrderedDict
from typing import Any, BinaryIO

from treadle.process import die_with_parent
from treadle.text.template_environment import (
    CompiledTemplate,
    RaisedByTemplate,
    TooMuchOutput,
    UnknownArgument,
)

MAX_REQUEST_BYTES = 32 << 20
"""The longest line that is read."""
MAX_MEMORY_BYTES = 512 << 20
"""Address space of the process, Python itself included."""

_MAX_COMPILED = 16
_MAX_MESSAGE = 500


def main(parent: int, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers until the requests end, the memory is used up, or somebody kills it."""
    die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # No file can be written, whatever the sandbox lets through; pipes are not files.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    compiled: OrderedDict[str, CompiledTemplate] = OrderedDict()
    _send(answers, {"ready": True})
    while line := requests.readline(MAX_REQUEST_BYTES):
        try:
            answer = _answer(json.loads(line), compiled)
        except MemoryError:
            # What else went wrong meanwhile nobody knows: a fresh process takes over.
            _send(answers, {"failed": "the template used too much memory", "leaving": True})
            return
        _send(answers, answer)


def _answer(request: dict[str, Any], compiled: OrderedDict[str, CompiledTemplate]) -> dict[str, str]:
    _allow_processor_time(request["cpu_s"])
    try:
        template = _compiled(request["template"], compiled)
        text = template.render(
            request["messages"],
            add_generation_prompt=request["add_generation_prompt"],
            special_tokens=request["special_tokens"],
            arguments=request["arguments"],
            max_characters=request["max_characters"],
        )
        # Half a surrogate pair is no text; say so here and not where the answer is read.
        text.encode()
    except RaisedByTemplate as error:
        return {"refused": _clean(str(error))}
    except UnknownArgument as error:
        return {"argument": _clean(str(error))}
    except TooMuchOutput as error:
        return {"failed": str(error)}
    except MemoryError:
        raise
    except Exception as error:
        return {"failed": _clean(f"{type(error).__name__}: {error}")}
    return {"text": text}


def _compiled(source: str, compiled: OrderedDict[str, CompiledTemplate]) -> CompiledTemplate:
    if source not in compiled:
        compiled[source] = CompiledTemplate(source)
        if len(compiled) > _MAX_COMPILED:
            compiled.popitem(last=False)
    compiled.move_to_end(source)
    return compiled[source]


def _allow_processor_time(seconds: float) -> None:
    """Lets the process live `seconds` of processor time more: it ends even if nobody is there to kill it."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 1, most))


def _clean(message: str) -> str:
    return message.encode(errors="replace").decode()[:_MAX_MESSAGE]


def _send(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)

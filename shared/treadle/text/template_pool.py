"""Renders chat templates in child processes that can be killed.

A template comes with a model, so it is a stranger's program: Jinja's sandbox keeps it from Python's
insides, and a process of its own, with bounds of memory and time, keeps it from everybody else's time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from treadle.errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    TreadleError,
    Unavailable,
    invalid_field,
)
from treadle.text.chat_template import ChatTemplate
from treadle.text.template_process import MAX_REQUEST_BYTES

logger = logging.getLogger(__name__)

REASON = "CHAT_TEMPLATE_FAILED"

_START_TIMEOUT_S = 60.0
_LONGEST_BACKOFF_S = 5.0
# JSON of so much text takes about a millisecond; more goes to a thread.
_SMALL = 1 << 18

T = TypeVar("T")


class TemplatePool:
    """A few children that are started beforehand and replaced when they had to be killed.

    `deadline_s` bounds one rendering, `wait_s` the wait for a child that is free, `max_waiting` how many may
    wait. An async context manager; one event loop owns it.
    """

    def __init__(
        self,
        *,
        size: int = 2,
        deadline_s: float = 2.0,
        wait_s: float = 10.0,
        max_waiting: int = 256,
        max_characters: int = 2 << 20,
    ) -> None:
        self._size = size
        self._deadline_s = deadline_s
        self._wait_s = wait_s
        self._max_waiting = max_waiting
        self._max_characters = max_characters
        self._idle: asyncio.Queue[_Child] = asyncio.Queue()
        self._children: set[_Child] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self.num_killed = 0
        """Children that had to be killed or had died."""

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(self._add() for _ in range(self._size)))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every child."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(child.end() for child in self._children))
        self._children.clear()

    async def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the template makes of the messages.

        Raises InvalidArgument where the template refuses them or does not take an argument,
        FailedPrecondition where it fails, takes too long or too much (all three with the reason
        CHAT_TEMPLATE_FAILED), and ResourceExhausted or Unavailable where no child is free.
        """
        request = {
            "template": template.source,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "special_tokens": dict(template.special_tokens),
            "arguments": dict(arguments or {}),
            "max_characters": self._max_characters,
            "cpu_s": self._deadline_s,
        }
        size = sum(len(value) for message in messages for value in message.values() if isinstance(value, str))
        line = await _beside(_to_line, request, size)
        if len(line) > MAX_REQUEST_BYTES:
            raise invalid_field("messages", f"have {len(line)} bytes; at most {MAX_REQUEST_BYTES}")
        return _text(await self._ask(line))

    async def _ask(self, line: bytes) -> dict[str, Any]:
        child = await self._take()
        try:
            async with asyncio.timeout(self._deadline_s):
                answer = await child.ask(line)
        except BaseException as error:
            # It may still be at work, or half way through a line: it must not get another request.
            self._replace(child)
            if isinstance(error, TimeoutError):
                raise _failed(f"it took longer than {self._deadline_s:g} s") from None
            if isinstance(error, _ChildDied):
                raise _failed("it used too much memory or time") from None
            raise
        parsed: dict[str, Any] = await _beside(json.loads, answer, len(answer))
        if parsed.get("leaving"):
            self._replace(child)
        else:
            self._idle.put_nowait(child)
        return parsed

    async def _take(self) -> _Child:
        if self._waiting >= self._max_waiting:
            raise ResourceExhausted(
                "too many chat templates wait to be rendered", reason="TEMPLATES_BUSY", retry_after_s=1.0
            )
        self._waiting += 1
        try:
            async with asyncio.timeout(self._wait_s):
                while (child := await self._idle.get()).dead:
                    self._replace(child)
                return child
        except TimeoutError:
            raise Unavailable(
                "no process is free to render a chat template", reason="TEMPLATES_BUSY", retry_after_s=1.0
            ) from None
        finally:
            self._waiting -= 1

    def _replace(self, child: _Child) -> None:
        self.num_killed += 1
        child.kill()
        task = asyncio.create_task(self._put_another(child))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _put_another(self, child: _Child) -> None:
        await child.end()
        self._children.discard(child)
        backoff_s = 0.1
        while True:
            try:
                return await self._add()
            except (OSError, _ChildDied, TimeoutError):
                logger.exception("a process for chat templates did not start")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    async def _add(self) -> None:
        child = await _Child.start(max_answer_bytes=8 * self._max_characters + 4096)
        self._children.add(child)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await child.read()
        except BaseException:
            self._children.discard(child)
            await child.end()
            raise
        self._idle.put_nowait(child)


class _ChildDied(Exception):
    """The child closed its side."""


class _Child:
    """One process; a line to it, a line back."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout

    @classmethod
    async def start(cls, *, max_answer_bytes: int) -> _Child:
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "treadle.text.template_process",
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # The service's log is JSON, and Ctrl-C is for the service to handle.
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                # Nothing of this process's environment but where its modules are.
                env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"},
                limit=max_answer_bytes,
            )
        )

    async def ask(self, line: bytes) -> bytes:
        try:
            self._stdin.write(line)
            await self._stdin.drain()
        except ConnectionError as error:
            raise _ChildDied from error
        return await self.read()

    async def read(self) -> bytes:
        try:
            line = await self._stdout.readline()
        except ValueError as error:
            raise _ChildDied("its answer is too long") from error
        if not line.endswith(b"\n"):
            raise _ChildDied
        return line

    @property
    def dead(self) -> bool:
        return self._process.returncode is not None

    def kill(self) -> None:
        if not self.dead:
            self._process.kill()

    async def end(self) -> None:
        """Kills it and waits for its end, which a signal that cannot be refused makes certain."""
        self.kill()
        self._stdin.close()
        await self._process.wait()


def _to_line(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode() + b"\n"


async def _beside(function: Callable[[Any], T], argument: Any, size: int) -> T:
    """Calls it here, or in a thread where so much JSON would hold up the event loop."""
    return function(argument) if size < _SMALL else await asyncio.to_thread(function, argument)


def _text(answer: dict[str, Any]) -> str:
    if "text" in answer:
        return str(answer["text"])
    if "refused" in answer:
        raise InvalidArgument(
            f"the model's chat template refuses the messages: {answer['refused']}", reason=REASON
        )
    if "argument" in answer:
        error: TreadleError = invalid_field("template_arguments_json", answer["argument"], reason=REASON)
        raise error
    raise _failed(answer["failed"])


def _failed(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"the model's chat template failed: {why}", reason=REASON)

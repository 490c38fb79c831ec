"""Dies at a chosen one of the calls that change the disk: for scripts that fork, without threads."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

STEPS = "fsync link rename replace unlink rmdir fchmod mkdir open write pwrite ftruncate".split()
"""What is counted: calls that put bytes on the disk, make them durable, or give them a name."""


class FatalCall:
    """Kills the process just before the call whose number is `fatal`, or in the middle of what it writes."""

    def __init__(self, fatal: int) -> None:
        self._left = fatal

    def install(self) -> None:
        for name in STEPS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                if name in ("write", "pwrite"):
                    descriptor, data, *rest = args
                    call(descriptor, data[: len(data) // 2], *rest)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper


def dies(work: Callable[[], None], *signals: int) -> bool:
    """Does `work` in a fork; whether that was killed by one of `signals` (SIGKILL) before its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the work failed"
        return False
    assert os.WTERMSIG(status) in (signals or (signal.SIGKILL,)), os.WTERMSIG(status)
    return True

"""How processes end: children with their parent, however it dies, and services at SIGTERM from the start.

On Linux the kernel ends the children (PR_SET_PDEATHSIG); the flag survives exec, so any program can be
started under it. Elsewhere a child notices the parent's end by a closed pipe or not at all: the callers that
matter also watch end of file on their channel.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill this process when its parent ends.

    `parent` is the process that must still be there: where it died before the call took effect, this
    process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def leave_on_sigterm() -> None:
    """Ends this process at SIGTERM with exit code 143, until it has another handler.

    The kernel ignores the signal for the first process of a container that has no handler of its own, and a
    service takes a second or more to import what it needs: call this first.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def child_command(command: Sequence[str]) -> list[str]:
    """The command that runs `command` as a child that dies with the calling process.

    The parent-death signal follows the *thread* that started the child: start such children from a
    thread that lives as long as the process.
    """
    return [sys.executable, "-m", "treadle.process", str(os.getpid()), *command]


def _main() -> None:
    parent, *command = sys.argv[1:]
    die_with_parent(int(parent))
    os.execvp(command[0], command)  # noqa: S606 - replaces this process on purpose


if __name__ == "__main__":
    _main()

"""Several answers at once, followed token by token: every index once, whatever happens to the suite."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from composed import Composed, require

_SCRIPT = Path(__file__).with_name("streams.py")
_TIMEOUT_S = 600.0


class Load:
    """Answers that are asked for when it is made, and their history."""

    def __init__(self, suite: Composed, streams: int, tokens: int) -> None:
        self.counts = [0] * streams
        """Tokens that each answer has so far."""
        self.texts: dict[int, str] = {}
        self._tokens = tokens
        self._received: list[list[int]] = [[] for _ in range(streams)]
        self._ends: dict[int, list[int]] = {}
        self._faults: list[str] = []
        self._began = time.monotonic()
        self._last = [self._began] * streams
        self._silences = [0.0] * streams
        self._first: dict[int, float] = {}
        self._process = suite.open_python(_SCRIPT, "gateway:50051", "smollm2", str(streams), str(tokens))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._take(json.loads(line))

    def _take(self, event: dict[str, object]) -> None:
        number = event["stream"]
        assert isinstance(number, int)
        now = time.monotonic()
        if event["event"] == "failed":
            self._faults.append(f"answer {number}: {event['error']}")
        elif event["event"] == "chunk":
            if event["index"] != self.counts[number]:
                self._faults.append(
                    f"answer {number}: index {event['index']} after {self.counts[number]} tokens"
                )
            self._received[number] += event["token_ids"]  # type: ignore[operator]
            self.counts[number] = len(self._received[number])
            if number in self._first:
                self._silences[number] = max(self._silences[number], now - self._last[number])
            self._first.setdefault(number, now - self._began)
            self._last[number] = now
        else:
            self._ends[number] = event["token_ids"]  # type: ignore[assignment]
            self.texts[number] = str(event["text"])
            if event["finish_reason"] != "length" or event["output_tokens"] != self._tokens:
                self._faults.append(f"answer {number}: ended early, {event['finish_reason']}")

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float) -> None:
        """Until the condition holds, while the answers go on."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            require(self._process.poll() is None, f"the answers ended too soon: {self._faults}")
            require(time.monotonic() < deadline, f"not within {timeout_s:.0f} s; tokens: {self.counts}")
            time.sleep(0.05)

    def wait(self) -> dict[int, list[int]]:
        """Until all have ended, whole: the tokens of each."""
        code = self._process.wait(_TIMEOUT_S)
        self._reader.join(_TIMEOUT_S)
        require(code == 0 and not self._faults, f"the answers: exit code {code}, {self._faults}")
        require(len(self._ends) == len(self.counts), f"{len(self._ends)} of {len(self.counts)} answers ended")
        for number, token_ids in self._ends.items():
            require(token_ids == self._received[number], f"answer {number} is not what its chunks were")
            require(len(token_ids) == self._tokens, f"answer {number} has {len(token_ids)} tokens")
        return dict(self._ends)

    def summary(self) -> str:
        """One line, once all have ended."""
        took = max(self._last) - self._began
        total = sum(self.counts)
        first = max(self._first.values())
        return (
            f"{len(self._ends)} of {len(self.counts)} ended whole, every index once: {total} tokens in "
            f"{took:.1f} s, {total / took:.0f} a second, first tokens within {first:.1f} s"
        )

    def longest_silence(self) -> float:
        """Seconds between two chunks of one answer."""
        return max(self._silences)

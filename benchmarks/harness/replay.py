"""Sends requests when they are due, whatever became of those before, and times every token."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from harness.prompts import cut
from harness.trace import Arrival

GAP_S = 0.25
"""The longest p99 gap between tokens with which an answer counts as good."""
DRAIN_S = 30.0
"""With half of the replay's time: what has not ended so long after the last arrival has failed."""


class Target(Protocol):
    """A server."""

    def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        """How many tokens came, event by event; greedy, past the end of text."""
        ...


@dataclass
class Outcome:
    """What became of one request; seconds since the replay's start."""

    at_s: float
    prompt_tokens: int
    new_tokens: int
    times_s: list[float] = field(default_factory=list)
    """Of each token."""
    end_s: float | None = None
    error: str = ""

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)]

    @property
    def is_good(self) -> bool:
        """Whether it ended, and its gaps' p99 was short enough."""
        return self.end_s is not None and (not self.gaps_s or percentile(self.gaps_s, 99) <= GAP_S)


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: of few values, the 99th is the largest."""
    return sorted(values)[max(0, math.ceil(share / 100 * len(values)) - 1)]


async def replay(
    target: Target, arrivals: Sequence[Arrival], text: Path, *, drain_s: float = DRAIN_S
) -> list[Outcome]:
    """An open loop: nobody waits for anybody. Prompts are cut out of the text, another for every arrival."""
    prompts = [cut(f"replay-{index}", 1, one.prompt_tokens, text)[0] for index, one in enumerate(arrivals)]
    outcomes = [Outcome(one.at_s, one.prompt_tokens, one.new_tokens) for one in arrivals]
    started = time.monotonic()
    tasks = [
        asyncio.create_task(_one(target, outcome, prompt, started))
        for outcome, prompt in zip(outcomes, prompts, strict=True)
    ]
    last = arrivals[-1].at_s
    _, late = await asyncio.wait(tasks, timeout=last + last / 2 + drain_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes


async def _one(target: Target, outcome: Outcome, prompt: list[int], started: float) -> None:
    await asyncio.sleep(outcome.at_s - (time.monotonic() - started))
    try:
        async for count in target.stream(prompt, outcome.new_tokens):
            outcome.times_s += [time.monotonic() - started] * count
        outcome.end_s = time.monotonic() - started
    except asyncio.CancelledError:
        outcome.error = "not ended in time"
        raise
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"[:300]


def summary(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """What a replay came to. Rates are over the time from the first arrival to the last end, or token."""
    ended = [one for one in outcomes if one.end_s is not None]
    window = max(outcomes[-1].at_s, *(one.end_s or max(one.times_s, default=0.0) for one in outcomes), 1e-9)
    firsts = [one.times_s[0] - one.at_s for one in outcomes if one.times_s]
    gaps = [gap for one in outcomes for gap in one.gaps_s]
    return {
        "requests": len(outcomes),
        "ended": len(ended),
        "good": sum(one.is_good for one in outcomes),
        "goodput_per_s": sum(one.is_good for one in outcomes) / window,
        "ended_per_s": len(ended) / window,
        "output_per_s": sum(len(one.times_s) for one in outcomes) / window,
        "first_token_s": _percentiles(firsts),
        "gap_s": _percentiles(gaps),
        "window_s": window,
        "errors": sorted({one.error for one in outcomes if one.error})[:5],
    }


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{share}": percentile(values, share) if values else None for share in (50, 90, 99)}

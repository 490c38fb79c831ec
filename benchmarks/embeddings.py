"""Embeddings through the whole suite: how near, and how fast? The packaged all-MiniLM, 1,000 sentences.

The suite serves the model in float32, and once more with int8 products; its client runs on the same cores.
sentence-transformers takes turns with it on the same sentences, in its own process, with its own defaults.
Nearness is told against its rows: the largest difference of any number in float32, the cosine in int8.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from harness import models
from harness.engine import EngineFailed
from harness.places import MissingPeer
from harness.prompts import default_text
from harness.rows import against, alone
from harness.script import Record, run
from harness.sentence_transformers import SentenceTransformers, sentence_transformers
from harness.sentences import sentences
from harness.suite import suite

from treadle.client import AsyncClient

COUNT, QUICK_COUNT = 1000, 100
BATCH = 32
"""Sentences a request, as many as sentence-transformers has in a batch."""
IN_FLIGHT = 8
_TIMEOUT_S = 300.0


def measure(record: Record) -> None:
    """Both take turns, first with the suite in float32, then in int8."""
    options = record.options
    count = QUICK_COUNT if options.quick else COUNT
    with contextlib.ExitStack() as stack:
        peer = None
        try:
            peer = stack.enter_context(sentence_transformers(models.folder(models.EMBEDDER)))
        except (MissingPeer, EngineFailed) as error:
            record.note(str(error))
        paces: dict[str, dict[str, list[float]]] = {}
        for form in ("float32", "int8"):
            quantization = "" if form == "float32" else form
            # Each form is held against the peer's own turns beside it: a machine changes its pace.
            ours, theirs = list[float](), list[float]()
            paces[form] = {"treadle": ours, "sentence-transformers": theirs}
            with suite("fp32", served=(models.EMBEDDER,), quantization=quantization) as running:
                for turn in ("warm-up", *range(options.runs)):
                    lines = sentences(options.text, count, turn)
                    rows, took = asyncio.run(_embed(running.address, lines))
                    exact, peer_took = (None, 0.0) if peer is None else peer.encode(lines)
                    if turn == "warm-up":
                        _tell_nearness(record, form, rows, exact)
                        continue
                    ours.append(count / took)
                    if exact is not None:
                        theirs.append(count / peer_took)
        record.runs["sentences_per_s"] = paces
        _tell_pace(record, paces, peer)


def _tell_nearness(record: Record, form: str, rows: np.ndarray, exact: np.ndarray | None) -> None:
    if exact is None:
        return
    if form == "float32":
        record.add(
            alone("all-MiniLM in float32, largest difference", float(abs(rows - exact).max()), "<= 1e-4 of 1")
        )
        return
    cosines = (rows * exact).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(exact, axis=1)
    record.note(f"int8: lowest cosine of {len(rows)} sentences {cosines.min():.5f}")
    record.add(alone("all-MiniLM in int8, mean cosine with fp32", float(cosines.mean()), ">= 0.999 cosine"))


def _tell_pace(
    record: Record, paces: dict[str, dict[str, list[float]]], peer: SentenceTransformers | None
) -> None:
    if peer is not None:
        record.note(f"against sentence-transformers {peer.version}")
    for form, of_form in paces.items():
        ours, theirs = (_median(readings) for readings in of_form.values())
        record.add(against(f"sentences/s of mixed length, {form}", ours, theirs, ">= 1.5"))


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


async def _embed(address: str, lines: Sequence[str]) -> tuple[np.ndarray, float]:
    """Float32 [lines, dimensions], and the seconds from the first request to the last answer."""
    async with AsyncClient(address, model=models.EMBEDDER, timeout_s=_TIMEOUT_S) as client:
        free = asyncio.Semaphore(IN_FLIGHT)

        async def one(start: int) -> np.ndarray:
            async with free:
                answer = await client.embed(lines[start : start + BATCH])
                return np.frombuffer(answer.data, "<f4").reshape(answer.shape)

        begun = time.monotonic()
        parts = await asyncio.gather(*(one(start) for start in range(0, len(lines), BATCH)))
        return np.concatenate(parts), time.monotonic() - begun


def add_options(parser: argparse.ArgumentParser) -> None:
    """The text."""
    parser.add_argument("--text", type=Path, default=default_text(), help="default: %(default)s")


if __name__ == "__main__":
    raise SystemExit(run("embeddings", __doc__, measure, add_options, runs=5))

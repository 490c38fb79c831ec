"""An engine over a model that is a hash: what it says depends on every token before, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from treadle_worker.batch import ScheduledChunk
from treadle_worker.block_manager import BlockManager
from treadle_worker.engine import Engine
from treadle_worker.engine_protocol import (
    AddRequest,
    AddTask,
    SamplingParams,
    SequenceOutput,
    TaskInput,
    TaskOutput,
)
from treadle_worker.sampler import Sampler
from treadle_worker.scheduler import Scheduler
from treadle_worker.speculation import Speculation

VOCAB = 50
BROKEN = 49
"""A token after which the mock model's logits are not finite."""


class MockRunner:
    """A model whose logits are a hash of all tokens before; it keeps them in a cache of its own.

    With a `habit` it likes to say the same token behind the same token, in that share of its positions.
    """

    def __init__(self, num_blocks: int, block_size: int, habit: float = 0.0) -> None:
        self.slots: list[list[tuple[int, bool]]] = [[(0, False)] * block_size for _ in range(num_blocks)]
        self.block_size = block_size
        self.habit = habit
        self.num_chunks = 0
        self.num_rows: list[int] = []
        """Of logits, step by step."""

    def run(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        self.num_chunks += len(chunks)
        rows: list[torch.Tensor] = []
        for chunk in chunks:
            states = self._write(chunk)
            first = len(states) - chunk.num_logits
            rows += [
                self._row(*state, token)
                for state, token in zip(states[first:], chunk.token_ids[first:], strict=True)
            ]
        self.num_rows.append(len(rows))
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)

    def close(self) -> None:
        self.slots.clear()

    def _write(self, chunk: ScheduledChunk) -> list[tuple[int, bool]]:
        state = (0, False)
        if chunk.start:
            before = chunk.start - 1
            state = self.slots[chunk.block_table[before // self.block_size]][before % self.block_size]
        states = []
        for position, token in enumerate(chunk.token_ids, chunk.start):
            state = (hash((state[0], token)), state[1] or token == BROKEN)
            self.slots[chunk.block_table[position // self.block_size]][position % self.block_size] = state
            states.append(state)
        return states

    def _row(self, digest: int, broken: bool, token: int) -> torch.Tensor:
        row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(digest & 0xFFFFFFFF)) * 2
        if digest % 1000 < self.habit * 1000:
            row[token * 7 % 9] += 9.0
        row[BROKEN] = -50.0  # never drawn by itself
        if broken:
            row[3] = torch.nan
        return row


def make_engine(
    *,
    num_blocks: int = 32,
    block_size: int = 4,
    max_model_len: int = 100,
    caching: bool = True,
    seqs: int = 8,
    budget: int = 16,
    habit: float = 0.0,
    speculation: Speculation | None = None,
    max_score_rows: int = 256,
) -> Engine:
    return Engine(
        MockRunner(num_blocks, block_size, habit),
        Scheduler(
            BlockManager(num_blocks, block_size, enable_prefix_caching=caching),
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            speculation=speculation,
            max_score_rows=max_score_rows,
        ),
        Sampler(),
        vocab_size=VOCAB,
        max_model_len=max_model_len,
    )


def request(
    request_id: str, prompt: list[int], *, output: Sequence[int] = (), **fields: object
) -> AddRequest:
    own = {name: fields.pop(name) for name in ("priority", "cache_salt") if name in fields}
    return AddRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        output_token_ids=list(output),
        sampling=SamplingParams(**{"max_new_tokens": 8, "logprobs": 2, **fields}),
        **own,
    )


def run(engine: Engine, *requests: AddRequest) -> dict[str, list[SequenceOutput]]:
    """All outputs by request, once everything has ended; each says where its tokens stand."""
    for each in requests:
        engine.add_request(each)
    outputs: dict[str, list[SequenceOutput]] = {each.request_id: [] for each in requests}
    begun = {each.request_id: len(each.output_token_ids) for each in requests}
    for _ in range(10_000):
        if not engine.has_work:
            break
        for output in engine.step().outputs:
            said = outputs[output.request_id]
            assert output.first_index == begun[output.request_id] + sum(len(o.token_ids) for o in said)
            assert not (said and said[-1].finish_reason), "something came after the end"
            said.append(output)
    assert not engine.has_work
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert all(said[-1].finish_reason for said in outputs.values())
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def score_task(request_id: str, *inputs: tuple[list[int], int], **fields: object) -> AddTask:
    """Of texts, each with the place where what is scored begins."""
    texts = [TaskInput(token_ids=tokens, first=first) for tokens, first in inputs]
    return AddTask(request_id=request_id, task="score", inputs=texts, **fields)


def run_tasks(engine: Engine, *commands: AddTask | AddRequest) -> dict[str, TaskOutput]:
    """The output of each task, once it and everything beside it has ended; each comes once."""
    for command in commands:
        if isinstance(command, AddTask):
            engine.add_task(command)
        else:
            engine.add_request(command)
    outputs: dict[str, TaskOutput] = {}
    for _ in range(10_000):
        if not engine.has_work:
            break
        for output in engine.step().task_outputs:
            assert output.request_id not in outputs, "a task ended twice"
            outputs[output.request_id] = output
    assert not engine.has_work
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert outputs.keys() == {one.request_id for one in commands if isinstance(one, AddTask)}
    return outputs


def read_scores(data: bytes) -> list[tuple[int, float]]:
    """The likeliest token and the given one's log-probability, of each token that was scored."""
    return [tuple(one) for one in np.frombuffer(data, "<u4,<f4").tolist()]

"""What becomes of a model's numbers, with a model that says what the test wants."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from treadle_worker.encoder_engine import TextWork
from treadle_worker.encoder_runner import EncoderRunner
from treadle_worker.engine_protocol import AddTask, TaskInput


class MockModel:
    """Says the same rows, whatever it is given: one a text, or one a token of a tagger."""

    def __init__(self, head: str, rows: torch.Tensor) -> None:
        self.config = SimpleNamespace(head=head)
        self._rows = rows

    def __call__(self, batch: object) -> torch.Tensor:
        return self._rows

    def sequence_logits(self, hidden: torch.Tensor, lengths: object) -> torch.Tensor:
        return hidden

    def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def run(head: str, rows: torch.Tensor, lengths: list[int], **fields: object) -> list[np.ndarray | None]:
    runner = EncoderRunner(MockModel(head, rows), torch.device("cpu"))  # type: ignore[arg-type]
    task = AddTask(request_id="x", inputs=[], **fields)  # type: ignore[arg-type]
    return runner.run([TextWork(TaskInput(token_ids=[1] * length), task) for length in lengths])


@pytest.mark.parametrize("activation", ["", "softmax", "sigmoid"])
@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_no_activation_hides_a_logit_that_is_not_finite(activation, wrong):
    rows = torch.tensor([[0.5, 1.0], [wrong, 1.0], [-1.0, 2.0]])
    results = run("sequence", rows, [1, 1, 1], task="classify", activation=activation)
    assert [result is None for result in results] == [False, True, False]


def test_a_result_holds_no_memory_but_its_own():
    """A task may keep one for as long as its other texts wait."""
    made = {
        "sequence": run("sequence", torch.rand(8, 3), [1] * 8, task="classify"),
        "token": run("token", torch.rand(8, 3), [2] * 4, task="tag"),
        "": run("", torch.rand(8, 3), [2] * 4, task="embed", pooling="mean"),
    }
    checked = 0
    for head, results in made.items():
        for result in results:
            assert result is not None
            assert result.base is None, head
            checked += 1
    print(f"{checked} results, each on its own")
    assert checked == 16

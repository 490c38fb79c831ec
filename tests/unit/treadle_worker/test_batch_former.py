"""Batches of texts, over random traces: all of them once, within the budget, in a fair order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle_worker.batch_former import ELDEST_STEPS, MAX_SKIPS, WINDOW_STEPS, BatchFormer, Text

BUDGET = 64
LONG = 128.0
"""Attention costs as much as all else in a text of so many tokens."""


def former(budget: int = BUDGET) -> BatchFormer:
    return BatchFormer(budget, quadratic_tokens=LONG)


def drained(batches: BatchFormer) -> list[list[Text]]:
    made = []
    while batches.num_waiting:
        made.append(batches.form())
    assert batches.form() == []
    return made


class Model:
    """What a plain list says of the same commands."""

    def __init__(self) -> None:
        self.waiting: dict[str, dict[int, int]] = {}
        self.priorities: dict[str, int] = {}
        self.arrivals: list[str] = []

    def add(self, task_id: str, lengths: Sequence[int], priority: int) -> None:
        self.waiting[task_id] = dict(enumerate(lengths))
        self.priorities[task_id] = priority

    def abort(self, task_id: str) -> None:
        self.waiting.pop(task_id, None)

    def check(self, batches: BatchFormer, batch: list[Text]) -> None:
        """The batch is one that may be made of what waits; takes it out."""
        assert bool(batch) == bool(self.waiting)
        for text in batch:
            assert self.waiting[text.task_id].pop(text.index) == text.num_tokens, "each text once"
        if len(batch) > 1:
            assert sum(text.cost for text in batch) <= batches.max_num_batched_tokens + 1e-6
        lengths = [text.num_tokens for text in batch]
        assert lengths == sorted(lengths), "those of equal length lie side by side"
        lowest = min((self.priorities[text.task_id] for text in batch), default=0)
        left = [self.priorities[task_id] for task_id, texts in self.waiting.items() if texts]
        assert all(priority <= lowest for priority in left), "nobody of a lower priority goes first"
        self.waiting = {task_id: texts for task_id, texts in self.waiting.items() if texts}


COMMANDS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.lists(st.integers(1, 90), min_size=1, max_size=30),
            st.integers(-1, 1),
        ),
        st.tuples(st.just("abort"), st.integers(0, 40)),
        st.tuples(st.just("form")),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(COMMANDS)
def test_every_text_is_computed_once_within_the_budget(commands):
    batches, model, added = former(), Model(), 0
    for command in commands:
        if command[0] == "add":
            model.add(str(added), command[1], command[2])
            batches.add(str(added), command[1], command[2])
            added += 1
        elif command[0] == "abort":
            model.abort(str(command[1]))
            batches.abort(str(command[1]))
        else:
            model.check(batches, batches.form())
        assert batches.num_waiting == sum(len(texts) for texts in model.waiting.values())
    for _ in range(10_000):
        if not model.waiting:
            break
        model.check(batches, batches.form())
    assert batches.form() == []
    assert not batches._queues


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=40), min_size=1, max_size=8))
def test_the_head_of_the_line_is_always_in_the_batch(tasks):
    """Of every task that waits, the one that was given the least tokens comes first."""
    batches = former()
    for number, lengths in enumerate(tasks):
        batches.add(str(number), lengths)
    steps = 0
    while batches.num_waiting:
        queue = batches._queues[0]
        queue.fill(WINDOW_STEPS * BUDGET)
        head = min(queue.window)
        assert all(head.tag <= tag for tag, _, _ in queue.tasks)
        steps += 1
        batch = batches.form()
        assert head in batch or steps % ELDEST_STEPS == 0
        eldest = min([head.order, *(text.order for text in queue.window), *(a for _, a, _ in queue.tasks)])
        assert steps % ELDEST_STEPS or any(text.order <= eldest for text in batch)
    assert steps


def test_batches_are_full_and_of_near_lengths(rng):
    batches = former(2048)
    lengths = [rng.randint(5, 60) for _ in range(5_000)]
    batches.add("one", lengths)
    made = drained(batches)
    costs = [sum(text.cost for text in batch) for batch in made]
    kinds = sum(len({text.num_tokens for text in batch}) for batch in made) / len(made)
    size = len(lengths) // len(made)
    in_order = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    unsorted_kinds = sum(len(set(some)) for some in in_order) / len(in_order)
    print(f"{len(made)} batches, full to {sum(costs) / len(costs) / 2048:.0%}")
    print(f"{size} texts each, of {kinds:.1f} lengths; {unsorted_kinds:.1f} in their own order")
    assert sum(costs[:-WINDOW_STEPS]) / (len(costs) - WINDOW_STEPS) > 0.95 * 2048
    assert kinds < unsorted_kinds * 0.6


def test_a_large_task_does_not_hold_up_small_ones(rng):
    """Small tasks that come while a large one is computed end within a few steps, however much is left."""
    batches = former(256)
    batches.add("large", [rng.randint(5, 60) for _ in range(5_000)])
    waited: list[int] = []
    for number in range(100):
        for _ in range(rng.randint(0, 3)):
            batches.form()
        batches.add(f"small-{number}", [rng.randint(5, 60)])
        for steps in range(1, 1_000):
            if any(text.task_id == f"small-{number}" for text in batches.form()):
                waited.append(steps)
                break
    print(f"{len(waited)} small tasks beside a large one: {Counter(waited)} steps")
    assert len(waited) == 100
    assert max(waited) <= WINDOW_STEPS
    assert batches.num_waiting > 500, "the large one is not done"


def test_tasks_of_one_priority_share_the_tokens(rng):
    batches = former(256)
    for number in range(4):
        batches.add(str(number), [rng.randint(5, 60) for _ in range(1_000)])
    given_tokens: Counter[str] = Counter()
    for _ in range(200):
        for text in batches.form():
            given_tokens[text.task_id] += text.cost
    print({task_id: round(cost) for task_id, cost in given_tokens.items()})
    assert len(given_tokens) == 4
    slack = (WINDOW_STEPS + 1) * 256
    assert max(given_tokens.values()) - min(given_tokens.values()) <= slack


def test_a_text_of_another_length_is_not_left_out_for_ever(rng):
    """One long text among floods of short ones, which would fill every step."""
    batches = former(256)
    batches.add("others", [5] * 400)
    batches.form()
    batches.add("long", [150])
    batches.add("more", [5] * 10_000)
    steps = 0
    while not any(text.task_id == "long" for text in batches.form()):
        steps += 1
    print(f"the long one came after {steps} steps")
    assert steps <= MAX_SKIPS + 2


@pytest.mark.parametrize("budget", [None, 64.0])
def test_new_small_tasks_without_an_end_starve_nobody(rng, budget):
    """As many clients as fill every step ask again as soon as they are answered."""
    batches = former(256)
    batches.add("large", [60, 200] * 20)
    waiting: set[str] = set()
    steps = asked = got = 0
    while got < 40:
        while len(waiting) < 60:
            batches.add(str(asked), [rng.randint(5, 20)])
            waiting.add(str(asked))
            asked += 1
        for text in batches.form(budget):
            waiting.discard(text.task_id)
            got += text.task_id == "large"
        steps += 1
        assert steps <= 40 * ELDEST_STEPS
    print(f"the large task's 40 texts took {steps} steps beside {asked - len(waiting)} small tasks")
    assert asked > 200


def test_a_text_larger_than_the_budget_goes_alone():
    batches = former(32)
    batches.add("whole", [500, 3, 500])
    made = drained(batches)
    assert sorted(tuple(text.num_tokens for text in batch) for batch in made) == [(3,), (500,), (500,)]


def test_a_smaller_budget_for_one_step(rng):
    batches = former(256)
    batches.add("some", [rng.randint(1, 20) for _ in range(300)])
    small = batches.form(20.0)
    assert 1 <= sum(text.cost for text in small) <= 20.0 or len(small) == 1
    assert sum(text.cost for text in batches.form(1e9)) <= 256


def test_what_cannot_be_is_refused():
    batches = former()
    batches.add("there", [1])
    for task_id, lengths in (("there", [1]), ("empty", []), ("none", [3, 0])):
        with pytest.raises(ValueError, match=task_id):
            batches.add(task_id, lengths)
    with pytest.raises(ValueError):
        BatchFormer(0, quadratic_tokens=1)
    assert batches.num_waiting == 1


def test_priorities_go_first_in_the_next_step():
    rng = random.Random(1)
    batches = former(64)
    batches.add("low", [rng.randint(1, 20) for _ in range(200)], priority=-1)
    batches.form()
    batches.add("high", [10] * 10, priority=1)
    firsts = [{text.task_id for text in batches.form()} for _ in range(3)]
    assert "high" in firsts[0]
    assert firsts[0] == {"high"}

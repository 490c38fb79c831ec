"""Classify: which activation, whose labels, in which order."""

from __future__ import annotations

import struct

import pytest

from treadle.errors import Internal, InvalidArgument
from treadle_gateway.tasks import classification
from treadle_gateway.tasks.task import ClassifyTask, TextInput

LABELS = ("bad", "so-so", "good")
ONE = (TextInput("one two"),)


@pytest.mark.parametrize(
    ("asked", "folder", "labels", "activation"),
    [
        (None, False, LABELS, "softmax"),
        (None, True, LABELS, "sigmoid"),
        (True, False, LABELS, "sigmoid"),
        (False, True, LABELS, "softmax"),
        (False, False, ("only",), "sigmoid"),
    ],
)
async def test_the_activation(plan, asked, folder, labels, activation):
    task = ClassifyTask(inputs=ONE, multi_label=asked)
    made = await plan(classification, task, labels=labels, multi_label=folder)
    assert made.work.activation == activation


async def test_labels_come_best_first_and_equal_ones_in_their_order(plan):
    made = await plan(classification, ClassifyTask(inputs=ONE * 3), labels=LABELS)
    rows = made.read(struct.pack("<9f", 0.25, 0.5, 0.25, 0.125, 0.125, 0.75, 0.5, 0.5, 0.5)).rows
    assert rows == [
        [("so-so", 0.5), ("bad", 0.25), ("good", 0.25)],
        [("good", 0.75), ("bad", 0.125), ("so-so", 0.125)],
        [("bad", 0.5), ("so-so", 0.5), ("good", 0.5)],
    ]
    best = await plan(classification, ClassifyTask(inputs=ONE, top_k=1), labels=LABELS)
    assert best.read(struct.pack("<3f", 0.25, 0.5, 0.25)).rows == [[("so-so", 0.5)]]
    all_of_them = await plan(classification, ClassifyTask(inputs=ONE, top_k=99), labels=LABELS)
    assert len(all_of_them.read(bytes(12)).rows[0]) == 3


async def test_pairs_have_types(plan):
    task = ClassifyTask(inputs=(TextInput("one two", "three"), TextInput("four")))
    pair, single = (await plan(classification, task, labels=LABELS)).inputs
    assert (list(pair.ids), list(pair.type_ids)) == ([1, 13, 13, 2, 15, 2], [0, 0, 0, 0, 1, 1])
    assert not single.type_ids
    for other in ("roberta", "distilbert"):
        pair, _ = (await plan(classification, task, model_type=other, labels=LABELS)).inputs
        assert not pair.type_ids
    long = ClassifyTask(inputs=(TextInput("a", "word " * 30),))
    with pytest.raises(InvalidArgument, match=r"inputs\[0\]: has 34 tokens"):
        await plan(classification, long, labels=LABELS)


async def test_a_result_of_another_size_is_the_workers_fault(plan):
    made = await plan(classification, ClassifyTask(inputs=ONE), labels=LABELS)
    for wrong in (b"", bytes(8), bytes(16), struct.pack("<3f", 1, float("nan"), 0)):
        with pytest.raises(Internal):
            made.read(wrong)


async def test_so_many_labels_that_they_would_fill_the_memory_are_refused(plan, tokenizer):
    many = tuple(map(str, range(1 << 16)))
    await plan(classification, ClassifyTask(inputs=ONE * 16), labels=many)
    with pytest.raises(InvalidArgument, match=r"inputs: have 1114112 labels in all, 65536 each"):
        await plan(classification, ClassifyTask(inputs=ONE * 17), labels=many)
    assert len(tokenizer.asked) == 1

"""Questions with choices: reading them, and what their log-likelihoods say of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import FieldViolation, InvalidArgument

MAX_CHOICES = 64
_MAX_FAULTS = 16


@dataclass(frozen=True, slots=True)
class Question:
    """A context, what may follow, and the index of what should."""

    context: str
    choices: tuple[str, ...]
    label: int

    def continuation(self, choice: str, separator: str) -> str:
        """What is scored: the choice behind the separator, where there is something to separate it from."""
        return separator + choice if self.context else choice


def read_questions(path: Path) -> list[Question]:
    """JSONL of {"context", "choices", "label"}; blank lines are left out.

    Raises InvalidArgument (EVALUATION_FILE_INVALID) that names every fault's line and field, up to 16.
    """
    questions: list[Question] = []
    faults: list[FieldViolation] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            found = _question(raw)
            if isinstance(found, Question):
                questions.append(found)
            else:
                field, description = found
                where = f"line {number}: {field}" if field else f"line {number}"
                faults.append(FieldViolation(where, description))
                if len(faults) == _MAX_FAULTS:
                    break
    if faults:
        more = " at least" if len(faults) == _MAX_FAULTS else ""
        raise InvalidArgument(
            f"{path}: {len(faults)} faults{more}; nothing was sent"
            if len(faults) > 1
            else f"{path}: {faults[0].field}: {faults[0].description}; nothing was sent",
            reason="EVALUATION_FILE_INVALID",
            fields=faults,
        )
    if not questions:
        raise InvalidArgument(f"{path} has no questions", reason="EVALUATION_FILE_INVALID")
    return questions


def _question(raw: bytes) -> Question | tuple[str, str]:
    """A question, or the field at fault and what is wrong with it."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return "", f"no JSON in UTF-8: {error}"
    if not isinstance(record, dict):
        return "", 'must be an object of "context", "choices" and "label"'
    context, choices, label = (record.get(name) for name in ("context", "choices", "label"))
    if not isinstance(context, str):
        return "context", "must be a string"
    if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_CHOICES:
        return "choices", f"must be a list of 2 to {MAX_CHOICES} strings"
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            return f"choices[{index}]", "must be a string with something in it"
    if isinstance(label, bool) or not isinstance(label, int):
        return "label", "must be the index of the right choice, a number from 0"
    if not 0 <= label < len(choices):
        return (
            "label",
            f"labels that do not fit: {label} is none of {len(choices)} choices, 0 to {len(choices) - 1}",
        )
    return Question(context, tuple(choices), label)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the model chose: by log-likelihood, and by log-likelihood a byte of the choice."""

    label: int
    logprobs: tuple[float, ...]
    chosen: int
    chosen_norm: int

    @property
    def correct(self) -> bool:
        """By log-likelihood."""
        return self.chosen == self.label

    @property
    def correct_norm(self) -> bool:
        """By log-likelihood a byte."""
        return self.chosen_norm == self.label


def verdict(question: Question, logprobs: Sequence[float]) -> Verdict:
    """The choice of the greatest log-likelihood, with and without division by its length in UTF-8 bytes.

    The division is lm-evaluation-harness' `acc_norm`, which counts characters: the same for ASCII. Of equals
    the first is taken.
    """
    by_byte = [
        logprob / len(choice.encode(errors="replace"))
        for logprob, choice in zip(logprobs, question.choices, strict=True)
    ]
    return Verdict(
        question.label, tuple(logprobs), logprobs.index(max(logprobs)), by_byte.index(max(by_byte))
    )


def accuracy(correct: Sequence[bool]) -> tuple[float, float]:
    """The share that is correct and its standard error, sqrt(p(1-p)/(n-1)); of one question 0."""
    n = len(correct)
    share = sum(correct) / n
    return share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0

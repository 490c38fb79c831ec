"""Tokens' labels as spans of the text, as Transformers' token classification pipeline makes them.

"B-" begins an entity and "I-" goes on with one; a label without either goes on with its own. What becomes of
words whose tokens disagree is the aggregation's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from treadle_gateway.tasks.task import Aggregation
from treadle_gateway.tasks.work import Span

OUTSIDE = "O"

StartsWord = Callable[[int], bool]
"""Whether the token of this place begins a word; it is asked of all tokens but the first."""


def spans(
    tokens: Sequence[Span], aggregation: Aggregation, starts_word: StartsWord, *, include_outside: bool
) -> list[Span]:
    """The spans of a text; `tokens` are all but the special ones, each with its own label and number."""
    found: Iterable[Span] = tokens
    if aggregation in (Aggregation.FIRST, Aggregation.MAX):
        found = [_word(one, aggregation) for one in _words(tokens, starts_word)]
    if aggregation is not Aggregation.NONE:
        found = [_entity(group) for group in _groups(found)]
    return [span for span in found if include_outside or span.label != OUTSIDE]


def _words(tokens: Sequence[Span], starts_word: StartsWord) -> list[list[Span]]:
    words: list[list[Span]] = []
    for place, token in enumerate(tokens):
        if words and not starts_word(place):
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _word(tokens: Sequence[Span], aggregation: Aggregation) -> Span:
    """A word with the label of its first token, or of its surest one."""
    chosen = tokens[0] if aggregation is Aggregation.FIRST else max(tokens, key=lambda token: token.score)
    return replace(chosen, start=tokens[0].start, end=tokens[-1].end)


def _groups(spans: Iterable[Span]) -> list[list[Span]]:
    """Neighbours of one entity."""
    groups: list[list[Span]] = []
    last = ""
    for span in spans:
        begins, entity = _tag(span.label)
        if groups and entity == last and not begins:
            groups[-1].append(span)
        else:
            groups.append([span])
        last = entity
    return groups


def _tag(label: str) -> tuple[bool, str]:
    """Whether the label begins an entity, and which one."""
    if label.startswith(("B-", "I-")):
        return label.startswith("B-"), label[2:]
    return False, label


def _entity(group: Sequence[Span]) -> Span:
    """The group as one span: what is behind the first hyphen of its label, and the mean of its numbers."""
    return Span(
        start=group[0].start,
        end=group[-1].end,
        label=group[0].label.split("-", 1)[-1],
        score=sum(one.score for one in group) / len(group),
    )

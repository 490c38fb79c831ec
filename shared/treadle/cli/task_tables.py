"""Answers of tasks as people read them in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text as Styled

from treadle.cli.console import printable, result_console
from treadle.cli.task_records import Query
from treadle.client import Classifications, Embeddings, Ranking, Scores, TaggedTexts
from treadle.client.task_request import Text

_WIDTH = 60
_BAR = 20
_STYLES = ("cyan", "magenta", "yellow", "green", "blue", "red")


def show_embeddings(texts: Sequence[Text], answer: Embeddings) -> None:
    """Each vector's beginning; of several texts, how near each is to the first."""
    console = result_console()
    rows = answer.rows
    for text, row in zip(texts, rows, strict=True):
        numbers = " ".join(f"{number:+.3f}" for number in row[:6])
        near = f"  cosine to the first {_cosine(rows[0], row):.3f}" if len(rows) > 1 else ""
        console.print(Styled.assemble((_short(text), "bold"), near))
        console.print(f"  {len(row)} dimensions, length {_length(row):.3f}: {numbers} …", style="dim")


def show_labels(texts: Sequence[Text], answer: Classifications) -> None:
    """Labels with their per cent, best first."""
    console = result_console()
    for text, labels in zip(texts, answer.labels, strict=True):
        console.print(Styled(_short(text), "bold"))
        for place, one in enumerate(labels):
            bar = "█" * round(max(0.0, min(1.0, one.score)) * _BAR)
            line = f"  {one.score:>6.1%}  {bar:<{_BAR}}  {printable(one.label)}"
            console.print(Styled(line, "" if place == 0 else "dim"))


def show_spans(texts: Sequence[Text], answer: TaggedTexts) -> None:
    """Each text with its spans marked, and a line a span."""
    console = result_console()
    for text, spans in zip(texts, answer.spans, strict=True):
        assert isinstance(text, str)
        styles = {label: _STYLES[place % len(_STYLES)] for place, label in enumerate(_labels(answer))}
        marked = Styled(text)
        for span in spans:
            marked.stylize(f"bold underline {styles[span.label]}", span.start, span.end)
        console.print(marked)
        for span in spans:
            line = f"  {printable(span.label):<8} {span.score:>6.1%}  "
            console.print(Styled.assemble((line, styles[span.label]), text[span.start : span.end]))


def show_ranking(queries: Sequence[Query], answer: Ranking) -> None:
    """The documents, best first, with their scores."""
    console = result_console()
    _, documents = queries[0]
    for one in answer.documents:
        console.print(Styled.assemble(f"{one.score:>9.4f}  ", (_short(documents[one.index]), "bold")))


def show_scores(pairs: Sequence[tuple[str, str]], answer: Scores) -> None:
    """Log-probability and perplexity of each continuation."""
    console = result_console()
    for (_, continuation), one in zip(pairs, answer.scores, strict=True):
        count = max(len(one.token_ids), 1)
        console.print(Styled(_short(continuation), "bold"))
        console.print(
            f"  log-probability {one.total_logprob:.3f} over {len(one.token_ids)} tokens, "
            f"perplexity {math.exp(min(-one.total_logprob / count, 700.0)):.3f}"
            + (", each the likeliest" if one.greedy else ""),
            style="dim",
        )


def _labels(answer: TaggedTexts) -> list[str]:
    return sorted({span.label for spans in answer.spans for span in spans})


def _short(text: Text) -> str:
    line = " ".join((text if isinstance(text, str) else " │ ".join(text)).split())
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def _length(row: Sequence[float]) -> float:
    return math.sqrt(math.fsum(number * number for number in row))


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    product = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return product / ((_length(one) * _length(other)) or 1.0)

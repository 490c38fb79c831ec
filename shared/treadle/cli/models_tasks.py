"""What can be asked of a model, as rows for people."""

from __future__ import annotations

from treadle.cli.console import printable
from treadle.client import TaskFacts

_SHOWN = 5
"""Labels, and prompts, before the rest is counted."""


def task_rows(facts: TaskFacts) -> list[tuple[str, str]]:
    """Names and values; what the model does not have has no row."""
    rows = [("tasks", ", ".join(facts.tasks) or "-")]
    if "embed" in facts.tasks:
        pooling = facts.pooling or "the folder does not say"
        rows.append(("pooling", f"{pooling}{', normalised' if facts.normalize else ''}"))
        rows.append(("dimensions", str(facts.embedding_dimensions)))
        rows.append(("similarity", facts.similarity or "-"))
    if facts.prompts:
        shown = [f"{name} {text!r}" for name, text in facts.prompts.items()]
        rows.append(("prompts", _some(shown)))
    if facts.default_prompt_name:
        rows.append(("default prompt", facts.default_prompt_name))
    if facts.labels:
        kind = " (several at once)" if facts.multi_label else ""
        rows.append(("labels", f"{len(facts.labels)}: {_some(facts.labels)}{kind}"))
    if "rerank" in facts.tasks and facts.labels:
        rows.append(("rank", facts.rank_activation or "the head's own number"))
    if facts.max_input_tokens:
        rows.append(("longest input", f"{facts.max_input_tokens} tokens"))
    return [(name, printable(value)) for name, value in rows]


def _some(values: list[str] | tuple[str, ...]) -> str:
    more = len(values) - _SHOWN
    return ", ".join(values[:_SHOWN]) + (f", and {more} more" if more > 0 else "")

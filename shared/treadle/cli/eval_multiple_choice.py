"""`treadle eval multiple-choice`: how often a served model finds the right choice the likeliest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.asking import Address, Model, connected_async, model_for
from treadle.cli.console import message_console, result_console
from treadle.cli.eval_choices import Question, Verdict, accuracy, read_questions, verdict
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.line_writer import LineWriter, line_writer
from treadle.cli.options import AsJson
from treadle.cli.task_command import Out
from treadle.cli.task_progress import TaskProgress
from treadle.cli.task_run import error_record
from treadle.client import AsyncClient, BatchItem, ScoreRequest, Scores
from treadle.errors import DataLoss, InvalidArgument

_WAITING = 16


def multiple_choice(
    file: Annotated[Path, typer.Argument(help="JSONL of context, choices and label.", show_default=False)],
    model: Model = "",
    separator: Annotated[
        str, typer.Option(help="Stands between a context and each choice.", show_default="a space")
    ] = " ",
    out: Out = None,
    as_json: AsJson = False,
    address: Address = "",
) -> None:
    """Measure how often a served model finds the right choice the likeliest.

    accuracy takes the choice with the greatest log-likelihood, accuracy_norm the one with the greatest
    log-likelihood a byte of the choice. The whole file is checked before anything is asked. --out has a line
    a question.

    Examples:

      treadle eval multiple-choice examples/data/common_knowledge.jsonl --model smollm2

      treadle eval multiple-choice questions.jsonl --out answers.jsonl --json
    """
    questions = read_questions(file)
    result = run_until_interrupted(_measure(questions, separator, model, out, address))
    if as_json:
        typer.echo(json.dumps(result))
    elif result["count"]:
        console = result_console()
        for name in ("accuracy", "accuracy_norm"):
            console.print(f"{name:<14} {result[name]:.4f} ± {result[f'{name}_stderr']:.4f}")
        console.print(
            f"{result['count']} questions, {result['questions_per_second']:.1f} a second", style="dim"
        )
    if result["failed"]:
        message_console().print(f"{result['failed']} of {len(questions)} questions failed")
        raise typer.Exit(1)


async def _measure(
    questions: Sequence[Question], separator: str, model: str, out: Path | None, address: str
) -> dict[str, object]:
    async with connected_async(address) as client:
        model = model or model_for("score", await client.models())
        if out is None:
            return await _over(client, questions, separator, model, None)
        with line_writer(out) as writer:
            return await _over(client, questions, separator, model, writer)


async def _over(
    client: AsyncClient, questions: Sequence[Question], separator: str, model: str, writer: LineWriter | None
) -> dict[str, object]:
    verdicts: list[Verdict] = []
    progress, failed, tokens, digest = TaskProgress("questions"), 0, 0, ""
    outcomes = client.score_stream(_requests(questions, separator, model), window=_WAITING)
    shown = progress.shown("multiple-choice", len(questions), lambda: len(verdicts) + failed, quiet=False)
    with shown:
        async with contextlib.aclosing(outcomes):
            async for item in outcomes:
                question = questions[item.index]
                if item.answer is None:
                    failed += 1
                    record = _failure(item)
                else:
                    tokens += item.answer.prompt_tokens
                    digest = item.answer.model_digest
                    verdicts.append(_verdict(question, item.answer))
                    record = _record(verdicts[-1])
                if writer is not None:
                    writer.add({"index": item.index} | record)
                    await writer.drain()
                progress.update(len(verdicts), failed, tokens)
    share, error = accuracy([one.correct for one in verdicts]) if verdicts else (None, None)
    share_norm, error_norm = accuracy([one.correct_norm for one in verdicts]) if verdicts else (None, None)
    return {
        "accuracy": share,
        "accuracy_stderr": error,
        "accuracy_norm": share_norm,
        "accuracy_norm_stderr": error_norm,
        "count": len(verdicts),
        "failed": failed,
        "model": model,
        "model_digest": digest,
        "seconds": round(progress.seconds, 3),
        "questions_per_second": round(len(questions) / progress.seconds, 2),
    }


def _requests(questions: Sequence[Question], separator: str, model: str) -> Iterator[ScoreRequest]:
    for question in questions:
        inputs = [(question.context, question.continuation(choice, separator)) for choice in question.choices]
        yield ScoreRequest(inputs=inputs, model=model)


def _verdict(question: Question, answer: Scores) -> Verdict:
    if len(answer.scores) != len(question.choices):
        raise DataLoss(
            f"{len(answer.scores)} scores came for {len(question.choices)} choices",
            reason="ANSWER_INCOMPLETE",
        )
    return verdict(question, [one.total_logprob for one in answer.scores])


def _failure(item: BatchItem[Scores]) -> dict[str, object]:
    """An error that is one question's; raises the others."""
    assert item.error is not None
    if not isinstance(item.error, InvalidArgument) and item.error.code not in ("ABORTED", "INTERNAL"):
        raise item.error
    return {"error": error_record(item.error)}


def _record(one: Verdict) -> dict[str, object]:
    return {
        "label": one.label,
        "chosen": one.chosen,
        "chosen_norm": one.chosen_norm,
        "correct": one.correct,
        "correct_norm": one.correct_norm,
        "logprobs": one.logprobs,
    }

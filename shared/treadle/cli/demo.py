"""`treadle demo`: the whole suite once, from the first start to eight answers at once."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from treadle.cli.console import message_console, result_console, write_text
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.locate import credentials
from treadle.cli.report import Report
from treadle.cli.up import GatewayPort, local_options
from treadle.client import Answer, AsyncClient
from treadle.local import Home, LocalStack, StackOptions

MODEL = "smollm2"
QUESTION = "In two sentences: what is a loom, and what is a treadle?"
PROMPTS = (
    "Name three colours of the sunset.",
    "Write one sentence about a weaver.",
    "What is the capital of France?",
    "Explain rain to a child.",
    "Give me a name for a small boat.",
    "How do you boil an egg?",
    "Write a short greeting for a letter.",
    "What do bees make, and from what?",
)
_FIRST_TOKENS = 128
_EIGHT_TOKENS = 64
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo's last line tells, as JSON."""

    model_digest: str
    prompt_tokens: int
    """Of the first answer."""
    output_tokens: int
    """Of the first answer."""
    ttft_ms: float
    """From asking for the first answer to its first token, at the client."""
    tokens_per_second: float
    """Output tokens of the eight together, over the time from asking to the last one's end."""
    text: str
    """The first answer."""


def demo(
    port: GatewayPort = None,
) -> None:
    """Start every service, stream a chat answer, then run 8 prompts at once.

    The first run imports the packaged SmolLM2 into TREADLE_HOME (~/.cache/treadle); the next ones start in
    seconds. Everything is stopped at the end. The last line of standard output is JSON: model_digest,
    prompt_tokens, output_tokens, ttft_ms and text of the first answer, and tokens_per_second of the eight
    together.
    """
    home, options = local_options([MODEL], port=port)
    # The line comes last, when every service has ended and has nothing more to say.
    result = run_until_interrupted(_run(home, options))
    write_text(json.dumps(asdict(result), ensure_ascii=False) + "\n")


async def _run(home: Home, options: StackOptions) -> DemoResult:
    console = message_console()
    report = Report(console)
    stack = LocalStack(home, options, report)
    console.print(f"starting the suite in {home.path} (logs in {home.logs})", style="dim")
    with report.live():
        await stack.__aenter__()
    try:
        showing = asyncio.create_task(_show(stack.addresses["gateway"], console))
        failing = asyncio.create_task(stack.wait())
        try:
            await asyncio.wait([showing, failing], return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                await failing
            return await showing
        finally:
            showing.cancel()
            failing.cancel()
            await asyncio.gather(showing, failing, return_exceptions=True)
    finally:
        console.print("stopping the suite", style="dim")
        await stack.__aexit__()


async def _show(address: str, console: Console) -> DemoResult:
    async with AsyncClient(address, model=MODEL, timeout_s=_TIMEOUT_S, credentials=credentials()) as client:
        answer, ttft_ms = await _first_answer(client)
        rate = await _eight_at_once(client, console)
    return DemoResult(
        model_digest=answer.prompt.model_digest,
        prompt_tokens=answer.usage.prompt_tokens,
        output_tokens=answer.usage.output_tokens,
        ttft_ms=round(ttft_ms, 1),
        tokens_per_second=round(rate, 1),
        text=answer.text,
    )


async def _first_answer(client: AsyncClient) -> tuple[Answer, float]:
    """Streams the answer to the terminal; gives it, and the milliseconds to its first token."""
    result_console().print(f"\n[bold]> {QUESTION}[/]\n")
    asked = time.monotonic()
    ttft_ms = 0.0
    messages = [{"role": "user", "content": QUESTION}]
    async with client.stream(messages=messages, temperature=0.0, max_new_tokens=_FIRST_TOKENS) as stream:
        async for chunk in stream:
            ttft_ms = ttft_ms or (time.monotonic() - asked) * 1e3
            write_text(chunk.text)
    write_text("\n\n")
    return stream.answer, ttft_ms


async def _eight_at_once(client: AsyncClient, console: Console) -> float:
    """Output tokens a second of the eight together."""
    result_console().print(f"[bold]{len(PROMPTS)} prompts at once[/]")
    columns = (
        TextColumn("{task.description:<38}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:>3.0f} tokens"),
        TextColumn("[dim]{task.fields[text]}[/]"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        rows = [progress.add_task(prompt, total=_EIGHT_TOKENS, text="") for prompt in PROMPTS]
        asked = time.monotonic()
        answers = await asyncio.gather(
            *(_one_of_eight(client, prompt, progress, row) for prompt, row in zip(PROMPTS, rows, strict=True))
        )
        took_s = time.monotonic() - asked
    tokens = sum(answer.usage.output_tokens for answer in answers)
    if not console.is_terminal:
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            console.print(
                f"{prompt:<38} {answer.usage.output_tokens:>3} tokens  {_glimpse(answer.text)}", markup=False
            )
    console.print(f"{tokens} tokens in {took_s:.1f} s: {tokens / took_s:.1f} tokens a second together")
    return tokens / took_s


async def _one_of_eight(client: AsyncClient, prompt: str, progress: Progress, row: TaskID) -> Answer:
    text, tokens = "", 0
    messages = [{"role": "user", "content": prompt}]
    async with client.stream(messages=messages, temperature=0.0, max_new_tokens=_EIGHT_TOKENS) as stream:
        async for chunk in stream:
            text += chunk.text
            tokens += len(chunk.token_ids)
            progress.update(row, completed=tokens, text=_glimpse(text).replace("[", "("))
    progress.update(row, total=max(tokens, 1), completed=tokens)
    return stream.answer


def _glimpse(text: str) -> str:
    """The end of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 48 else "…" + line[-47:]

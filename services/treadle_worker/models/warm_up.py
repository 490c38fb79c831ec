"""A model's first answers, thrown away: what they cost is paid before anybody waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from treadle.errors import FailedPrecondition, TreadleError
from treadle.text.tokenizer import Tokenizer
from treadle_worker.engine_protocol import (
    AddRequest,
    AddTask,
    EngineEvent,
    Failed,
    Ready,
    SamplingParams,
    StepOutputs,
    TaskInput,
)
from treadle_worker.engine_run import Engine

TIMEOUT_S = 60.0
MAX_PROMPTS = 16
MAX_NEW_TOKENS = 16


async def warm_up(
    engine: Engine,
    events: AsyncIterator[EngineEvent],
    ready: Ready,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
) -> int:
    """Has the engine answer the first MAX_PROMPTS prompts, one after the other; returns how many commands
    it got.

    A model that does not generate is asked for the first of its tasks. Raises FailedPrecondition
    (WARM_UP_FAILED) where one of them is not answered within TIMEOUT_S for all.
    """
    asked = 0
    try:
        async with asyncio.timeout(TIMEOUT_S):
            for asked, prompt in enumerate(prompts[:MAX_PROMPTS], 1):
                await _answer(engine, events, ready, await asyncio.to_thread(tokenizer.encode, prompt), asked)
    except TimeoutError:
        raise _failed(asked, f"the answers took longer than {TIMEOUT_S:.0f} s") from None
    except FailedPrecondition:
        raise
    except TreadleError as error:
        raise _failed(asked, error.message) from error
    return asked


async def _answer(
    engine: Engine, events: AsyncIterator[EngineEvent], ready: Ready, ids: list[int], number: int
) -> None:
    longest = ready.max_model_len - int(ready.generates)
    if not 1 <= len(ids) <= longest:
        raise _failed(number, f"it has {len(ids)} tokens; the model takes 1 to {longest}")
    command = _command(ready, f"warm-up-{number}", ids)
    await engine.send([command])
    async for event in events:
        if isinstance(event, Failed):
            raise _failed(number, event.message)
        if isinstance(event, StepOutputs) and _ended(event, command.request_id, number):
            return
    raise _failed(number, "the engine ended")


def _command(ready: Ready, request_id: str, ids: list[int]) -> AddRequest | AddTask:
    if not ready.generates:
        task = ready.tasks[0]
        return AddTask(
            request_id=request_id,
            task=task,
            inputs=[TaskInput(token_ids=ids)],
            pooling="mean" if task == "embed" else "",
        )
    room = ready.max_model_len - len(ids)
    return AddRequest(
        request_id=request_id,
        prompt_token_ids=ids,
        sampling=SamplingParams(temperature=0.0, max_new_tokens=min(MAX_NEW_TOKENS, room)),
        # No tenant's prefix: what was computed here is shared with nobody.
        cache_salt="warm-up",
    )


def _ended(step: StepOutputs, request_id: str, number: int) -> bool:
    """Whether the step answers it; raises FailedPrecondition for an error."""
    for answer in step.task_outputs:
        if answer.request_id == request_id:
            if answer.error:
                raise _failed(number, answer.error)
            return True
    for output in step.outputs:
        if output.request_id == request_id and output.finish_reason is not None:
            if output.finish_reason in ("error", "aborted"):
                raise _failed(number, output.error or "it was aborted")
            return True
    return False


def _failed(number: int, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"warm-up prompt {number} was not answered: {why}; change the deployment's warm_up_prompts",
        reason="WARM_UP_FAILED",
    )

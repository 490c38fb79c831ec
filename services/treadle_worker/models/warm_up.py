"""A model's first answers, thrown away: what they cost is paid before anybody waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from treadle.errors import FailedPrecondition, TreadleError
from treadle.text.tokenizer import Tokenizer
from treadle_worker.engine_protocol import (
    AddRequest,
    EngineEvent,
    Failed,
    Ready,
    SamplingParams,
    SequenceOutput,
    StepOutputs,
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

    Raises FailedPrecondition (WARM_UP_FAILED) where one of them is not answered within TIMEOUT_S for all.
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
    room = ready.max_model_len - len(ids)
    if not ids or room < 1:
        raise _failed(number, f"it has {len(ids)} tokens; the model takes 1 to {ready.max_model_len - 1}")
    request = AddRequest(
        request_id=f"warm-up-{number}",
        prompt_token_ids=ids,
        sampling=SamplingParams(temperature=0.0, max_new_tokens=min(MAX_NEW_TOKENS, room)),
        # No tenant's prefix: what was computed here is shared with nobody.
        cache_salt="warm-up",
    )
    await engine.send([request])
    async for event in events:
        if isinstance(event, Failed):
            raise _failed(number, event.message)
        for output in event.outputs if isinstance(event, StepOutputs) else ():
            if _ends(output, request, number):
                return
    raise _failed(number, "the engine ended")


def _ends(output: SequenceOutput, request: AddRequest, number: int) -> bool:
    if output.request_id != request.request_id or output.finish_reason is None:
        return False
    if output.finish_reason in ("error", "aborted"):
        raise _failed(number, output.error or "it was aborted")
    return True


def _failed(number: int, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"warm-up prompt {number} was not answered: {why}; change the deployment's warm_up_prompts",
        reason="WARM_UP_FAILED",
    )

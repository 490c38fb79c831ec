"""A request with every default filled in: the client's value, else the model's, else the documented one."""

from __future__ import annotations

import secrets
from dataclasses import replace

from treadle_gateway.artifact import GenerationDefaults
from treadle_gateway.generation import Generation, Priority, Sampling, Stopping
from treadle_gateway.models import ServedModel

SEED_BITS = 53
"""Of a drawn seed: a number that every client's language holds exactly, JavaScript's doubles too."""


def complete(generation: Generation, model: ServedModel, prompt_tokens: int) -> Generation:
    """The request as the worker gets it; nothing is left to a default."""
    defaults = model.artifact.defaults
    return replace(
        generation,
        priority=generation.priority or Priority.NORMAL,
        sampling=_sampling(generation.sampling, defaults),
        stopping=_stopping(generation.stopping, defaults, model.max_model_len - prompt_tokens),
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _sampling(asked: Sampling, model: GenerationDefaults) -> Sampling:
    return replace(
        asked,
        temperature=_first(asked.temperature, model.temperature, 1.0),
        top_k=int(_first(asked.top_k, model.top_k, 0)),
        top_p=_first(asked.top_p, model.top_p, 1.0),
        min_p=_first(asked.min_p, model.min_p, 0.0),
        seed=secrets.randbits(SEED_BITS) if asked.seed is None else asked.seed,
        repetition_penalty=_first(asked.repetition_penalty, model.repetition_penalty, 1.0),
        presence_penalty=_first(asked.presence_penalty, 0.0),
        frequency_penalty=_first(asked.frequency_penalty, 0.0),
        n=1,
    )


def _stopping(asked: Stopping, model: GenerationDefaults, left: int) -> Stopping:
    eos = () if asked.ignore_eos else model.eos_token_ids
    return replace(
        asked,
        max_new_tokens=asked.max_new_tokens or left,
        min_new_tokens=asked.min_new_tokens or 0,
        stop_token_ids=tuple(dict.fromkeys((*asked.stop_token_ids, *eos))),
    )

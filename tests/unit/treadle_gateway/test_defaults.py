"""Defaults: the client's word, the model's, the contract's."""

from __future__ import annotations

from treadle_gateway.artifact import Artifact, GenerationDefaults
from treadle_gateway.defaults import complete
from treadle_gateway.generation import Generation, Priority, Sampling, Stopping
from treadle_gateway.models import ServedModel

DEFAULTS = GenerationDefaults(
    temperature=0.0, top_k=7, top_p=0.8, min_p=0.1, repetition_penalty=1.2, eos_token_ids=(2, 3)
)


def served(defaults: GenerationDefaults) -> ServedModel:
    return ServedModel(Artifact("a", "c", "t", 100, 50, defaults), "p", 50, 100, 1)


def test_the_contracts_defaults_where_nobody_says_anything():
    done = complete(Generation(), served(GenerationDefaults()), 10)
    sampling = done.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, 0, 1.0, 0.0)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1, 0, 0)
    assert sampling.n == 1
    assert done.stopping == Stopping(max_new_tokens=40, min_new_tokens=0)
    assert done.priority == Priority.NORMAL


def test_the_models_defaults_an_explicit_zero_among_them():
    sampling = complete(Generation(), served(DEFAULTS), 10).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.0, 7, 0.8, 0.1)
    assert sampling.repetition_penalty == 1.2


def test_the_clients_values_win_an_explicit_zero_among_them():
    asked = Sampling(temperature=0.5, top_k=0, top_p=1.0, min_p=0.0, seed=0, repetition_penalty=1.0)
    sampling = complete(Generation(sampling=asked), served(DEFAULTS), 10).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 0, 1.0, 0.0)
    assert (sampling.seed, sampling.repetition_penalty) == (0, 1.0)


def test_end_of_text_stops_unless_ignored():
    asked = Generation(stopping=Stopping(stop_token_ids=(9, 3, 9)))
    assert complete(asked, served(DEFAULTS), 10).stopping.stop_token_ids == (9, 3, 2)
    asked = Generation(stopping=Stopping(stop_token_ids=(9,), ignore_eos=True))
    assert complete(asked, served(DEFAULTS), 10).stopping.stop_token_ids == (9,)


def test_seeds_are_drawn_and_fit_a_double():
    seeds = {complete(Generation(), served(DEFAULTS), 10).sampling.seed for _ in range(50)}
    assert len(seeds) == 50
    assert all(seed is not None and seed < 2**53 for seed in seeds)

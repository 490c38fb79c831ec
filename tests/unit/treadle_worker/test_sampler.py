"""The sampler against transformers' processors, against chi-square, and against itself in other batches."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from treadle_worker import sampler as sampler_module
from treadle_worker.cut_draw import draw_by_cuts
from treadle_worker.engine_protocol import SamplingParams
from treadle_worker.falling_order import FallingOrder, Scratch
from treadle_worker.penalties import TokenHistory
from treadle_worker.philox import uniforms
from treadle_worker.sampler import Sampler, SampleRow, draw_one

VOCAB = 3000


def random_logits(seed: int, rows: int, vocab: int = VOCAB, *, coarse: bool = False) -> torch.Tensor:
    """Some rows peaked, some flat; coarse ones are full of ties, as bf16 logits are."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * torch.rand(rows, 1, generator=generator) * 6
    return (logits * 4).round() / 4 if coarse else logits


def random_row(rng: random.Random, vocab: int = VOCAB) -> SampleRow:
    """Any mix of parameters."""
    params = SamplingParams(
        max_new_tokens=100,
        temperature=rng.choice([0.0, 0.3, 1.0, rng.uniform(0.1, 3)]),
        top_k=rng.choice([0, 0, 1, 5, 50, 64, 200, 2000]),
        top_p=rng.choice([1.0, 0.5, 0.9, 0.999]),
        min_p=rng.choice([0.0, 0.0, 0.05, 1e-4]),
        seed=rng.getrandbits(64),
        repetition_penalty=rng.choice([1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.2]),
        logit_bias=rng.choice([{}, {rng.randrange(vocab): 3.0}]),
        stop_token_ids=(1, 2),
        min_new_tokens=rng.choice([0, 50]),
        logprobs=rng.choice([None, 0, 3, 70]),
    )
    history = TokenHistory(rng.choices(range(vocab), k=40), rng.choices(range(vocab), k=10))
    return SampleRow(params, rng.randrange(100), history)


def draws(logits_V: torch.Tensor, params: SamplingParams, count: int) -> np.ndarray:
    """Tokens of the same logits at `count` positions."""
    tokens = []
    for start in range(0, count, 500):
        rows = [SampleRow(params, position) for position in range(start, min(count, start + 500))]
        tokens += [s.token_id for s in Sampler().sample(logits_V.repeat(len(rows), 1), rows)]
    return np.array(tokens)


WARPED = [
    {"temperature": 0.7},
    {"top_k": 7},
    {"temperature": 1.7, "top_k": 90},
    {"top_p": 0.8},
    {"temperature": 0.5, "top_p": 0.95},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 2, "top_p": 0.01},
]


@pytest.mark.parametrize("fields", WARPED, ids=str)
def test_draws_follow_transformers_distribution(fields):
    """The support is transformers', and the frequencies fit its probabilities (the draws are fixed)."""
    logits = random_logits(3, 1, vocab=200)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(fields.get("temperature", 1.0))])
    if "top_k" in fields:
        warpers.append(TopKLogitsWarper(fields["top_k"]))
    if "top_p" in fields:
        warpers.append(TopPLogitsWarper(fields["top_p"]))
    if "min_p" in fields:
        warpers.append(MinPLogitsWarper(fields["min_p"]))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)[0].double().numpy()
    count = 20_000
    tokens = draws(logits[0], SamplingParams(max_new_tokens=1, seed=11, **fields), count)
    observed = np.bincount(tokens, minlength=200)
    assert not observed[expected == 0].any()
    often = expected * count >= 5
    pooled_observed = np.append(observed[often], observed[~often].sum())
    pooled_expected = np.append(expected[often], expected[~often].sum()) * count
    keep = pooled_expected > 0
    chi_square = ((pooled_observed - pooled_expected)[keep] ** 2 / pooled_expected[keep]).sum()
    freedom = keep.sum() - 1
    print(f"{(expected > 0).sum()} tokens kept, chi-square {chi_square:.1f} at {freedom}")
    assert chi_square <= freedom + 3.3 * np.sqrt(2 * freedom) + 4


def test_kept_tokens_are_transformers():
    """With the distribution flattened by a huge temperature after the filters' boundary was fixed by
    top-k, every kept token and no other one is drawn."""
    logits = random_logits(5, 1, vocab=120)
    expected = set(logits[0].topk(9).indices.tolist())
    params = SamplingParams(max_new_tokens=1, temperature=50.0, top_k=9, seed=2)
    assert set(draws(logits[0], params, 2000).tolist()) == expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("coarse", [False, True])
def test_boundaries_match_transformers(seed, coarse):
    """The best and the last kept token, by the ends of the draw's range, for random filters."""
    rng = random.Random(seed)
    checked = 0
    for _ in range(12):
        logits = random_logits(rng.getrandbits(30), 1, coarse=coarse)
        fields = {
            "temperature": rng.uniform(0.3, 2.0),
            "top_k": rng.choice([0, 3, 40, 64, 700]),
            "top_p": rng.choice([1.0, rng.uniform(0.05, 0.97)]),
            "min_p": rng.choice([0.0, rng.uniform(0.001, 0.5)]),
        }
        if coarse:
            fields["top_p"] = 1.0  # where tied tokens are cut, transformers keeps whichever its sort left
        warpers = LogitsProcessorList([TemperatureLogitsWarper(fields["temperature"])])
        if fields["top_k"]:
            warpers.append(TopKLogitsWarper(fields["top_k"]))
        if fields["top_p"] < 1:
            warpers.append(TopPLogitsWarper(fields["top_p"]))
        if fields["min_p"]:
            warpers.append(MinPLogitsWarper(fields["min_p"]))
        warped = warpers(torch.zeros(1, 1, dtype=torch.long), logits.clone())[0]
        kept = torch.isfinite(warped).nonzero()[:, 0].tolist()
        order = sorted(kept, key=lambda token: (-logits[0, token].item(), token))
        row = SampleRow(SamplingParams(max_new_tokens=1, **fields), 0)
        for u, token in ((0.0, order[0]), (1.0, order[-1])):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sampler_module, "uniforms", lambda seeds, positions, u=u: np.full(1, u))
                got = Sampler().sample(logits.clone(), [row])[0]
            if not (u == 1.0 and len(kept) == VOCAB):  # the smallest of all: below float32's resolution
                assert got.token_id == token, fields
                checked += 1
    print(f"{checked} boundaries")
    assert checked >= 12


def test_greedy_is_the_first_best_token():
    logits = torch.zeros(2, 40)
    logits[0, [7, 30]] = 2.0
    params = SamplingParams(max_new_tokens=1, temperature=0.0)
    assert [s.token_id for s in Sampler().sample(logits, [SampleRow(params, 0)] * 2)] == [7, 0]


@pytest.mark.parametrize("vocab", [VOCAB, 49152])
@pytest.mark.parametrize("coarse", [False, True])
def test_a_row_is_the_same_alone_and_in_any_batch(vocab, coarse):
    rng = random.Random(vocab)
    rows = [random_row(rng, vocab) for _ in range(24)]
    logits = random_logits(1, len(rows), vocab, coarse=coarse)
    together = Sampler().sample(logits.clone(), rows)
    alone = [Sampler().sample(logits[i : i + 1].clone(), rows[i : i + 1])[0] for i in range(len(rows))]
    assert together == alone
    for _ in range(3):
        part = rng.sample(range(len(rows)), rng.randint(2, 23))
        assert Sampler().sample(logits[part].clone(), [rows[i] for i in part]) == [alone[i] for i in part]
    assert len({s.token_id for s in together}) > 4
    print(f"{len(rows)} rows, {sum(s.logprobs is not None for s in together)} with log-probabilities")


def by_sorting(logits_V: np.ndarray, params: SamplingParams, u: float) -> int:
    """The definition, over the whole sorted row in float64."""
    ids = np.lexsort((np.arange(len(logits_V)), -logits_V))
    logits = logits_V[ids].astype(np.float64)
    weight = np.exp((logits - logits[0]) / params.temperature)
    cumulative = np.cumsum(weight)
    total, keep = cumulative[-1], len(ids)
    if 0 < params.top_k < len(ids):
        keep = int((logits >= logits[params.top_k - 1]).sum())
        total = cumulative[keep - 1]
    if params.top_p < 1:
        keep = min(keep, int((cumulative < params.top_p * total).sum()) + 1)
    if params.min_p > 0:
        keep = min(keep, int((weight >= params.min_p).sum()))
    return int(ids[min(int((cumulative <= u * cumulative[keep - 1]).sum()), keep - 1)])


@pytest.mark.parametrize("coarse", [False, True])
def test_draws_are_those_of_the_sorted_row(monkeypatch, coarse):
    """On the CPU by buckets, and as other devices do it: by cuts, which leave some rows undecided."""
    rng = random.Random(4)
    rows = [random_row(rng)._replace(history=None) for _ in range(400)]
    plain = {"logit_bias": {}, "min_new_tokens": 0}
    rows = [
        SampleRow(msgspec.structs.replace(p, temperature=p.temperature or 2.0, **plain), at)
        for p, at, _ in rows
    ]
    logits = random_logits(2, len(rows), coarse=coarse)
    params = [row.params for row in rows]
    u = uniforms(
        np.array([p.seed for p in params], np.uint64), np.array([row.position for row in rows], np.uint64)
    )
    expected = [by_sorting(x, p, at) for x, p, at in zip(logits.numpy(), params, u, strict=True)]
    sizes: list[int] = []
    sort = FallingOrder._sort

    def counted(order: FallingOrder, bucket: int):
        done = sort(order, bucket)
        sizes.append(len(done.indices))
        return done

    monkeypatch.setattr(FallingOrder, "_sort", counted)
    assert [s.token_id for s in Sampler().sample(logits.clone(), rows)] == expected
    by_cuts = draw_by_cuts(logits, params, u).tolist()
    decided = sum(token >= 0 for token in by_cuts)
    assert all(cut in (-1, token) for cut, token in zip(by_cuts, expected, strict=True))
    print(f"{decided} of {len(rows)} decided by cuts; buckets of at most {max(sizes)} tokens were sorted")
    assert 0 < decided < len(rows)
    assert coarse or max(sizes) < VOCAB / 20  # a coarse row may be one value all over


SHAPES = {
    "all equal": lambda x: np.zeros_like(x),
    "two values": lambda x: np.where(x > 1, np.float32(3), np.float32(2.999)),
    "one far above": lambda x: np.where(np.arange(len(x)) == 77, np.float32(1e6), x),
    "one far below": lambda x: np.where(np.arange(len(x)) == 77, np.float32(-1e30), x),
    "some out": lambda x: np.where(x > 1, np.float32(-np.inf), x),
    "one left": lambda x: np.where(np.arange(len(x)) == 77, x, np.float32(-np.inf)),
    "huge": lambda x: x * np.float32(1e30),
    "tiny": lambda x: x * np.float32(1e-30),
    "denormal": lambda x: x * np.float32(1e-40),
    "steep": lambda x: x * np.float32(500),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_any_shape_are_drawn_as_if_sorted(shape):
    rng, scratch, checked = random.Random(shape), Scratch(2000), 0
    for seed in range(60):
        x = SHAPES[shape](random_logits(seed, 1, 2000).numpy()[0]).astype(np.float32)
        params = SamplingParams(
            max_new_tokens=1,
            temperature=rng.choice([1e-4, 0.3, 1.0, 7.0, 1e6]),
            top_k=rng.choice([0, 1, 30, 1500]),
            top_p=rng.choice([1.0, 0.0, 0.7, 0.999]),
            min_p=rng.choice([0.0, 1e-3, 1.0]),
        )
        for u in (0.0, rng.random(), rng.random(), 1 - 2.0**-30):
            assert draw_one(x, params, u, scratch) == by_sorting(x, params, u), params
            checked += 1
    print(f"{checked} draws")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_fails_alone(bad):
    rng = random.Random(8)
    rows = [random_row(rng) for _ in range(10)]
    logits = random_logits(6, 10)
    sound = Sampler().sample(logits.clone(), rows)
    logits[4, 17] = bad
    logits[9, VOCAB - 1] = bad
    got = Sampler().sample(logits, rows)
    assert [index for index, sample in enumerate(got) if sample is None] == [4, 9]
    assert [s for i, s in enumerate(got) if i not in (4, 9)] == [
        s for i, s in enumerate(sound) if i not in (4, 9)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_left_is_no_token(temperature):
    params = SamplingParams(
        max_new_tokens=9, temperature=temperature, stop_token_ids=(0, 1), min_new_tokens=5, logprobs=1
    )
    rows = [SampleRow(params, position) for position in (4, 5)]
    got = Sampler().sample(torch.zeros(2, 2), rows)
    assert got[0] is None
    assert got[1] is not None


def test_stop_ids_wait_for_min_new_tokens():
    logits = torch.zeros(2, 10)
    logits[:, 3] = 9.0
    logits[:, 5] = 8.0
    params = SamplingParams(max_new_tokens=9, temperature=0.0, stop_token_ids=(3,), min_new_tokens=2)
    got = Sampler().sample(logits, [SampleRow(params, 1), SampleRow(params, 2)])
    assert [s.token_id for s in got] == [5, 3]


def test_repetition_penalty_is_transformers():
    logits = random_logits(12, 1)
    prompt, output = [5, 9, 9, 100], [7, 5]
    history = TokenHistory(prompt, output)
    expected = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([prompt + output]), logits.clone())
    adjusted = logits.clone()
    rows = [SampleRow(SamplingParams(max_new_tokens=1, repetition_penalty=1.8), 0, history)]
    Sampler().sample(adjusted, rows)
    assert torch.allclose(adjusted, expected)
    assert not torch.equal(adjusted, logits)


def test_logprobs_are_the_models_own():
    """Temperature, penalties and bias do not touch them; the best ones come in order, ties by id."""
    logits = random_logits(13, 1, coarse=True)
    expected = torch.log_softmax(logits.double(), -1)[0]
    params = SamplingParams(
        max_new_tokens=1, temperature=3.0, top_k=3, logit_bias={11: 50.0}, logprobs=100, seed=1
    )
    got = Sampler().sample(logits.clone(), [SampleRow(params, 0)])[0]
    assert got.token_id == 11
    assert abs(got.logprobs.logprob - expected[11].item()) < 1e-5
    ids = [token for token, _ in got.logprobs.top]
    assert ids == sorted(range(VOCAB), key=lambda token: (-logits[0, token].item(), token))[:100]
    assert max(abs(value - expected[token].item()) for token, value in got.logprobs.top) < 1e-5


def test_extreme_temperatures_stay_finite():
    logits = random_logits(14, 3) * 20
    rows = [SampleRow(SamplingParams(max_new_tokens=1, temperature=t), 0) for t in (1e-30, 1.1e-5, 1e6)]
    got = Sampler().sample(logits.clone(), rows)
    assert [got[i].token_id for i in (0, 1)] == logits[:2].argmax(1).tolist()
    assert got[2] is not None


def test_logits_out_of_inference_mode_are_taken():
    """As the model runner's are; writing to them outside of it is refused by torch."""
    with torch.inference_mode():
        logits = random_logits(15, 2)
    rows = [SampleRow(SamplingParams(max_new_tokens=1, logit_bias={3: 99.0}), 0)] * 2
    assert [s.token_id for s in Sampler().sample(logits, rows)] == [3, 3]

"""Which attention an engine takes on CUDA. Nothing here runs there: devices are named, packages stand in."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from attention_packages import FLASHINFER, FlashAttn

from treadle.errors import FailedPrecondition
from treadle.models.config import ModelConfig, parse_config
from treadle_worker.batch import ScheduledChunk
from treadle_worker.cuda.backends import PACKAGES, choose_backend
from treadle_worker.cuda.flashinfer import FlashInferBackend
from treadle_worker.cuda.graphs import row_buckets, width_buckets
from treadle_worker.cuda.sdpa import MAX_KEYS, MAX_SCORES, group_pieces, split
from treadle_worker.kv_cache import CachePlan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config(head_dim: int = 64) -> ModelConfig:
    return parse_config(
        {
            "model_type": "llama",
            "vocab_size": 10,
            "hidden_size": 4 * head_dim,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": head_dim,
            "max_position_embeddings": 512,
        }
    )


@pytest.fixture
def packages(monkeypatch):
    """Installs these, and no others."""

    def install(*names: str) -> None:
        stand_ins = {"flash_attn": FlashAttn(), "flashinfer": FLASHINFER}
        for name in PACKAGES:
            monkeypatch.setitem(sys.modules, name, stand_ins[name] if name in names else None)

    monkeypatch.setitem(
        PACKAGES, "flashinfer", PACKAGES["flashinfer"]._replace(build=lambda device: FlashInferBackend(CPU))
    )
    return install


@pytest.mark.parametrize(
    ("installed", "block_size", "dtype", "head_dim", "taken"),
    [
        ((), 32, torch.bfloat16, 64, "sdpa"),
        (("flash_attn", "flashinfer"), 256, torch.bfloat16, 64, "flash_attn"),
        (("flash_attn", "flashinfer"), 32, torch.bfloat16, 64, "flashinfer"),
        (("flash_attn",), 32, torch.bfloat16, 64, "sdpa"),
        (("flashinfer",), 256, torch.float16, 128, "flashinfer"),
        (("flash_attn", "flashinfer"), 256, torch.bfloat16, 80, "flash_attn"),
        (("flash_attn", "flashinfer"), 256, torch.float32, 64, "sdpa"),
        (("flash_attn", "flashinfer"), 256, torch.int8, 64, None),
    ],
)
def test_auto_takes_the_first_that_is_there_and_fits(packages, installed, block_size, dtype, head_dim, taken):
    packages(*installed)
    backend = choose_backend("auto", config(head_dim), block_size, dtype, CUDA)
    assert (backend and backend.name) == taken


def test_elsewhere_auto_leaves_attention_as_it_is():
    for device in (CPU, torch.device("mps")):
        assert choose_backend("auto", config(), 32, torch.bfloat16, device) is None
        assert choose_backend("sdpa", config(), 32, torch.bfloat16, device).name == "sdpa"


@pytest.mark.parametrize(
    ("name", "block_size", "dtype", "device", "why"),
    [
        ("flash_attn", 256, torch.bfloat16, CUDA, "cannot be imported"),
        ("flashinfer", 32, torch.bfloat16, CUDA, "cannot be imported"),
        ("flash_attn", 32, torch.bfloat16, CUDA, "a multiple of 256 tokens, not 32"),
        ("flash_attn", 256, torch.float32, CUDA, "must be float16 or bfloat16"),
        ("flashinfer", 256, torch.bfloat16, CPU, "for CUDA, not for cpu"),
        ("sdpa", 32, torch.int8, CUDA, "no int8 cache"),
    ],
)
def test_what_was_asked_for_and_cannot_be_had_is_refused(packages, name, block_size, dtype, device, why):
    packages()
    with pytest.raises(FailedPrecondition, match=why) as error:
        choose_backend(name, config(), block_size, dtype, device)
    assert error.value.reason == "ATTENTION_BACKEND_NOT_AVAILABLE"
    assert f'"{name}"' in error.value.message


def test_a_plan_counts_the_blocks_that_nobody_is_given():
    plan = CachePlan(config(), 32, torch.float32, CPU, kernels="torch", attention_backend="sdpa")
    cache = plan.build(5)
    assert (plan.attention, plan.is_native, plan.num_reserved_blocks) == ("sdpa", False, 2)
    held = cache.keys.nbytes + cache.values.nbytes
    assert held == plan.bytes_per_block * (5 + plan.num_reserved_blocks)
    assert {cache.zero_block, cache.scratch_block} == {5, 6}


def test_buckets_cover_every_size_and_pad_to_less_than_twice_as_many():
    checked = 0
    for largest in [1, 2, 3, 7, 8, 9, 64, 100]:
        buckets = row_buckets(largest)
        assert buckets == sorted(set(buckets)), "each once"
        assert buckets[-1] == largest
        for rows in range(1, largest + 1):
            assert min(bucket for bucket in buckets if bucket >= rows) < 2 * rows
            checked += 1
    assert width_buckets(8, 32) == [8]
    assert width_buckets(100, 32) == [16, 32, 64, 100]
    assert width_buckets(3, 256) == [2, 3]
    print(f"{checked} sizes")


def test_pieces_cover_every_query_once_and_groups_are_bounded():
    rng = random.Random(5)
    pieces_seen, groups_seen, widest = 0, 0, 1.0
    for _ in range(200):
        block_size, group_size = rng.choice([16, 32, 256]), rng.choice([1, 4, 7])
        window = rng.choice([None, 1, 40, 3000])
        chunks = []
        for _ in range(rng.randint(1, 40)):
            length, start = (
                rng.choice([1, 1, 1, 4, rng.randint(2, 5000)]),
                rng.choice([0, rng.randint(0, 9000)]),
            )
            table = rng.sample(range(20000), -(-(start + length) // block_size))
            chunks.append(ScheduledChunk([0] * length, start, table, 1))
        pieces = split(chunks, window, block_size, group_size)
        rows = [row for piece in pieces for row in range(piece.row, piece.row + piece.length)]
        assert rows == list(range(sum(len(chunk.token_ids) for chunk in chunks)))
        groups = group_pieces(pieces, block_size, group_size)
        assert sorted(piece.row for group in groups for piece in group) == [piece.row for piece in pieces]
        for group in groups:
            widths = [len(piece.blocks) for piece in group]
            assert len({(piece.causal, piece.length) for piece in group}) == 1
            assert max(widths) <= max(2 * min(widths), min(widths) + 2)
            keys = len(group) * max(widths) * block_size
            assert len(group) == 1 or keys <= MAX_KEYS
            if not group[0].causal:
                assert keys * group[0].length * group_size <= MAX_SCORES or group[0].length == 1
            if len(group) > 1:
                widest = max(widest, len(group) * max(widths) / sum(widths))
        pieces_seen += len(pieces)
        groups_seen += len(groups)
    print(f"{pieces_seen} pieces in {groups_seen} groups; a group reads at most {widest:.2f} of its keys")
    assert 0 < groups_seen < pieces_seen
    assert widest < 3.01, "three blocks where one has one"

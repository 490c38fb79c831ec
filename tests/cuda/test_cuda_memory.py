"""What an engine takes of a GPU: within its share under the largest steps, and everything given back."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace
from tiny_models import VOCABULARY, make

from treadle_worker.config import EngineConfig
from treadle_worker.cuda.memory import release
from treadle_worker.engine_loader import load_engine
from treadle_worker.engine_protocol import AddRequest, EngineStart, SamplingParams

MIB = 1 << 20


def start(folder, **changes) -> EngineStart:
    settings = {
        "device": "cuda",
        "attention_backend": "sdpa",
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,
        "max_model_len": 512,
    }
    return EngineStart(model_folder=str(folder), **EngineConfig(**(settings | changes)).model_dump())


def held(device: torch.device) -> int:
    release(device)
    return torch.cuda.memory_allocated(device)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_the_largest_steps_stay_within_the_share(tmp_path, rng, device, enforce_eager: bool):
    make("llama2", tmp_path, rng.randrange(1 << 31))
    before, total = held(device), torch.cuda.mem_get_info(device)[1]
    percent = 100 * (before + 800 * MIB) / total
    engine = load_engine(start(tmp_path, max_memory_percent=percent, enforce_eager=enforce_eager))
    for index in range(48):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(300, 450))]
        params = SamplingParams(
            temperature=1.0, top_p=0.9, seed=index, logprobs=1, max_new_tokens=rng.randint(2, 60)
        )
        engine.add_request(AddRequest(request_id=str(index), prompt_token_ids=prompt, sampling=params))
    steps = 0
    while engine.has_work:
        steps += 1
        for output in engine.step().outputs:
            assert output.error == ""
    torch.cuda.synchronize(device)
    peak, share = torch.cuda.max_memory_allocated(device), int(total * percent / 100)
    graphs = engine.runner.graphs
    print(
        f"{steps} steps, before {before / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB of {share / MIB:.0f}, "
        f"{0 if graphs is None else graphs.num_replays.total()} replays"
    )
    assert (graphs is None) == enforce_eager
    assert 0.9 * share < peak <= share, "within the share, most of which is blocks"
    assert engine.stats().num_output_tokens > 48
    engine.close()
    del engine, graphs
    assert held(device) <= before + MIB


def test_the_figures(tmp_path, rng, device):
    make("qwen3", tmp_path, rng.randrange(1 << 31))
    before = held(device)
    engine = load_engine(start(tmp_path, kv_cache_bytes=64 * MIB))
    params = SamplingParams(max_new_tokens=8)
    engine.add_request(AddRequest(request_id="a", prompt_token_ids=[1, 2, 3], sampling=params))
    while engine.has_work:
        engine.step()
    engine._device_memory._seen_at -= 2.0
    memory = engine.stats().device_memory
    print(memory)
    assert before + 60 * MIB < memory.allocated_bytes <= memory.peak_bytes <= memory.reserved_bytes
    assert memory.total_bytes == torch.cuda.mem_get_info(device)[1]
    engine.close()
    del engine
    assert held(device) <= before + MIB


def test_a_cache_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path, rng, device):
    make("qwen3", tmp_path, rng.randrange(1 << 31))
    before = held(device)
    free = torch.cuda.mem_get_info(device)[0]
    asked = start(tmp_path, kv_cache_bytes=free + (1 << 30))
    with pytest.raises(MemoryError, match="ask for at most"):
        load_engine(asked)
    assert held(device) <= before + MIB
    engine = load_engine(replace(asked, kv_cache_bytes=16 * MIB))
    engine.close()


def test_twenty_loads_leave_nothing(tmp_path, rng, device):
    make("smollm2", tmp_path, rng.randrange(1 << 31))
    seen = []
    for _ in range(20):
        engine = load_engine(start(tmp_path, kv_cache_bytes=32 * MIB, max_num_seqs=8))
        params = SamplingParams(max_new_tokens=4)
        engine.add_request(AddRequest(request_id="a", prompt_token_ids=[1, 2, 3], sampling=params))
        while engine.has_work:
            engine.step()
        engine.close()
        del engine
        seen.append((held(device), torch.cuda.mem_get_info(device)[0]))
    print(f"allocated {seen[0][0]} to {seen[-1][0]}; free {seen[1][1] >> 20} to {seen[-1][1] >> 20} MiB")
    assert seen[-1][0] <= seen[0][0] + MIB
    assert seen[-1][1] >= seen[1][1] - 64 * MIB

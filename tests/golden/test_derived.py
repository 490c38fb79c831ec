"""What is derived and stored is served bit for bit as what is made at load, or as a slow reference says."""

from __future__ import annotations

import asyncio
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from paged_run import Driver, Row
from profiles import BFLOAT16, FLOAT32, INT4, INT8, Profile
from safetensors.torch import load_file, save_file
from small_folder import TOKENIZER
from tiny_models import VOCABULARY, make
from tokenizers import Tokenizer

from treadle.errors import FailedPrecondition
from treadle.nn.loader import load_model
from treadle_registry.operations.deriving import derive
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.derivation import Derivation
from treadle_registry.store.store import Published, Store
from treadle_worker.batch import ScheduledChunk
from treadle_worker.config import EngineConfig
from treadle_worker.engine_client import EngineClient
from treadle_worker.engine_protocol import AddRequest, Failed, SamplingParams, StepOutputs
from treadle_worker.model_runner import ModelRunner

KINDS = ["smollm2", "llama_linear", "qwen2", "qwen3"]
TEXT = Path(__file__).parents[1] / "data" / "shakespeare.txt"
WINDOW, CHUNK = 1024, 256


def imported(
    tmp_path: Path, kind: str, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Store, Published]:
    """A tiny random model in a store of its own."""
    folder = tmp_path / "folder"
    model = make(kind, folder, seed)
    if dtype is not torch.float32:
        model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    store = Store.open(tmp_path / "store")
    return store, import_source(store, LocalSource("folder", str(folder)))


@pytest.fixture(scope="session")
def real_store(smollm2_folder: Path) -> tuple[Store, str]:
    """The store of the packaged SmolLM2, and its digest."""
    store = Store.open(smollm2_folder.parents[2])
    return store, f"sha256:{smollm2_folder.parent.name}"


def answers(folder: Path, profile: Profile, prompts: list[list[int]], new_tokens: int = 6) -> list[Row]:
    driver = Driver(folder, profile)
    rows = [driver.row(prompt, len(prompt) + new_tokens) for prompt in prompts]
    driver.greedy(rows, new_tokens, chunk=40)
    return rows


def same(ours: list[Row], theirs: list[Row]) -> int:
    """Asserts equal tokens and bitwise equal logits; gives the number of rows compared."""
    compared = 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens == other.tokens
        for left, right in zip(one.logits, other.logits, strict=True):
            assert torch.isfinite(left).all()
            assert torch.equal(left, right)
            compared += 1
    return compared


def some_prompts(rng: random.Random, vocabulary: int = VOCABULARY) -> list[list[int]]:
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 90))] for _ in range(5)]


@pytest.mark.parametrize("profile", [INT8, INT4], ids=lambda one: one.name)
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_in_few_bits_is_as_quantised_at_load(kind, kernels, profile: Profile, tmp_path, rng):
    store, parent = imported(tmp_path, kind, rng.randrange(1 << 31))
    derived = derive(store, parent.manifest.digest, Derivation("quantization", profile.quantization))
    prompts = some_prompts(rng)
    at_load = answers(parent.canonical_folder, replace(profile, kernels=kernels), prompts)
    compared = 0
    for told in ("", profile.quantization):
        stored = answers(
            derived.canonical_folder, replace(profile, kernels=kernels, quantization=told), prompts
        )
        compared += same(stored, at_load)
    print(f"{compared} rows of logits equal bitwise")
    assert compared == 2 * 5 * 6


@pytest.mark.parametrize("profile", [INT8, INT4], ids=lambda one: one.name)
def test_the_real_model_stored_in_few_bits(real_store, profile: Profile, rng, monkeypatch):
    store, digest = real_store
    derived = derive(store, digest, Derivation("quantization", profile.quantization))
    prompts = some_prompts(rng, 49152)
    at_load = answers(store.get(digest).canonical_folder, profile, prompts)

    def quantised_again(*_: object) -> None:
        raise AssertionError("what is stored in few bits is not quantised again")

    monkeypatch.setattr("treadle.nn.native.pack", quantised_again)
    stored = answers(derived.canonical_folder, replace(profile, quantization=""), prompts)
    compared = same(stored, at_load)
    sizes = [
        (one.canonical_folder / "model.safetensors").stat().st_size for one in (store.get(digest), derived)
    ]
    print(f"{compared} rows of logits equal bitwise; {sizes[0]} bytes of weights became {sizes[1]}")
    assert compared == 5 * 6
    assert sizes[1] < 0.75 * sizes[0]


def test_float32_of_bfloat16_files_is_the_parent_widened(tmp_path, rng):
    store, parent = imported(tmp_path, "smollm2", rng.randrange(1 << 31), torch.bfloat16)
    derived = derive(store, parent.manifest.digest, Derivation("dtype", "float32"))
    stored = load_file(derived.canonical_folder / "model.safetensors")
    canonical = load_file(parent.canonical_folder / "model.safetensors")
    assert stored.keys() == canonical.keys()
    assert all(torch.equal(stored[name], canonical[name].float()) for name in stored)
    prompts = some_prompts(rng)
    compared = same(
        answers(derived.canonical_folder, FLOAT32, prompts),
        answers(parent.canonical_folder, FLOAT32, prompts),
    )
    print(f"{len(stored)} tensors and {compared} rows of logits equal bitwise")
    assert compared == 5 * 6


def test_float32_of_float32_files_has_their_values(tmp_path, rng):
    store, parent = imported(tmp_path, "llama2", rng.randrange(1 << 31))
    derived = derive(store, parent.manifest.digest, Derivation("dtype", "float32"))
    prompts = some_prompts(rng)
    ours = answers(derived.canonical_folder, FLOAT32, prompts)
    compared = same(ours, answers(tmp_path / "folder", FLOAT32, prompts))
    rounded = answers(parent.canonical_folder, FLOAT32, prompts)
    assert not torch.equal(ours[0].logits[0], rounded[0].logits[0]), "bfloat16 would have lost something"
    print(f"{compared} rows of logits equal bitwise to the files as they came")
    assert compared == 5 * 6


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def slowly_dequantised(packed: torch.Tensor, scale: torch.Tensor, inputs: int) -> torch.Tensor:
    """One value after another, in Python's own floats."""
    rows = []
    for packed_row, scale_row in zip(packed.tolist(), scale.tolist(), strict=True):
        codes = [code for byte in packed_row for code in (byte & 15, byte >> 4)][:inputs]
        rows.append(
            [
                math.ldexp(E2M1[code & 7], scale_row[place // 32] - 127) * (-1 if code & 8 else 1)
                for place, code in enumerate(codes)
            ]
        )
    return torch.from_numpy(np.array(rows, np.float64))


@pytest.mark.parametrize("profile", [BFLOAT16, FLOAT32], ids=lambda one: one.name)
@pytest.mark.parametrize("kind", ["smollm2", "llama_linear"])
def test_mxfp4_is_served_as_the_floats_that_it_means(kind, profile: Profile, tmp_path, rng):
    store, parent = imported(tmp_path, kind, rng.randrange(1 << 31))
    derived = derive(store, parent.manifest.digest, Derivation("quantization", "mxfp4"))
    stored = load_file(derived.canonical_folder / "model.safetensors")
    floats = load_file(parent.canonical_folder / "model.safetensors")
    dequantised = 0
    for name in [name for name in stored if name.endswith(".weight_packed")]:
        product = name.removesuffix(".weight_packed")
        wide = slowly_dequantised(
            stored[name], stored[f"{product}.weight_scale"], floats[f"{product}.weight"].shape[1]
        )
        floats[f"{product}.weight"] = wide.bfloat16()
        assert torch.equal(floats[f"{product}.weight"].double(), wide), "exact in bfloat16"
        dequantised += 1
    assert dequantised == 3 * 7
    assert all(torch.equal(stored[name], floats[name]) for name in stored.keys() & floats.keys())
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "config.json").write_bytes((parent.canonical_folder / "config.json").read_bytes())
    save_file(floats, reference / "model.safetensors")
    prompts = some_prompts(rng)
    compared = same(answers(derived.canonical_folder, profile, prompts), answers(reference, profile, prompts))
    print(f"{dequantised} weights exact in bfloat16, {compared} rows of logits equal bitwise")
    assert compared == 5 * 6


def perplexity(folder: Path, ids: list[int]) -> float:
    model = load_model(folder, torch.bfloat16, torch.device("cpu"))
    runner = ModelRunner(model, BFLOAT16.cache(model.config, WINDOW // 32, 32))
    targets, sum_, table = torch.tensor(ids[1:]), 0.0, list(range(WINDOW // 32))
    for start in range(0, WINDOW, CHUNK):
        logits = runner.prompt_logits([ScheduledChunk(ids[start : start + CHUNK], start, table, 0)])
        expected = targets[start : start + CHUNK]
        log_probabilities = logits[: len(expected)].double().log_softmax(-1)
        sum_ -= log_probabilities.gather(1, expected[:, None]).sum().item()
    return math.exp(sum_ / (WINDOW - 1))


def test_what_few_bits_cost_in_perplexity(real_store, smollm2_folder: Path):
    store, digest = real_store
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids[:WINDOW]
    plain = perplexity(smollm2_folder, ids)
    print(f"bfloat16: {plain:.3f}")
    assert 5 < plain < 80
    for form, most in (("int8", 1.02), ("int4", 1.2), ("mxfp4", 2.0)):
        derived = derive(store, digest, Derivation("quantization", form))
        found = perplexity(derived.canonical_folder, ids)
        print(f"{form}: {found:.3f}, {found / plain:.4f} of it")
        assert 0.98 < found / plain < most


async def engine_tokens(
    folder: Path, quantization: str, prompts: list[list[int]]
) -> dict[str, list[int]] | str:
    """What a real engine process answers; or why it does not load."""
    config = EngineConfig(device="cpu", quantization=quantization, kv_cache_bytes=1 << 22, num_threads=1)
    client = await EngineClient.start(folder, config)
    try:
        sampling = SamplingParams(max_new_tokens=12, temperature=0.0)
        await client.send(
            [
                AddRequest(request_id=str(number), prompt_token_ids=prompt, sampling=sampling)
                for number, prompt in enumerate(prompts)
            ]
        )
        tokens: dict[str, list[int]] = {}
        finished = 0
        async with asyncio.timeout(120):
            async for event in client.events():
                if isinstance(event, Failed):
                    return event.message
                for output in event.outputs if isinstance(event, StepOutputs) else ():
                    tokens.setdefault(output.request_id, []).extend(output.token_ids)
                    finished += bool(output.finish_reason)
                if finished == len(prompts):
                    break
        return tokens
    finally:
        await client.stop()


async def test_an_engine_serves_what_is_stored(tmp_path, rng):
    store, parent = imported(tmp_path, "smollm2", rng.randrange(1 << 31))
    derived = derive(store, parent.manifest.digest, Derivation("quantization", "int8"))
    prompts = some_prompts(rng)
    at_load = await engine_tokens(parent.canonical_folder, "int8", prompts)
    stored = await engine_tokens(derived.canonical_folder, "", prompts)
    assert stored == at_load
    assert len(stored) == len(prompts)
    refused = await engine_tokens(derived.canonical_folder, "int4", prompts)
    print(f"{len(stored)} answers are the same; {refused}")
    assert "stored as int8 and the engine is told int4" in refused


def test_another_quantisation_than_the_stored_one_is_refused(tmp_path, rng):
    store, parent = imported(tmp_path, "smollm2", rng.randrange(1 << 31))
    refused = 0
    for form in ("int8", "int4", "mxfp4"):
        derived = derive(store, parent.manifest.digest, Derivation("quantization", form))
        for told in {"int8", "int4"} - {form}:
            with pytest.raises(FailedPrecondition) as caught:
                load_model(derived.canonical_folder, torch.bfloat16, torch.device("cpu"), quantization=told)
            assert caught.value.reason == "QUANTIZED_OTHERWISE"
            assert form in caught.value.message
            assert told in caught.value.message
            refused += 1
    with pytest.raises(FailedPrecondition, match="serve the model that it was made of") as caught:
        int8 = derive(store, parent.manifest.digest, Derivation("quantization", "int8"))
        load_model(int8.canonical_folder, torch.bfloat16, torch.device("cuda"))
    assert caught.value.reason == "QUANTIZATION_NOT_AVAILABLE"
    print(f"{refused} refused, and one on a device that has no such products")
    assert refused == 4

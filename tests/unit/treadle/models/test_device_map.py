"""Device maps, held against accelerate's own over the same models on the meta device."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import CustomDtype, get_balanced_memory, infer_auto_device_map, modeling

from treadle.errors import InvalidArgument
from treadle.models.config import parse_config
from treadle.models.device_budget import balanced, is_accelerator, ordered, read_size
from treadle.models.device_map import infer_device_map, merged
from treadle.models.families import module_tree
from treadle.models.module_tree import ModuleTree, module_bytes, tensor_bytes

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
_LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_QWEN2_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": _SMALL | {"model_type": "llama"},
    "llama, tied": _SMALL | {"model_type": "llama", "tie_word_embeddings": True},
    "llama, all heads, biases": _SMALL
    | {"model_type": "llama", "num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True},
    "llama, deep and narrow": _SMALL | {"model_type": "llama", "num_hidden_layers": 40, "vocab_size": 50},
    "llama, one wide layer": _SMALL
    | {"model_type": "llama", "num_hidden_layers": 1, "intermediate_size": 4000, "tie_word_embeddings": True},
    "mistral": _SMALL | {"model_type": "mistral", "sliding_window": 128},
    "qwen2": _SMALL | {"model_type": "qwen2"},
    "qwen3, tied, a large vocabulary": _SMALL
    | {"model_type": "qwen3", "vocab_size": 9000, "tie_word_embeddings": True},
    "Llama 3 8B": _LLAMA3_8B | {"model_type": "llama"},
    "Qwen2 0.5B": _QWEN2_05B | {"model_type": "qwen2"},
    "SmolLM2 135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
pytestmark = pytest.mark.filterwarnings("ignore:Current model requires:UserWarning")
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
FORMS = ("float32", "bfloat16", "int8", "int4")
CASES_OF_EACH = 60


def on_meta(raw: dict[str, Any]) -> torch.nn.Module:
    """The model as transformers builds it, without weights."""
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**raw)
        return transformers.AutoModelForCausalLM.from_config(config)


def accelerates(
    model: Any,
    strategy: str,
    form: str,
    budget: dict[str, int],
    no_split: list[str],
    is_users: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, str]:
    """What accelerate makes of it."""
    keyed: dict[Any, int] = {
        int(device) if device.isdigit() else device: size for device, size in budget.items()
    }
    sizes: dict[str, Any] = {"dtype": torch.float32 if form == "float32" else torch.bfloat16}
    if form in ("int8", "int4"):
        kind = torch.int8 if form == "int8" else CustomDtype.INT4
        sizes["special_dtypes"] = {
            f"{name}.weight": kind
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }
    if strategy != "sequential":
        # It takes the disk's key for a device of torch's; it adds the disk by itself.
        keyed.pop("disk", None)
        with monkeypatch.context() as patch:
            given: Any = dict(keyed)
            if not is_users:
                patch.setattr(modeling, "get_max_memory", lambda max_memory: dict(keyed))
                given = None
            keyed = get_balanced_memory(
                model,
                given,
                no_split_module_classes=no_split,
                low_zero=strategy == "balanced_low_0",
                **sizes,
            )
    made = infer_auto_device_map(model, dict(keyed), no_split_module_classes=no_split, **sizes)
    return {name: str(device) for name, device in made.items()}


def ours(
    tree: ModuleTree, strategy: str, form: str, budget: dict[str, int], is_users: bool
) -> dict[str, str]:
    quantization = form if form in ("int8", "int4") else ""
    sizes = module_bytes(tensor_bytes(tree, form if not quantization else "bfloat16", quantization))
    planned = ordered(budget, "max_memory")
    if strategy != "sequential":
        planned = balanced(planned, tree, sizes, low_zero=strategy == "balanced_low_0", is_users=is_users)
    return infer_device_map(tree, sizes, planned)


def draw_budget(rng: random.Random, total: int) -> dict[str, int]:
    """One to eight accelerators: together a tenth to three times the model, or each up to twice of it."""
    count = rng.choice((1, 2, 3, 8, rng.randint(1, 8)))
    each = total * rng.choice((0.1, 0.4, 0.7, 1.0, 1.3, 3.0)) / count
    budget = {str(number): int(each * rng.uniform(0.5, 1.5)) for number in range(count)}
    if rng.random() < 0.4:
        budget = {device: int(total * rng.uniform(0, 2)) for device in budget}
    if rng.random() < 0.1:
        budget[rng.choice(list(budget))] = 0
    if rng.random() < 0.8:
        budget["cpu"] = int(total * rng.choice((0.05, 0.3, 0.6, 2.0)))
    if rng.random() < 0.1:
        budget["disk"] = 0
    return budget


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_as_accelerate(name: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch):
    raw = CONFIGURATIONS[name]
    model, tree = on_meta(raw), module_tree(parse_config(raw))
    no_split, seen = list(tree.no_split), Counter[str]()
    for case in range(CASES_OF_EACH):
        strategy, form = STRATEGIES[case % 4], rng.choice(FORMS)
        total = int(module_bytes(tensor_bytes(tree, "bfloat16"))[""])
        budget, is_users = draw_budget(rng, total), rng.random() < 0.7
        expected = accelerates(model, strategy, form, budget, no_split, is_users, monkeypatch)
        made = ours(tree, strategy, form, budget, is_users)
        assert made == expected, (strategy, form, budget, is_users)
        seen[strategy] += 1
        seen["over several devices"] += len(set(made.values())) > 1
        seen["cpu"] += "cpu" in made.values()
        seen["disk"] += "disk" in made.values()
        seen["all on one"] += made == {"": next(iter(made.values()))}
        seen["layers apart"] += any(key.startswith("model.layers.") for key in made)
    assert seen["over several devices"] > 0
    assert seen["disk"] > 0
    print(f"{name}: {CASES_OF_EACH} maps equal to accelerate's; ties: {dict(tree.ties)}; {dict(seen)}")


@pytest.mark.parametrize("name", ["llama", "llama, tied", "mistral"])
def test_as_accelerate_where_layers_may_be_divided(
    name: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
):
    raw = CONFIGURATIONS[name]
    whole = module_tree(parse_config(raw))
    model, tree, divided = on_meta(raw), ModuleTree(whole.root, frozenset(), whole.ties), 0
    total = int(module_bytes(tensor_bytes(tree, "bfloat16"))[""])
    for case in range(CASES_OF_EACH):
        strategy, budget = STRATEGIES[case % 4], draw_budget(rng, total)
        expected = accelerates(model, strategy, "bfloat16", budget, [], True, monkeypatch)
        made = ours(tree, strategy, "bfloat16", budget, True)
        assert made == expected, (strategy, budget)
        divided += any(key.endswith(("_proj", "act_fn", "norm")) and ".layers." in key for key in made)
    assert divided > 0
    print(f"{name}: {CASES_OF_EACH} maps equal, {divided} of them with divided layers")


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_sizes_as_accelerate(name: str, form: str):
    raw = CONFIGURATIONS[name]
    model, tree = on_meta(raw), module_tree(parse_config(raw))
    quantization = form if form in ("int8", "int4") else ""
    sizes = module_bytes(tensor_bytes(tree, "bfloat16" if quantization else form, quantization))
    special = {
        f"{path}.weight": torch.int8 if form == "int8" else CustomDtype.INT4
        for path, module in model.named_modules()
        if quantization and isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    expected = dict(modeling.compute_module_sizes(model, dtype=dtype, special_dtypes=special or None))
    assert sizes == expected
    assert [module.name for module in tree.root.walk()] == [path for path, _ in model.named_modules()]
    assert [module.kind for module in tree.root.walk()][1:] == [
        type(module).__name__ for _, module in model.named_modules()
    ][1:]
    assert list(tree.no_split) == list(model._no_split_modules)
    assert tree.tied_groups() == modeling.find_tied_parameters(model)
    assert tree.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_sizes_are_read_as_accelerate_reads_them(rng: random.Random):
    units = ("KiB", "MiB", "GiB", "KB", "MB", "GB", "Kb", "Mb", "Gb", "gib", "mb")
    texts = [
        f"{rng.choice((rng.randint(0, 999), rng.uniform(0, 99)))}{rng.choice(units)}" for _ in range(200)
    ]
    for text in texts:
        assert read_size(text, "max_memory") == modeling.convert_file_size_to_int(text), text
    assert read_size("1234", "max_memory") == 1234
    for bad in ("", "GiB", "-1GB", "1TB", "1e9", "nan", "inf", "1 2GB", "٣GB", "9" * 30):
        with pytest.raises(InvalidArgument) as caught:
            read_size(bad, "max_memory")
        assert caught.value.fields[0].field == "max_memory"
    print(f"{len(texts)} sizes")


def test_devices():
    assert list(ordered({"disk": 1, "10": 1, "cpu": 1, "2": 1}, "max_memory")) == ["2", "10", "cpu", "disk"]
    assert is_accelerator("0")
    for bad in ("gpu", "cuda:0", "-1", "01", "", "1.0"):
        with pytest.raises(InvalidArgument) as caught:
            ordered({bad: 1}, "max_memory")
        assert caught.value.reason == "UNKNOWN_DEVICE"
    tree = module_tree(parse_config(CONFIGURATIONS["llama"]))
    sizes = module_bytes(tensor_bytes(tree, "bfloat16"))
    with pytest.raises(InvalidArgument, match="without a gap"):
        balanced({"1": 1e9, "3": 1e9}, tree, sizes, low_zero=True, is_users=True)


def test_merging(rng: random.Random):
    for _ in range(300):
        names = {
            ".".join(rng.choice("abc") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 12))
        }
        # A map names no module within another.
        flat = {
            name: rng.choice("01")
            for name in names
            if not any(name.startswith(f"{other}.") for other in names)
        }
        assert merged(flat) == modeling.clean_device_map(dict(flat))

"""What config.json files say in every spelling, and what is refused by name."""

from __future__ import annotations

import json

import pytest

from treadle.errors import FailedPrecondition, InvalidArgument
from treadle.models.config import RopeScaling, parse_config, read_config
from treadle.models.llama import EMBEDDING, HEAD, expected_tensors, tied_tensors

BASE = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(**changes):
    return parse_config(BASE | changes)


def test_defaults_are_those_of_transformers():
    parsed = parse_config({key: value for key, value in BASE.items() if key != "num_key_value_heads"})
    assert (parsed.head_dim, parsed.num_key_value_heads, parsed.rope_theta) == (8, 6, 10000.0)
    assert parsed.rope_scaling == RopeScaling()
    assert parsed.sliding_windows == (None, None, None)
    options = (parsed.tie_word_embeddings, parsed.attention_bias, parsed.mlp_bias, parsed.qk_norm)
    assert options == (False, False, False, False)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "llama3", **LLAMA3, "original_max_position_embeddings": 64},
        },
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 64}},
    ],
    ids=["rope_scaling", "type", "rope_parameters"],
)
def test_rope_scaling_in_every_spelling(spelling):
    parsed = config(**spelling)
    assert parsed.rope_theta == 5e5
    assert parsed.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def test_the_original_length_is_the_present_one_when_it_is_not_told():
    assert config(rope_scaling=LLAMA3).rope_scaling.original_max_position_embeddings == 512


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 7}, (7, 7, 7)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None, None)),
        ({"model_type": "qwen2", "sliding_window": 7}, (None, None, None)),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}, (None, None, None)),
        (
            {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
            (None, 7, 7),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (7, None, 7),
        ),
    ],
)
def test_windows(changes, windows):
    assert config(**changes).sliding_windows == windows


def test_what_tells_the_members_apart():
    qwen2, qwen3 = config(model_type="qwen2"), config(model_type="qwen3", attention_bias=True)
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.attention_bias, qwen3.output_bias, qwen3.qk_norm, qwen3.head_dim) == (True, True, True, 128)
    llama = config(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert (llama.attention_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)
    assert not config(model_type="mistral", attention_bias=True).attention_bias


def test_expected_tensors_follow_the_options():
    plain = expected_tensors(config())
    assert len(plain) == 3 + 3 * 9
    assert plain[HEAD] == plain[EMBEDDING] == (97, 48)
    assert plain["model.layers.2.self_attn.k_proj.weight"] == (16, 48)
    tied = config(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    assert expected_tensors(tied).keys() - plain.keys() == {
        f"model.layers.{layer}.{name}.bias"
        for layer in range(3)
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    }
    assert plain.keys() - expected_tensors(tied).keys() == {HEAD}
    assert tied_tensors(tied) == {HEAD: EMBEDDING}
    assert expected_tensors(config(model_type="qwen3"))["model.layers.0.self_attn.q_norm.weight"] == (128,)


@pytest.mark.parametrize(
    ("changes", "reason", "named"),
    [
        ({"model_type": "mamba"}, "UNSUPPORTED_ARCHITECTURE", "mamba"),
        ({"model_type": None}, "UNSUPPORTED_ARCHITECTURE", "model_type"),
        ({"model_type": ["llama"]}, "UNSUPPORTED_ARCHITECTURE", "model_type"),
        ({"hidden_act": "gelu"}, "UNSUPPORTED_ARCHITECTURE", "gelu"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "REMOTE_CODE", "auto_map"),
        ({"quantization_config": {"bits": 4}}, "UNSUPPORTED_QUANTIZATION", "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "UNSUPPORTED_ARCHITECTURE", "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "UNSUPPORTED_ARCHITECTURE", "longrope"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "UNSUPPORTED_ARCHITECTURE",
            "kind of layer",
        ),
        ({"partial_rotary_factor": 0.5}, "UNSUPPORTED_ARCHITECTURE", "partial_rotary_factor"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "UNSUPPORTED_ARCHITECTURE",
            "partial_rotary_factor",
        ),
        ({"model_type": "mistral", "layer_types": ["x"]}, "UNSUPPORTED_ARCHITECTURE", "layer_types"),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "chunked_attention", "full_attention"],
            },
            "UNSUPPORTED_ARCHITECTURE",
            "chunked_attention",
        ),
    ],
)
def test_what_no_code_here_computes_is_refused_by_name(changes, reason, named):
    with pytest.raises(FailedPrecondition) as caught:
        config(**changes)
    assert caught.value.reason == reason
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in BASE if field != "model_type" for value in (0, -1, "8", True, [8])),
        *((field, value) for field in ("vocab_size", "hidden_size") for value in (1 << 40, 2.5, None)),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("num_hidden_layers", 100_000),
        ("num_key_value_heads", 4),
        ("num_attention_heads", 7),
        ("head_dim", 7),
        ("tie_word_embeddings", "false"),
        ("attention_bias", 1),
        ("rope_theta", 0),
        ("rope_scaling", [1]),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", LLAMA3 | {"low_freq_factor": 4.0}),
        ("rope_scaling", LLAMA3 | {"factor": None}),
    ],
)
def test_corrupt_values_are_refused_by_name(field, value):
    with pytest.raises(InvalidArgument) as caught:
        config(**{field: value})
    assert caught.value.reason == "CORRUPT_CONFIG"
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"', "[" * 100_000, "{" + " " * (1 << 20)])
def test_files_that_are_no_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        read_config(tmp_path)
    assert caught.value.reason == "CORRUPT_CONFIG"


def test_a_folder_without_configuration(tmp_path):
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert read_config(tmp_path) == config()

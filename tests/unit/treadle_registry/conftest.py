"""llama.cpp as the oracle, and small models made on the spot."""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

TEXT = (
    "The quick brown fox's 12345 jumps; they'll over  the\n\n lazy dog. ÀÉÎ naïve 你好世界 привет שלום "
    "don't I'M WE'RE 3.14159 1,000,000\t\ttabs\r\n  spaces   end ½ ² ⅷ ١٢٣ e\u0301 🙂🙃 #hash @at $5 a_b "
)


class _ModelParams(ctypes.Structure):
    """`llama_model_params`, seen from outside: passed on as it was given, and larger than it is."""

    _fields_ = (("opaque", ctypes.c_uint64 * 64),)


class LlamaCpp:
    """Tokenises as llama.cpp does, through the library that the `xllamacpp` wheel has."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("xllamacpp")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        (library,) = Path(spec.submodule_search_locations[0]).glob("*.so")
        self._api = ctypes.CDLL(str(library))
        self._silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda level, text, data: None
        )
        self._api.llama_log_set(self._silent, None)
        self._api.llama_backend_init()
        self._api.llama_model_default_params.restype = _ModelParams
        self._api.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
        self._api.llama_model_load_from_file.restype = ctypes.c_void_p
        self._api.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        self._api.llama_model_get_vocab.restype = ctypes.c_void_p
        self._api.llama_model_free.argtypes = [ctypes.c_void_p]
        self._api.llama_tokenize.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
        ]

    def tokenize(
        self, path: Path, texts: list[str], *, add_special: bool, parse_special: bool
    ) -> list[list[int]]:
        """The ids of each text by the vocabulary in a GGUF file."""
        params = self._api.llama_model_default_params()
        model = self._api.llama_model_load_from_file(str(path).encode(), params)
        assert model, f"llama.cpp does not load {path}"
        vocabulary = self._api.llama_model_get_vocab(model)
        ids = []
        for text in texts:
            raw = text.encode()
            room = (ctypes.c_int32 * (len(raw) + 8))()
            count = self._api.llama_tokenize(
                vocabulary, raw, len(raw), room, len(room), add_special, parse_special
            )
            assert count >= 0
            ids.append(list(room[:count]))
        self._api.llama_model_free(model)
        return ids


@pytest.fixture(scope="session")
def llama_cpp() -> LlamaCpp:
    """The oracle."""
    return LlamaCpp()


@pytest.fixture(scope="session")
def tiny_model() -> type[TinyModel]:
    """The class of small models."""
    return TinyModel


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """Writes one as a GGUF file."""
    return _write_gguf


@dataclass
class Vocabulary:
    """What a GGUF file says of its tokens."""

    tokens: list[str]
    types: list[int]
    merges: list[str]


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """A small vocabulary whose merges cross every border, so that each rule's cuts show in the ids."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=9,
    )
    pieces = [TEXT[start : start + 11] for start in range(0, len(TEXT), 3)] * 3
    tokenizer.train_from_iterator(pieces, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = ["<|bos|>", "<|eos|>", "<|unk|>"]
    user = ["<tool>", "  <pad> "]
    return Vocabulary(
        tokens=[*tokens, *special, *user],
        types=[1] * len(tokens) + [3] * len(special) + [4] * len(user),
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    )


@dataclass
class TinyModel:
    """A model small enough to write in a test; `tensors` have their Hugging Face names and order."""

    architecture: str = "llama"
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    inner: int = 96
    tied: bool = False
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """More metadata, or None to leave a key out."""


def to_gguf_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter on a query or key projection: halves become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_tensors(model: TinyModel, vocab: int) -> dict[str, np.ndarray]:
    """Every parameter random, biases and norms included."""
    random = np.random.default_rng()

    def make(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    tensors = {
        "model.embed_tokens.weight": make(vocab, model.hidden),
        "model.norm.weight": make(model.hidden),
    }
    if not model.tied:
        tensors["lm_head.weight"] = make(vocab, model.hidden)
    for layer in range(model.layers):
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (model.hidden,),
            "self_attn.q_proj.weight": (queries, model.hidden),
            "self_attn.k_proj.weight": (keys, model.hidden),
            "self_attn.v_proj.weight": (keys, model.hidden),
            "self_attn.o_proj.weight": (model.hidden, queries),
            "post_attention_layernorm.weight": (model.hidden,),
            "mlp.gate_proj.weight": (model.inner, model.hidden),
            "mlp.up_proj.weight": (model.inner, model.hidden),
            "mlp.down_proj.weight": (model.hidden, model.inner),
        }
        if model.architecture == "qwen2":
            shapes |= {
                f"self_attn.{name}_proj.bias": (size,)
                for name, size in zip("qkv", (queries, keys, keys), strict=True)
            }
        if model.architecture == "qwen3":
            shapes |= {f"self_attn.{name}_norm.weight": (model.head_dim,) for name in "qk"}
        tensors |= {f"model.layers.{layer}.{name}": make(*shape) for name, shape in shapes.items()}
    return tensors


def _write_gguf(
    path: Path,
    model: TinyModel,
    vocabulary: Vocabulary,
    pre: str = "gpt-2",
    form: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """The model as a GGUF file; two-dimensional tensors in the format `form`."""
    name = model.architecture
    model.tensors = model.tensors or random_tensors(model, len(vocabulary.tokens))
    metadata: dict[str, Any] = {
        f"{name}.block_count": model.layers,
        f"{name}.context_length": 512,
        f"{name}.embedding_length": model.hidden,
        f"{name}.feed_forward_length": model.inner,
        f"{name}.attention.head_count": model.heads,
        f"{name}.attention.head_count_kv": model.kv_heads,
        f"{name}.attention.key_length": model.head_dim,
        f"{name}.attention.value_length": model.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{name}.rope.freq_base": 50000.0,
        f"{name}.rope.dimension_count": model.head_dim,
        "general.license": "apache-2.0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": vocabulary.tokens.index("<|bos|>"),
        "tokenizer.ggml.eos_token_id": vocabulary.tokens.index("<|eos|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    } | model.extra
    writer = gguf.GGUFWriter(path, name)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor_name, values in model.tensors.items():
        writer.add_tensor(*_gguf_tensor(model, tensor_name, values, form))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    add: Callable[..., None] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }[type(value)]
    add(key, value)


def _gguf_tensor(
    model: TinyModel, name: str, values: np.ndarray, form: gguf.GGMLQuantizationType
) -> tuple[Any, ...]:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        target = f"blk.{layer}.{_NAMES[part]}.{kind}"
    else:
        target = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.get(
            stem, stem
        ) + f".{kind}"
    if model.architecture == "llama" and ".q_proj." in name:
        values = to_gguf_rows(values, model.heads)
    if model.architecture == "llama" and ".k_proj." in name:
        values = to_gguf_rows(values, model.kv_heads)
    if values.ndim == 1 or form == gguf.GGMLQuantizationType.F32:
        return target, values
    data = gguf.quants.quantize(values, form)
    if form == gguf.GGMLQuantizationType.F16:
        return target, data
    return target, data, None, form

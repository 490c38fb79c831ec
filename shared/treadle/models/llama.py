"""Tensor names and shapes of the Llama family, as Hugging Face folders have them. No torch.

`expected_tensors` is what a canonical folder holds; the registry checks what it writes against it and the
loader what it reads.
"""

from __future__ import annotations

from treadle.models.config import ModelConfig
from treadle.models.module_tree import Module, ModuleTensor, ModuleTree

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Shape = tuple[int, ...]


def tied_tensors(config: ModelConfig) -> dict[str, str]:
    """Names that need not be stored, and the tensor that each one is."""
    return {HEAD: EMBEDDING} if config.tie_word_embeddings else {}


def layer_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Names below `model.layers.<n>.` with their shapes, [out, in] for projections."""
    hidden, head_dim, inner = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    tensors: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.attention_bias:
        tensors |= {
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.bias": (keys,),
        }
    if config.output_bias:
        tensors["self_attn.o_proj.bias"] = (hidden,)
    if config.mlp_bias:
        tensors |= {
            "mlp.gate_proj.bias": (inner,),
            "mlp.up_proj.bias": (inner,),
            "mlp.down_proj.bias": (hidden,),
        }
    if config.qk_norm:
        tensors |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    return tensors


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor that must be stored, tied ones once."""
    tensors: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_tensors(config).items()}
    tensors["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        tensors[HEAD] = (config.vocab_size, config.hidden_size)
    return tensors


_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def module_tree(config: ModelConfig) -> ModuleTree:
    """The modules as transformers has them, with its tables of rotary frequencies."""
    name = _CLASSES[config.model_type]
    table = (config.head_dim // 2,)
    rotary = Module(
        "model.rotary_emb",
        f"{name}RotaryEmbedding",
        buffers=tuple(
            ModuleTensor(f"model.rotary_emb.{table_name}", table)
            for table_name in ("inv_freq", "original_inv_freq")
        ),
    )
    hidden, embedding_shape = (config.hidden_size,), (config.vocab_size, config.hidden_size)
    layers = tuple(_layer(config, name, layer) for layer in range(config.num_hidden_layers))
    model = Module(
        "model",
        f"{name}Model",
        children=(
            Module("model.embed_tokens", "Embedding", (ModuleTensor(EMBEDDING, embedding_shape),)),
            Module("model.layers", "ModuleList", children=layers),
            Module("model.norm", f"{name}RMSNorm", (ModuleTensor("model.norm.weight", hidden),)),
            rotary,
        ),
    )
    head = Module("lm_head", "Linear", (ModuleTensor(HEAD, embedding_shape),))
    root = Module("", f"{name}ForCausalLM", children=(model, head))
    return ModuleTree(root, frozenset({f"{name}DecoderLayer"}), tied_tensors(config))


def _layer(config: ModelConfig, name: str, layer: int) -> Module:
    prefix = f"model.layers.{layer}"
    tensors = layer_tensors(config)

    def leaf(path: str) -> Module:
        last = path.rpartition(".")[2]
        parameters = tuple(
            ModuleTensor(
                f"{prefix}.{path}.{kind}", tensors[f"{path}.{kind}"], last in _LINEAR and kind == "weight"
            )
            for kind in ("weight", "bias")
            if f"{path}.{kind}" in tensors
        )
        return Module(f"{prefix}.{path}", "Linear" if last in _LINEAR else f"{name}RMSNorm", parameters)

    norms = ("q_norm", "k_norm") if config.qk_norm else ()
    attention = tuple(leaf(f"self_attn.{part}") for part in ("q_proj", "k_proj", "v_proj", "o_proj", *norms))
    activation = Module(f"{prefix}.mlp.act_fn", "SiLUActivation")
    mlp = (*(leaf(f"mlp.{part}") for part in ("gate_proj", "up_proj", "down_proj")), activation)
    return Module(
        prefix,
        f"{name}DecoderLayer",
        children=(
            Module(f"{prefix}.self_attn", f"{name}Attention", children=attention),
            Module(f"{prefix}.mlp", f"{name}MLP", children=mlp),
            leaf("input_layernorm"),
            leaf("post_attention_layernorm"),
        ),
    )

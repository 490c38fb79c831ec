"""config.json of encoders, the names of their tensors and their module trees, against transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_encoders import CLASSES, SUFFIXES, make
from transformers import PreTrainedModel

from treadle.errors import FailedPrecondition, InvalidArgument, TreadleError
from treadle.models.config import parse_config
from treadle.models.encoder_config import EncoderConfig
from treadle.models.families import (
    ENCODERS,
    MODEL_TYPES,
    canonical_name,
    expected_tensors,
    has_word_pieces,
    is_encoder,
    module_tree,
    optional_tensors,
    parse_any_config,
    reads_type_ids,
    tied_tensors,
)
from treadle.models.memory_estimate import estimate_serving, estimate_training, weight_bytes
from treadle.models.training_memory import linear_weights

BERT: dict[str, object] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def parsed(**changes: object) -> EncoderConfig:
    """BERT's configuration with changes; None leaves a key out."""
    config = parse_any_config({key: value for key, value in (BERT | changes).items() if value is not None})
    assert isinstance(config, EncoderConfig)
    return config


def raw_of(model: PreTrainedModel) -> dict[str, object]:
    """What transformers writes into config.json."""
    return model.config.to_dict() | {"architectures": [type(model).__name__]}


@pytest.mark.parametrize("head", SUFFIXES)
@pytest.mark.parametrize("kind", CLASSES)
def test_names_and_shapes_are_those_of_transformers(kind: str, head: str):
    model = make(kind, head, 0, num_labels=3)
    config = parse_any_config(raw_of(model))
    assert is_encoder(config)
    assert (config.model_type, config.head, config.num_labels) == (kind, head, 3 if head else 0)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    canonical = {canonical_name(config, name): shape for name, shape in theirs.items()}
    ours = expected_tensors(config) | optional_tensors(config)
    assert canonical == ours
    assert not any(name.startswith(f"{kind}.") for name in ours)
    assert set(optional_tensors(config)) == {name for name in theirs if name.startswith("pooler.")}
    assert tied_tensors(config) == {}
    tree = module_tree(config)
    assert {tensor.name: tensor.shape for tensor in tree.parameters()} == theirs
    assert tree.no_split <= {type(module).__name__ for module in model.modules()} | {"DistilBertEmbeddings"}
    layers = [module.name for module in tree.root.walk() if module.kind.endswith(("Layer", "Block"))]
    assert len(layers) == 3
    modules = dict(model.named_modules())
    assert all(type(modules[name]).__name__ in tree.no_split for name in layers)
    assert len(linear_weights(tree)) == 3 * 6
    print(f"{kind}, head {head or 'none'}: {len(ours)} tensors")


@pytest.mark.parametrize(
    ("kind", "head", "names"),
    [
        ("bert", "", ["bert.embeddings.position_ids", "cls.predictions.bias", "cls.seq_relationship.weight"]),
        ("bert", "token", ["bert.pooler.dense.weight", "pooler.dense.bias"]),
        ("roberta", "", ["lm_head.dense.weight", "lm_head.bias", "roberta.embeddings.position_ids"]),
        ("roberta", "sequence", ["roberta.pooler.dense.weight"]),
        ("distilbert", "", ["vocab_transform.weight", "vocab_layer_norm.bias", "vocab_projector.bias"]),
    ],
)
def test_what_no_task_needs_is_left_out(kind: str, head: str, names: list[str]):
    config = parse_any_config(raw_of(make(kind, head, 0)))
    assert [canonical_name(config, name) for name in names] == [None] * len(names)
    assert canonical_name(config, "something.else") == "something.else"


def test_a_decoders_names_stay():
    raw = BERT | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config = parse_any_config(raw)
    assert config == parse_config(raw)
    assert not is_encoder(config)
    assert canonical_name(config, "model.norm.weight") == "model.norm.weight"


def test_the_longest_text():
    assert parsed().max_input_tokens == 64
    roberta = parse_any_config(
        BERT | {"model_type": "roberta", "architectures": ["RobertaModel"], "max_position_embeddings": 514}
    )
    assert isinstance(roberta, EncoderConfig)
    assert (roberta.pad_token_id, roberta.max_input_tokens) == (1, 512)


@pytest.mark.parametrize(
    ("changes", "reason", "says"),
    [
        ({"model_type": "gpt2"}, "UNSUPPORTED_ARCHITECTURE", ", ".join(MODEL_TYPES)),
        ({"model_type": ["bert"]}, "UNSUPPORTED_ARCHITECTURE", "supported"),
        ({"auto_map": {}}, "REMOTE_CODE", "distilbert"),
        ({"architectures": ["BertForQuestionAnswering"]}, "UNSUPPORTED_ARCHITECTURE", "BertForTokenClass"),
        ({"architectures": ["BertForMultipleChoice"]}, "UNSUPPORTED_ARCHITECTURE", "MultipleChoice"),
        ({"architectures": ["BertForNextSentencePrediction"]}, "UNSUPPORTED_ARCHITECTURE", "NextSentence"),
        ({"architectures": ["RobertaModel"]}, "UNSUPPORTED_ARCHITECTURE", "RobertaModel"),
        ({"architectures": "BertModel"}, "CORRUPT_CONFIG", "architectures"),
        ({"architectures": [1]}, "CORRUPT_CONFIG", "architectures"),
        ({"is_decoder": True}, "UNSUPPORTED_ARCHITECTURE", "is_decoder"),
        ({"add_cross_attention": True}, "UNSUPPORTED_ARCHITECTURE", "add_cross_attention"),
        ({"position_embedding_type": "relative_key"}, "UNSUPPORTED_ARCHITECTURE", "relative_key"),
        ({"hidden_act": "tanh"}, "UNSUPPORTED_ARCHITECTURE", "gelu_new"),
        ({"hidden_act": 1}, "UNSUPPORTED_ARCHITECTURE", "hidden_act"),
        ({"pruned_heads": {"0": [1]}}, "UNSUPPORTED_ARCHITECTURE", "pruned_heads"),
        ({"quantization_config": {"quant_method": "gptq"}}, "UNSUPPORTED_QUANTIZATION", "float"),
        ({"num_attention_heads": 5}, "CORRUPT_CONFIG", "hidden_size"),
        ({"hidden_size": "32"}, "CORRUPT_CONFIG", "hidden_size"),
        ({"vocab_size": 0}, "CORRUPT_CONFIG", "vocab_size"),
        ({"num_hidden_layers": 1 << 20}, "CORRUPT_CONFIG", "num_hidden_layers"),
        ({"type_vocab_size": 0}, "CORRUPT_CONFIG", "type_vocab_size"),
        ({"layer_norm_eps": 0}, "CORRUPT_CONFIG", "layer_norm_eps"),
        ({"pad_token_id": -1}, "CORRUPT_CONFIG", "pad_token_id"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], reason: str, says: str):
    with pytest.raises(TreadleError, match=says) as caught:
        parsed(**changes)
    assert caught.value.reason == reason
    expected = InvalidArgument if reason == "CORRUPT_CONFIG" else FailedPrecondition
    assert isinstance(caught.value, expected)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 2),
        ({"num_labels": 1}, 1),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
        ({"id2label": {"0": "a"}, "num_labels": 1}, 1),
    ],
)
def test_the_number_of_labels(changes: dict[str, object], count: int):
    config = parsed(architectures=["BertForSequenceClassification"], **changes)
    assert (config.head, config.num_labels) == ("sequence", count)


@pytest.mark.parametrize(
    "changes",
    [
        {"id2label": {}},
        {"id2label": ["a"]},
        {"id2label": {"1": "a", "2": "b"}},
        {"id2label": {"0": "a"}, "num_labels": 2},
        {"num_labels": 0},
    ],
)
def test_labels_that_do_not_fit(changes: dict[str, object]):
    with pytest.raises(InvalidArgument, match="label"):
        parsed(architectures=["BertForTokenClassification"], **changes)


def test_no_architectures_is_a_bare_encoder():
    assert parsed(architectures=None).head == ""


def test_memory_of_an_encoder():
    config = parsed(hidden_size=384, intermediate_size=1536, num_attention_heads=12, num_hidden_layers=6)
    parameters = module_tree(config).num_parameters
    served = estimate_serving(config, batch=8)
    assert served.weight_bytes == 4 * parameters
    assert (served.cache_bytes, served.parameters) == (0, parameters)
    assert 512 * 4 * 5 * 384 < served.activation_bytes < 1 << 24
    products = 6 * (384 * 384 + 2 * 384 * 1536)
    assert weight_bytes(config, "float32", "int8") == 4 * (parameters - products) + products * 36 // 32
    trained = estimate_training(config, context=64, batch=8)
    assert trained.trained_parameters == parameters
    assert trained.optimizer_bytes == 8 * parameters
    for changes, field in (
        ({"cache_dtype": "int8"}, "cache_dtype"),
        ({"quantization": "int4"}, "quantization"),
        ({"context": 65}, "context_length"),
    ):
        with pytest.raises(InvalidArgument, match=field):
            estimate_serving(config, **changes)


def test_a_step_takes_what_is_estimated():
    config = parsed(hidden_size=384, intermediate_size=1536, num_attention_heads=12)
    from treadle.models.serving_memory import encoder_step_bytes

    longest = encoder_step_bytes(config, 4096, 1)
    assert longest == 2 * encoder_step_bytes(config, 64, 1000), "a longer text is a step of its own"
    assert torch.finfo(torch.float32).bits // 8 * 2048 * (2 * 384 + 2 * 1536) == longest // 2


def test_who_reads_type_ids_and_whose_tokenizer_has_word_pieces() -> None:
    """As transformers' tokenizer of each model says; only encoders read or have them."""
    for model_type in ENCODERS:
        tokenizer = getattr(transformers, f"{CLASSES[model_type][0]}Tokenizer")
        assert reads_type_ids(model_type) == ("token_type_ids" in tokenizer.model_input_names), model_type
        assert has_word_pieces(model_type) == (tokenizer.model.__name__ == "WordPiece"), model_type
    for model_type in (*set(MODEL_TYPES) - set(ENCODERS), "", "no such type"):
        assert not reads_type_ids(model_type)
        assert not has_word_pieces(model_type)
    print(f"{len(ENCODERS)} encoders")

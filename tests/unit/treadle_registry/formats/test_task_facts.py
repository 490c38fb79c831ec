"""What can be asked of a model: by its head, its labels, and sentence-transformers' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_encoder import (
    MEAN,
    NORMALIZED,
    POOLED,
    SENTENCE_FILES,
    canonical_tensors,
    encoder_config,
    write_encoder,
)
from small_folder import TOKENIZER, write_model

from treadle.errors import TreadleError
from treadle_registry.operations.importing import check_source, import_source
from treadle_registry.operations.job import Imported, event_from_json, event_to_json
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.manifest import Manifest
from treadle_registry.store.store import Published, Store
from treadle_registry.store.task_facts import TaskFacts

CLASSIFIER, TAGGER = "ForSequenceClassification", "ForTokenClassification"
INPUT, SETTINGS, POOLING = (
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
EMBEDS = TaskFacts(
    tasks=("embed", "rerank"), embedding_dimensions=16, similarity="cosine", max_input_tokens=40
)
SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"
Folder = tuple[dict[str, Any], dict[str, Any]]
"""config.json, and other files."""


def facts(**values: Any) -> TaskFacts:
    return TaskFacts(**{name: getattr(EMBEDS, name) for name in EMBEDS.__dataclass_fields__} | values)


def ranks(activation: str = "sigmoid", **values: Any) -> TaskFacts:
    return TaskFacts(
        **{
            "tasks": ("classify", "rerank"),
            "labels": ("LABEL_0",),
            "rank_activation": activation,
            "max_input_tokens": 40,
        }
        | values
    )


def bare(model_type: str = "bert", kind: Any = "Model", **files: Any) -> Folder:
    """A model that embeds; a file's name has "__" for "." and "___" for "/"."""
    return encoder_config(model_type, kind), named(files)


def headed(
    kind: Any, labels: list[Any] | dict[str, Any] | None = None, files: Any = None, **config: Any
) -> Folder:
    names = (
        {str(number): label for number, label in enumerate(labels)} if isinstance(labels, list) else labels
    )
    return encoder_config("bert", kind, id2label=names, **config), files or {}


def named(files: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("___", "/").replace("__", "."): content for name, content in files.items()}


def pooled(pooling: dict[str, Any], modules: Any = POOLED) -> Folder:
    return encoder_config(), {"modules.json": modules, POOLING: pooling}


def flags(**modes: bool) -> dict[str, Any]:
    return {f"pooling_mode_{mode}": value for mode, value in modes.items()}


NEWER = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {
        "idx": 1,
        "name": "1",
        "path": "1_Pooling",
        "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    },
    {
        "idx": 2,
        "name": "2",
        "path": "2_Normalize",
        "type": "sentence_transformers.base.modules.normalize.Normalize",
    },
]
CROSS = [NEWER[0]]
GOOD: dict[str, tuple[Folder, TaskFacts]] = {
    "bare": (bare(), EMBEDS),
    "a language model": (bare("bert", "ForMaskedLM"), EMBEDS),
    "RoBERTa counts from behind its padding": (bare("roberta"), facts(max_input_tokens=38)),
    "RoBERTa's own name": (
        bare("roberta", sentence_roberta_config__json={"max_seq_length": 20}),
        facts(max_input_tokens=20),
    ),
    "DistilBERT's own name": (
        bare("distilbert", sentence_distilbert_config__json={"max_seq_length": 9}),
        facts(max_input_tokens=9),
    ),
    "as sentence-transformers writes it": (
        (encoder_config(), SENTENCE_FILES),
        facts(
            pooling="mean",
            normalize=True,
            max_input_tokens=24,
            prompts={"query": "find: ", "passage": ""},
        ),
    ),
    "as release 6 writes it": (
        (
            encoder_config(),
            {
                "modules.json": NEWER,
                POOLING: {"embedding_dimension": 16, "pooling_mode": "cls", "include_prompt": False},
                "2_Normalize/config.json": {
                    "module_input_name": "sentence_embedding",
                    "module_output_name": "sentence_embedding",
                },
                INPUT: {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"},
                SETTINGS: {
                    "__version__": {"sentence_transformers": "6.2.0"},
                    "model_type": "SentenceTransformer",
                    "prompts": {"query": "Q: ", "document": None},
                    "default_prompt_name": "query",
                    "similarity_fn_name": "dot",
                },
            },
        ),
        facts(
            pooling="cls",
            normalize=True,
            skip_prompt=True,
            prompts={"query": "Q: ", "document": ""},
            default_prompt_name="query",
            similarity="dot",
        ),
    ),
    "not normalised": (pooled(MEAN), facts(pooling="mean")),
    "first token": (pooled(flags(cls_token=True, mean_tokens=False)), facts(pooling="cls")),
    "last token": (pooled(flags(lasttoken=True)), facts(pooling="last")),
    "pooling in a list": (pooled({"pooling_mode": ["lasttoken"]}), facts(pooling="last")),
    "pooling by default": (pooled({"word_embedding_dimension": 16}), facts(pooling="mean")),
    "a transformer alone": ((encoder_config(), {"modules.json": POOLED[:1]}), EMBEDS),
    "a tokenizer's limit": (
        bare(tokenizer_config__json={"model_max_length": 12}),
        facts(max_input_tokens=12),
    ),
    "a tokenizer without one": (bare(tokenizer_config__json={"model_max_length": int(1e30)}), EMBEDS),
    "longer than the table": (bare(sentence_bert_config__json={"max_seq_length": 512}), EMBEDS),
    "two labels": (
        headed(CLASSIFIER, ["no", "yes"]),
        TaskFacts(tasks=("classify",), labels=("no", "yes"), max_input_tokens=40),
    ),
    "labels in another order": (
        headed(CLASSIFIER, {"2": "c", "0": "a", "1": "b"}),
        TaskFacts(tasks=("classify",), labels=("a", "b", "c"), max_input_tokens=40),
    ),
    "no labels": (
        headed(CLASSIFIER, num_labels=3),
        TaskFacts(tasks=("classify",), labels=("LABEL_0", "LABEL_1", "LABEL_2"), max_input_tokens=40),
    ),
    "several at once": (
        headed(CLASSIFIER, ["a", "b"], problem_type="multi_label_classification"),
        TaskFacts(tasks=("classify",), labels=("a", "b"), multi_label=True, max_input_tokens=40),
    ),
    "tags": (
        headed(TAGGER, ["O", "B-PER", "I-PER"]),
        TaskFacts(tasks=("tag",), labels=("O", "B-PER", "I-PER"), max_input_tokens=40),
    ),
    "a cross-encoder": (headed(CLASSIFIER, ["LABEL_0"]), ranks()),
    "a regression": (headed(CLASSIFIER, ["LABEL_0"], problem_type="regression"), ranks()),
    "a cross-encoder's own number": (
        headed(CLASSIFIER, ["LABEL_0"], sbert_ce_default_activation_function=IDENTITY),
        ranks(""),
    ),
    "a cross-encoder of release 4": (
        headed(CLASSIFIER, ["LABEL_0"], sentence_transformers={"activation_fn": IDENTITY, "version": "4"}),
        ranks(""),
    ),
    "a cross-encoder of release 6": (
        headed(
            CLASSIFIER,
            ["LABEL_0"],
            {
                "modules.json": CROSS,
                INPUT: {"transformer_task": "sequence-classification", "max_seq_length": None},
                SETTINGS: {"model_type": "CrossEncoder", "activation_fn": IDENTITY, "prompts": {}},
            },
        ),
        ranks(""),
    ),
    "release 6 before release 3": (
        headed(
            CLASSIFIER,
            ["LABEL_0"],
            {SETTINGS: {"model_type": "CrossEncoder", "activation_fn": SIGMOID}},
            sbert_ce_default_activation_function=IDENTITY,
        ),
        ranks(),
    ),
}


def write(folder: Path, made: Folder) -> Path:
    config, files = made
    return write_encoder(folder, config, files=files)


def imported(store: Path, folder: Path) -> Published:
    return import_source(Store.open(store), LocalSource("folder", str(folder)))


@pytest.mark.parametrize("case", GOOD)
def test_facts(tmp_path: Path, case: str):
    made, expected = GOOD[case]
    folder = write(tmp_path / "m", made)
    published = imported(tmp_path / "store", folder)
    assert published.manifest.task_facts == expected
    assert check_source(LocalSource("folder", str(folder))).task_facts == expected
    kept = {file.path for file in published.manifest.source_files}
    assert made[1].keys() <= kept
    # The canonical folder says the same of itself, in the same words.
    again = imported(tmp_path / "other", published.canonical_folder)
    assert again.manifest.task_facts == expected
    assert again.manifest.digests == published.manifest.digests
    assert again.manifest.files == published.manifest.files
    # As does the manifest.
    assert Manifest.from_json(published.manifest.to_json(), "here").task_facts == expected
    print(f"{case}: {expected.presented()}")


def test_the_most_there_may_be_goes_through_a_job(tmp_path: Path):
    """A line that a job's process says has at most a megabyte."""
    labels = [f"{number} {'é' * 15}" for number in range(2_000)]
    prompts = {str(number): "é" * 1_300 for number in range(16)}
    sizes = []
    for name, made in {"labels": headed(TAGGER, labels), "prompts": settings(prompts=prompts)}.items():
        published = imported(tmp_path / "store", write(tmp_path / name, made))
        line = json.dumps(event_to_json(Imported(published.manifest)))
        assert event_from_json(json.loads(line)) == Imported(published.manifest)
        sizes.append(len(line))
    assert 100_000 < min(sizes) <= max(sizes) < 1 << 20
    print(f"lines of {sizes} bytes")


def test_the_longest_context_comes_back(tmp_path: Path):
    """The canonical files say the longest text, and are taken again with whatever a model may have."""
    raw = encoder_config(hidden_size=2, num_attention_heads=1, max_position_embeddings=(1 << 20) + 1)
    made = write_encoder(tmp_path / "m", raw, canonical_tensors(raw, dtype="F16"))
    first = imported(tmp_path / "store", made)
    assert first.manifest.task_facts.max_input_tokens == (1 << 20) + 1
    again = imported(tmp_path / "other", first.canonical_folder)
    assert again.manifest.digest == first.manifest.digest


def test_they_are_presentation(tmp_path: Path):
    """Another prompt, pooling, label or activation is the same encoder, presented otherwise."""
    ways: dict[str, list[Folder]] = {
        "bare": [
            bare(),
            pooled(MEAN),
            pooled(MEAN, NORMALIZED),
            bare(config_sentence_transformers__json={"prompts": {"q": "Q: "}}),
            bare(sentence_bert_config__json={"max_seq_length": 8}),
        ],
        "headed": [
            headed(CLASSIFIER, ["LABEL_0"]),
            headed(CLASSIFIER, ["score"]),
            headed(CLASSIFIER, ["LABEL_0"], sbert_ce_default_activation_function=IDENTITY),
            headed(CLASSIFIER, ["LABEL_0"], sentence_transformers={"activation_fn": SIGMOID}),
        ],
    }
    for kind, folders in ways.items():
        found = [
            imported(tmp_path / "store", write(tmp_path / f"{kind}-{number}", made)).manifest.digests
            for number, made in enumerate(folders)
        ]
        assert all(found)
        assert len({digests.compute for digests in found if digests}) == 1
        assert len({digests.tokenizer for digests in found if digests}) == 1
        presented = len({digests.presentation for digests in found if digests})
        # A sigmoid that is named is the one that there is by default.
        assert presented == len(folders) - (kind == "headed")
        print(f"{kind}: one encoder, {presented} presentations")


def test_where_positions_begin_is_computed(tmp_path: Path):
    """What only fills up is no number of BERT's; RoBERTa counts from behind it."""
    found: dict[str, set[str]] = {}
    for model_type in ("bert", "roberta"):
        for padding in (1, 2):
            raw = encoder_config(model_type, pad_token_id=padding)
            folder = write_encoder(tmp_path / f"{model_type}-{padding}", raw)
            digests = imported(tmp_path / "store", folder).manifest.digests
            assert digests is not None
            found.setdefault(model_type, set()).add(digests.compute)
    assert {name: len(digests) for name, digests in found.items()} == {"bert": 1, "roberta": 2}


LOWER = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        (None, LOWER),
        (LOWER, LOWER),
        ({"type": "NFC"}, {"type": "Sequence", "normalizers": [LOWER, {"type": "NFC"}]}),
        (
            {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
            {"type": "Sequence", "normalizers": [LOWER, {"type": "NFC"}]},
        ),
        (
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, LOWER]},
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, LOWER]},
        ),
    ],
)
def test_lower_case_is_the_tokenizers(tmp_path: Path, normalizer: Any, expected: Any):
    tokenizer = TOKENIZER | {"normalizer": normalizer}
    files = {"tokenizer.json": tokenizer, INPUT: {"max_seq_length": 9, "do_lower_case": True}}
    published = imported(tmp_path / "store", write_encoder(tmp_path / "m", files=files))
    found = json.loads((published.canonical_folder / "tokenizer.json").read_text())
    assert found["normalizer"] == expected
    assert json.loads((published.canonical_folder / INPUT).read_text())["do_lower_case"] is False
    again = imported(tmp_path / "other", published.canonical_folder)
    assert again.manifest.digests == published.manifest.digests


def dense(kind: str = "sentence_transformers.models.Dense") -> list[dict[str, Any]]:
    return [*POOLED, {"idx": 2, "name": "2", "path": "2_Dense", "type": kind}]


def settings(**values: Any) -> Folder:
    return bare(config_sentence_transformers__json=values)


BAD: dict[str, tuple[Folder, str, str]] = {
    "too few labels": (
        headed(CLASSIFIER, ["a"], num_labels=2),
        "CORRUPT_CONFIG",
        "num_labels",
    ),
    "a hole": (headed(CLASSIFIER, {"0": "a", "2": "b"}), "CORRUPT_CONFIG", "id2label"),
    "a label twice": (headed(CLASSIFIER, ["a", "b", "a"]), "CORRUPT_CONFIG", "'a' is there twice"),
    "a number for a label": (headed(CLASSIFIER, ["a", 7]), "CORRUPT_CONFIG", "id2label"),
    "an empty label": (headed(TAGGER, ["O", ""]), "CORRUPT_CONFIG", "id2label"),
    "a long label": (headed(TAGGER, ["O", "x" * 201]), "CORRUPT_CONFIG", "1 to 200 characters"),
    "no object": (headed(CLASSIFIER, {}), "CORRUPT_CONFIG", "id2label"),
    "too many labels": (headed(TAGGER, num_labels=10_001), "CORRUPT_CONFIG", "at most 10000"),
    "long labels": (
        headed(TAGGER, [f"{number} {'é' * 150}" for number in range(300)]),
        "CORRUPT_CONFIG",
        "262144",
    ),
    "an unknown problem": (
        headed(CLASSIFIER, ["a", "b"], problem_type="guess"),
        "CORRUPT_CONFIG",
        "problem_type",
    ),
    "a regression of two": (
        headed(CLASSIFIER, ["a", "b"], problem_type="regression"),
        "UNSUPPORTED_ARCHITECTURE",
        "regression with 2 outputs",
    ),
    "another activation": (
        headed(CLASSIFIER, ["a"], sbert_ce_default_activation_function="torch.nn.modules.activation.Tanh"),
        "UNSUPPORTED_ACTIVATION",
        "Tanh",
    ),
    "an activation of its own": (
        headed(CLASSIFIER, ["a"], sentence_transformers={"activation_fn": "my.Sigmoid"}),
        "UNSUPPORTED_ACTIVATION",
        "my.Sigmoid",
    ),
    "a prompt before a classifier's texts": (
        headed(CLASSIFIER, ["a"], {SETTINGS: {"prompts": {"q": "Q: "}, "default_prompt_name": "q"}}),
        "UNSUPPORTED_MODULE",
        "default_prompt_name",
    ),
    "a classifier that pools": (
        headed(CLASSIFIER, ["a"], {"modules.json": POOLED, POOLING: MEAN}),
        "UNSUPPORTED_MODULE",
        "Pooling",
    ),
    "the largest": (pooled(flags(max_tokens=True)), "UNSUPPORTED_POOLING", "max"),
    "by the root": (pooled(flags(mean_sqrt_len_tokens=True)), "UNSUPPORTED_POOLING", "mean_sqrt_len_tokens"),
    "weighted": (pooled({"pooling_mode": "weightedmean"}), "UNSUPPORTED_POOLING", "weightedmean"),
    "two at once": (
        pooled(flags(cls_token=True, mean_tokens=True)),
        "UNSUPPORTED_POOLING",
        "cls and mean",
    ),
    "none of them": (pooled({"pooling_mode": []}), "UNSUPPORTED_POOLING", "nothing"),
    "a pooling that is a number": (pooled({"pooling_mode": 1}), "CORRUPT_CONFIG", POOLING),
    "a flag that is a word": (pooled({"pooling_mode_cls_token": "yes"}), "CORRUPT_CONFIG", POOLING),
    "other dimensions": (pooled(MEAN | {"word_embedding_dimension": 384}), "CORRUPT_CONFIG", "384"),
    "no settings": ((encoder_config(), {"modules.json": POOLED}), "MISSING_FILE", POOLING),
    "a dense layer": (
        (encoder_config(), {"modules.json": dense(), POOLING: MEAN}),
        "UNSUPPORTED_MODULE",
        "the module Dense",
    ),
    "code of its own": (
        (encoder_config(), {"modules.json": dense("modeling.Own"), POOLING: MEAN}),
        "UNSUPPORTED_MODULE",
        "modeling.Own",
    ),
    "another order": (
        (encoder_config(), {"modules.json": [NORMALIZED[0], NORMALIZED[2]]}),
        "UNSUPPORTED_MODULE",
        "Transformer, Normalize",
    ),
    "no modules": ((encoder_config(), {"modules.json": []}), "UNSUPPORTED_MODULE", "modules.json"),
    "modules that are none": ((encoder_config(), {"modules.json": [3]}), "CORRUPT_CONFIG", "modules.json"),
    "modules in an object": ((encoder_config(), {"modules.json": {}}), "CORRUPT_CONFIG", "modules.json"),
    "the model elsewhere": (
        (encoder_config(), {"modules.json": [POOLED[0] | {"path": "0_Transformer"}]}),
        "UNSUPPORTED_MODULE",
        "0_Transformer",
    ),
    "a way out": (
        (encoder_config(), {"modules.json": [POOLED[0], POOLED[1] | {"path": "../../etc"}], POOLING: MEAN}),
        "MISSING_FILE",
        "../../etc/config.json",
    ),
    "tokens normalised": (
        (
            encoder_config(),
            {
                "modules.json": NORMALIZED,
                POOLING: MEAN,
                "2_Normalize/config.json": {"module_input_name": "token_embeddings"},
            },
        ),
        "UNSUPPORTED_MODULE",
        "token_embeddings",
    ),
    "a length of nothing": (bare(sentence_bert_config__json={"max_seq_length": 0}), "CORRUPT_CONFIG", INPUT),
    "a length that is a word": (
        bare(sentence_bert_config__json={"max_seq_length": "long"}),
        "CORRUPT_CONFIG",
        "max_seq_length",
    ),
    "vectors that are cut": (settings(truncate_dim=8), "UNSUPPORTED_POOLING", "truncate_dim"),
    "another distance": (settings(similarity_fn_name="euclidean"), "UNSUPPORTED_SIMILARITY", "euclidean"),
    "a sparse encoder": (settings(model_type="SparseEncoder"), "UNSUPPORTED_MODULE", "SparseEncoder"),
    "prompts in a list": (settings(prompts=["q"]), "CORRUPT_CONFIG", "prompts"),
    "a prompt that is a number": (settings(prompts={"q": 1}), "CORRUPT_CONFIG", "'q'"),
    "a long prompt": (settings(prompts={"q": "x" * 8193}), "CORRUPT_CONFIG", "8192"),
    "a prompt without a name": (settings(prompts={"": "x"}), "CORRUPT_CONFIG", "name must have 1 to 64"),
    "many prompts": (settings(prompts={str(n): "x" for n in range(65)}), "CORRUPT_CONFIG", "65"),
    "long prompts": (settings(prompts={str(n): "é" * 8000 for n in range(3)}), "CORRUPT_CONFIG", "131072"),
    "a default that is none": (settings(default_prompt_name="q"), "CORRUPT_CONFIG", "default_prompt_name"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(tmp_path: Path, case: str):
    made, reason, named_in_it = BAD[case]
    config, files = made
    try:
        tensors = canonical_tensors(config)
    except TreadleError:
        # It says nothing that weights could be made by.
        tensors = canonical_tensors(encoder_config())
    folder = write_encoder(tmp_path / "m", config, tensors, files=files)
    store = Store.open(tmp_path / "store")
    with pytest.raises(TreadleError) as caught:
        import_source(store, LocalSource("folder", str(folder)))
    error = caught.value
    assert (error.reason, named_in_it in error.message) == (reason, True), error.message
    assert error.code == ("FAILED_PRECONDITION" if reason.startswith("UNSUPPORTED") else "INVALID_ARGUMENT")
    assert len(error.message) < 1000
    assert not store.digests()
    print(f"{case}: {error.message}")


@pytest.mark.parametrize(("said", "outputs"), [(["a", "b"], 3), (["a", "b", "c"], 2), (None, 4)])
@pytest.mark.parametrize("kind", [CLASSIFIER, TAGGER])
def test_labels_beside_another_head(tmp_path: Path, kind: str, said: list[str] | None, outputs: int):
    config, _ = headed(kind, said)
    other, _ = headed(kind, [str(number) for number in range(outputs)])
    folder = write_encoder(tmp_path / "m", config, canonical_tensors(other))
    with pytest.raises(TreadleError) as caught:
        imported(tmp_path / "store", folder)
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "CORRUPT_CONFIG")
    assert "config.json: id2label" in caught.value.message
    assert f"{outputs} outputs" in caught.value.message
    print(caught.value.message)


def test_a_decoder_generates_and_scores(tmp_path: Path):
    folder = write_model(tmp_path / "m")
    without = imported(tmp_path / "store", folder)
    # What a decoder has beside it of sentence-transformers says nothing here.
    (folder / "modules.json").write_text("[3]")
    assert imported(tmp_path / "other", folder).manifest.digests == without.manifest.digests
    assert without.manifest.task_facts == TaskFacts(tasks=("generate", "score"), max_input_tokens=128)
    assert not (without.canonical_folder / INPUT).exists()


def test_an_older_manifest_is_a_decoders(tmp_path: Path):
    published = imported(tmp_path / "store", write_model(tmp_path / "m"))
    raw = json.loads(published.manifest.to_json())
    assert raw["version"] == 3
    del raw["task_facts"]
    found = Manifest.from_json(json.dumps(raw | {"version": 2}), "here")
    assert found == published.manifest

"""Encoders of a hub: what lies in the repository's folders comes along, and what is refused does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_machine import HubMachine
from hub_models import REPOSITORY, SINGLE
from hub_server import HubServer
from small_encoder import MEAN, POOLED, SENTENCE_FILES, encoder_config, write_encoder
from small_folder import write_model

from treadle.errors import TreadleError
from treadle_registry.sources.hub_source import HubSource

SOURCE = HubSource(REPOSITORY)


def repository(folder: Path) -> dict[str, bytes]:
    """The folder's files by their names in it, and more than a model needs."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths} | {
        "onnx/model.onnx": b"onnx" * 2000,
        "openvino/config.json": b"{}",
        "1_Pooling/pytorch_model.bin": b"pickle",
        "2_Normalize/notes.json": b"{}",
        "eval/1_Pooling/config.json": b"{}",
        "train_script.py": b"raise AssertionError",
    }


def write(tmp_path: Path, files: dict[str, Any] | None = None, **config: Any) -> dict[str, bytes]:
    # More than is read of a header at once.
    raw = encoder_config(vocab_size=6000, **config)
    return repository(write_encoder(tmp_path / "model", raw, files=files))


def test_it_comes_whole_and_again_from_the_cache(hub: HubServer, machine: HubMachine, tmp_path: Path):
    files = write(tmp_path, SENTENCE_FILES)
    hub.add(REPOSITORY, files)
    checked = machine.run(SOURCE, validate_only=True).manifest
    assert hub.sent(SINGLE) < len(files[SINGLE])
    imported = machine.run(SOURCE).manifest
    assert checked.task_facts == imported.task_facts
    assert (imported.task_facts.pooling, imported.task_facts.normalize) == ("mean", True)
    assert imported.task_facts.prompts == {"query": "find: ", "passage": ""}
    kept = {file.path for file in imported.source_files}
    assert kept == {"config.json", "tokenizer.json", SINGLE, *SENTENCE_FILES}
    for name in kept:
        source = machine.store.folder(imported.digest) / "source" / name
        assert source.read_bytes() == files[name]
    machine.store.delete(imported.digest)
    before = len(hub.requests)
    again = machine.run(HubSource(REPOSITORY, local_files_only=True)).manifest
    assert len(hub.requests) == before > 5
    assert (again.digest, again.task_facts) == (imported.digest, imported.task_facts)
    assert {file.path for file in again.source_files} == kept
    print(f"{len(kept)} of {len(files)} files came, 0 requests for the second time")


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pooling": (
        {"modules.json": POOLED, "1_Pooling/config.json": {"pooling_mode": "max"}},
        {},
        "UNSUPPORTED_POOLING",
    ),
    "a dense layer": (
        {
            "modules.json": [*POOLED, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
            "1_Pooling/config.json": MEAN,
        },
        {},
        "UNSUPPORTED_MODULE",
    ),
    "no settings of its pooling": ({"modules.json": POOLED}, {}, "MISSING_FILE"),
    "labels": (
        {},
        {"architectures": ["BertForTokenClassification"], "id2label": {"0": "a", "1": "a"}},
        "CORRUPT_CONFIG",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_it_is_refused_before_its_weights_come(
    hub: HubServer, machine: HubMachine, tmp_path: Path, case: str
):
    beside, config, reason = BAD[case]
    hub.add(REPOSITORY, write(tmp_path, beside, **config))
    with pytest.raises(TreadleError) as caught:
        machine.run(SOURCE)
    assert caught.value.reason == reason
    assert caught.value.fields[0].field == "hub"
    assert hub.sent(SINGLE) == 0
    assert not machine.store.digests()
    print(f"{caught.value.message}; {hub.sent(SINGLE)} bytes of weights came")


def test_chat_templates_in_their_folder_come_too(hub: HubServer, machine: HubMachine, tmp_path: Path):
    folder = write_model(tmp_path / "model", template="{{ one }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ two }}")
    hub.add(REPOSITORY, repository(folder))
    imported = machine.run(SOURCE).manifest
    canonical = machine.store.folder(imported.digest) / "canonical"
    assert (canonical / "additional_chat_templates" / "rag.jinja").read_text() == "{{ two }}"
    assert json.loads((canonical / "config.json").read_text())["model_type"] == "llama"


def test_more_files_than_any_model_has(hub: HubServer, machine: HubMachine, tmp_path: Path):
    many = {f"additional_chat_templates/t{number}.jinja": b"x" for number in range(1100)}
    hub.add(REPOSITORY, write(tmp_path, SENTENCE_FILES) | many)
    with pytest.raises(TreadleError) as caught:
        machine.run(SOURCE)
    assert caught.value.reason == "TOO_MANY_FILES"
    assert hub.sent("config.json") == hub.sent(SINGLE) == 0
    print(caught.value.message)

"""Artifacts made of artifacts: what they record, made once, and the values that they have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from damage import flip
from safetensors.torch import load_file
from small_encoder import write_encoder
from small_folder import write_model

from treadle.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    TreadleError,
)
from treadle.models.config import parse_config
from treadle_registry.formats.canonical import facts_of_config
from treadle_registry.formats.safetensors_file import read_header
from treadle_registry.operations.deriving import derive
from treadle_registry.operations.importing import import_source
from treadle_registry.operations.progress import Progress, Stage
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.derivation import DERIVER, Derivation
from treadle_registry.store.store import Published, Store

QUANTISED = [Derivation("quantization", form) for form in ("int8", "int4", "mxfp4")]
FLOATS = [Derivation("dtype", dtype) for dtype in ("float32", "float16")]


def weights_of(published: Published) -> dict[str, torch.Tensor]:
    return load_file(published.canonical_folder / "model.safetensors")


def test_what_is_recorded(store: Store, parent: Published, merge: Derivation):
    seen = {parent.manifest.digest}
    for derivation in (*QUANTISED, *FLOATS, merge):
        told: list[Progress] = []
        derived = derive(store, parent.manifest.digest, derivation, told.append)
        manifest = store.get(derived.manifest.digest).manifest
        assert manifest == derived.manifest
        assert not derived.already_present
        assert manifest.digests is not None
        assert parent.manifest.digests is not None
        assert manifest.digests.compute != parent.manifest.digests.compute
        assert manifest.digests.tokenizer == parent.manifest.digests.tokenizer
        assert manifest.digests.presentation == parent.manifest.digests.presentation
        assert (manifest.parent_digest, manifest.converter) == (parent.manifest.digest, DERIVER)
        recorded = manifest.derivation
        assert recorded is not None
        assert recorded.kind == derivation.kind
        if derivation.kind == "adapter_merge":
            assert recorded.value.startswith("sha256:")
            assert recorded.folder == derivation.folder
        else:
            assert recorded == derivation
        assert manifest.facts.quantization == (derivation.value if derivation.kind == "quantization" else "")
        raw = json.loads((derived.canonical_folder / "config.json").read_text())
        assert manifest.facts.parameters == facts_of_config(raw, parse_config(raw)).parameters
        assert manifest.defaults == parent.manifest.defaults
        assert {file.path for file in manifest.files} == {file.path for file in parent.manifest.files}
        changed = {file.path for file in set(manifest.files) - set(parent.manifest.files)}
        assert changed - {"config.json"} == {"model.safetensors"}
        assert store.is_whole(derived)
        assert told[0].stage is Stage.CHECKING
        converting = [progress for progress in told if progress.stage is Stage.CONVERTING]
        assert converting[-1].done_bytes == converting[-1].total_bytes == 2 * parent.manifest.facts.parameters
        assert told[-1].stage is Stage.PUBLISHING
        seen.add(manifest.digest)
    assert len(seen) == 7
    print(f"{len(seen) - 1} artifacts of one")


def test_tensors_are_aligned_and_the_head_is_one_of_its_own(store: Store, parent: Published):
    aligned = 0
    for derivation in QUANTISED:
        derived = derive(store, parent.manifest.digest, derivation)
        for tensor in read_header(derived.canonical_folder / "model.safetensors").values():
            width = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2}.get(tensor.dtype, 1)
            assert tensor.offset % width == 0
            aligned += 1
        config = json.loads((derived.canonical_folder / "config.json").read_text())
        weights = weights_of(derived)
        assert config["tie_word_embeddings"] == (derivation.value == "mxfp4")
        assert ("lm_head.weight" in weights) == (derivation.value != "mxfp4")
        name = "model.embed_tokens.weight"
        assert torch.equal(weights[name], weights_of(parent)[name])
    print(f"{aligned} tensors are aligned")


def test_made_once(store: Store, parent: Published, merge: Derivation, monkeypatch: pytest.MonkeyPatch):
    derivations = [*QUANTISED, *FLOATS, merge]
    made = [derive(store, parent.manifest.digest, derivation) for derivation in derivations]
    # The same adapter under another name is the same adapter.
    moved = Path(merge.folder).rename(Path(merge.folder).with_name("moved"))
    derivations[-1] = Derivation("adapter_merge", "", str(moved))
    inodes = [[path.stat().st_ino for path in sorted(one.canonical_folder.iterdir())] for one in made]

    def never(*_: object) -> None:
        raise AssertionError("what was made is not made again")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", never)
        again = [derive(store, parent.manifest.digest, derivation) for derivation in derivations]
    assert all(one.already_present for one in again)
    assert [one.manifest for one in again] == [one.manifest for one in made]

    monkeypatch.setattr("treadle_registry.store.derivation.DERIVER", "treadle-derive/2")
    monkeypatch.setattr("treadle_registry.operations.deriving.DERIVER", "treadle-derive/2")
    derive(store, parent.manifest.digest, derivations[0])
    assert inodes == [[path.stat().st_ino for path in sorted(one.canonical_folder.iterdir())] for one in made]
    assert len(list((store.root / "tmp").iterdir())) == 0
    print(f"{len(again)} found again without work")


_DERIVE = """
import sys
from pathlib import Path
from treadle_registry.operations.deriving import derive
from treadle_registry.store.derivation import Derivation
from treadle_registry.store.store import Store
print("ready", flush=True)
sys.stdin.readline()
derived = derive(Store(Path(sys.argv[1])), sys.argv[2], Derivation("quantization", "int4"))
print(derived.manifest.digest, derived.already_present)
"""


def test_several_who_ask_at_once_have_it_made_once(store: Store, tmp_path: Path):
    folder = write_model(tmp_path / "larger", hidden_size=256, intermediate_size=512, vocab_size=4000)
    parent = import_source(store, LocalSource("folder", str(folder)))
    command = [sys.executable, "-c", _DERIVE, str(store.root), parent.manifest.digest]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    told = []
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            out, _ = process.communicate(timeout=60)
            told.append(out.split())
    finally:
        for process in processes:
            process.kill()
            process.wait()
    print(told)
    assert len({digest for digest, _ in told}) == 1
    assert sorted(present for _, present in told) == ["False", "True", "True", "True"]
    assert list((store.root / "tmp").iterdir()) == []


def test_a_damaged_one_is_made_anew(store: Store, parent: Published):
    first = derive(store, parent.manifest.digest, QUANTISED[0])
    flip(first.canonical_folder / "model.safetensors")
    assert not store.is_whole(first)
    again = derive(store, parent.manifest.digest, QUANTISED[0])
    assert again.manifest.digest == first.manifest.digest
    assert not again.already_present
    assert store.is_whole(again)


def test_chains(store: Store, parent: Published, merge: Derivation):
    """A merged model is quantised; what is quantised is the end."""
    merged = derive(store, parent.manifest.digest, merge)
    for derivation in QUANTISED:
        derived = derive(store, merged.manifest.digest, derivation)
        assert derived.manifest.parent_digest == merged.manifest.digest
        for again in (*QUANTISED, *FLOATS, merge):
            with pytest.raises(FailedPrecondition) as caught:
                derive(store, derived.manifest.digest, again)
            assert caught.value.reason == "QUANTIZED_PARENT"
            assert merged.manifest.digest in caught.value.message
    wide = derive(store, merged.manifest.digest, Derivation("dtype", "float32"))
    assert all(
        torch.equal(weight, weights_of(merged)[name].float()) for name, weight in weights_of(wide).items()
    )
    # The parent may go: what was made of it is whole in itself.
    store.delete(merged.manifest.digest)
    assert all(store.is_whole(store.get(digest)) for digest in store.digests())


def test_what_cannot_be_asked(store: Store, parent: Published, tmp_path: Path):
    reasons = {}
    for name, derivation in {
        "int3": Derivation("quantization", "int3"),
        "float8": Derivation("dtype", "float8"),
        "relative": Derivation("adapter_merge", "", "adapter"),
        "up": Derivation("adapter_merge", "", "/a/../b"),
    }.items():
        with pytest.raises(InvalidArgument) as caught:
            derivation.check()
        reasons[name] = caught.value.fields[0].field
    assert reasons == {
        "int3": "derivation.quantization",
        "float8": "derivation.dtype",
        "relative": "derivation.adapter_merge.folder",
        "up": "derivation.adapter_merge.folder",
    }
    for folder, code in ((tmp_path / "absent", "INVALID_ARGUMENT"), (tmp_path / "store", "INVALID_ARGUMENT")):
        with pytest.raises(TreadleError) as refused:
            derive(store, parent.manifest.digest, Derivation("adapter_merge", "", str(folder)))
        assert refused.value.code == code
    with pytest.raises(NotFound):
        derive(store, f"sha256:{'0' * 64}", QUANTISED[0])


def test_what_was_quantised_elsewhere_is_no_parent(store: Store, tmp_path: Path):
    """Imported as it is, it has no parent here: it is not its own bfloat16."""
    elsewhere = Store.open(tmp_path / "elsewhere")
    model = import_source(elsewhere, LocalSource("folder", str(write_model(tmp_path / "model"))))
    refused = 0
    for derivation in QUANTISED:
        quantised = derive(elsewhere, model.manifest.digest, derivation)
        here = import_source(store, LocalSource("folder", str(quantised.canonical_folder)))
        assert not here.manifest.parent_digest
        for asked in (*QUANTISED, *FLOATS, Derivation("dtype", "bfloat16")):
            with pytest.raises(FailedPrecondition, match="not quantised") as caught:
                derive(store, here.manifest.digest, asked)
            assert caught.value.reason == "QUANTIZED_PARENT"
            refused += 1
    print(f"{refused} derivations refused")
    assert refused == 18


def test_an_encoders_type_is_its_files(store: Store, tmp_path: Path):
    """Whoever an artifact came from may say another one of it."""
    folder = write_encoder(tmp_path / "encoder")
    encoder = import_source(store, LocalSource("folder", str(folder)))
    manifest = encoder.canonical_folder.parent / "manifest.json"
    text = manifest.read_text()
    assert text.count('"dtype": "F32"') == 1
    manifest.chmod(0o644)
    manifest.write_text(text.replace('"dtype": "F32"', '"dtype": "BF16"'))
    made = derive(store, encoder.manifest.digest, Derivation("dtype", "bfloat16"))
    assert {tensor.dtype for tensor in weights_of(made).values()} == {torch.bfloat16}
    same = derive(store, encoder.manifest.digest, Derivation("dtype", "float32"))
    assert same.manifest.digest == encoder.manifest.digest

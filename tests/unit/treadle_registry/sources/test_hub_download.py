"""Downloads: in parallel, resumed, hashed, and only what is needed."""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import pytest
from hub_models import REPOSITORY, SINGLE
from hub_server import File, HubServer
from huggingface_hub import hf_hub_download

from treadle.errors import DataLoss, ResourceExhausted, Unavailable
from treadle_registry.operations.progress import Progress, Stage, unheard
from treadle_registry.sources import hub_download
from treadle_registry.sources.hub import open_hub
from treadle_registry.sources.hub_client import HubClient
from treadle_registry.sources.hub_download import PARALLEL, HubDownload
from treadle_registry.sources.hub_source import HubSource

SOURCE = HubSource(REPOSITORY)
NEEDED = {
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", SINGLE),
}


def download_of(client: HubClient, report=unheard) -> HubDownload:
    """The downloads of one import."""
    return HubDownload(client, SOURCE, client.listing(SOURCE), report)


def incomplete(client: HubClient) -> list[Path]:
    """What is on its way."""
    return sorted(client.cache.glob("models--*/blobs/*.incomplete"))


@pytest.mark.parametrize("revision", ["", "main", "v1", "commit"])
def test_only_what_is_needed_comes(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes], revision: str
):
    opened = open_hub(HubSource(REPOSITORY, commit if revision == "commit" else revision), client)
    assert opened.origin == f"hub:{REPOSITORY}@{commit}"
    assert opened.model.files.keys() == NEEDED
    for name, path in opened.model.files.items():
        assert path.read_bytes() == files[name], name
    asked = {request.path.rsplit("/", 1)[-1] for request in hub.requests if "/resolve/" in request.path}
    assert asked == NEEDED
    assert sum(hub.sent(name) for name in NEEDED) == sum(len(files[name]) for name in NEEDED)
    print(f"{len(asked)} of {len(files)} files, {sum(hub.sent(name) for name in NEEDED)} bytes")


def test_the_cache_is_the_clients_own(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]
):
    open_hub(SOURCE, client)
    before = len(hub.requests)
    for name in NEEDED:
        found = hf_hub_download(
            REPOSITORY, name, cache_dir=client.cache, revision="main", local_files_only=True
        )
        assert Path(found).read_bytes() == files[name]
        assert Path(found).is_symlink()
    assert len(hub.requests) == before
    print(f"the client finds {len(NEEDED)} files, 0 requests")


def test_what_the_client_has_brought_is_not_fetched_again(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]
):
    for name in NEEDED:
        hf_hub_download(REPOSITORY, name, cache_dir=client.cache, endpoint=hub.url)
    before = len(hub.requests)
    progress: list[Progress] = []
    opened = open_hub(SOURCE, client, progress.append)
    assert opened.model.files[SINGLE].read_bytes() == files[SINGLE]
    assert len(hub.requests) == before + 1, hub.requests[before:]
    assert not progress
    print("1 request: the list of files")


def test_progress_counts_bytes_and_files(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]
):
    seen: list[Progress] = []
    open_hub(SOURCE, client, seen.append)
    assert {progress.stage for progress in seen} == {Stage.DOWNLOADING}
    assert all(a.done_bytes <= b.done_bytes for a, b in itertools.pairwise(seen))
    total = sum(len(files[name]) for name in NEEDED)
    assert seen[-1] == Progress(Stage.DOWNLOADING, total, total, len(NEEDED), len(NEEDED))
    assert len(seen) > 10
    print(f"{len(seen)} reports, {total} bytes")


def test_no_more_than_a_few_at_once_and_more_than_one(hub: HubServer, client: HubClient):
    hub.add(REPOSITORY, {f"{number}.safetensors": bytes([number]) * 5000 for number in range(12)})
    gate, running, most = threading.Event(), [0], [0]
    lock = threading.Lock()
    original = client.bytes_of

    class Counted:
        """A stream that waits until as many run as may."""

        def __init__(self, *args: object) -> None:
            self.stream = original(*args)  # type: ignore[arg-type]

        def __enter__(self) -> object:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
                if running[0] == PARALLEL:
                    gate.set()
            assert gate.wait(20)
            return self.stream.__enter__()

        def __exit__(self, *error: object) -> object:
            with lock:
                running[0] -= 1
            return self.stream.__exit__(*error)  # type: ignore[arg-type]

    client.bytes_of = Counted  # type: ignore[assignment,method-assign]
    listing = client.listing(SOURCE)
    found = HubDownload(client, SOURCE, listing, unheard).fetch(list(listing.files))
    assert len(found) == 12
    assert most[0] == PARALLEL
    print(f"{most[0]} at once, {len(found)} files")


def test_a_dropped_connection_goes_on_where_it_was(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes], rng: random.Random
):
    size = len(files[SINGLE])
    drops = [hub.fail("drop", SINGLE, at=at) for at in (size // 2, rng.randrange(size // 2 + 1, size))]
    open_hub(SOURCE, client)
    assert [fault.happened for fault in drops] == [1, 1]
    ranges = [request.range for request in hub.of_file(SINGLE) if request.host == "cdn"]
    assert ranges == ["", *(f"bytes={fault.at}-" for fault in drops)]
    assert hub.sent(SINGLE) == size
    assert not incomplete(client)
    print(f"3 requests, {hub.sent(SINGLE)} of {size} bytes")


def test_one_that_keeps_failing_is_told_and_the_next_import_fetches_the_rest_alone(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]
):
    size = len(files[SINGLE])
    fault = hub.fail("drop", SINGLE, at=size // 2, times=1000)
    with pytest.raises(Unavailable) as raised:
        open_hub(SOURCE, client)
    assert raised.value.reason == "HUB_UNREACHABLE"
    assert f"{size // 2} of {size} bytes have come and are kept" in raised.value.message
    assert fault.happened == hub_download._TRIES
    (partial,) = incomplete(client)
    assert partial.read_bytes() == files[SINGLE][: size // 2]
    assert not (client.cache / "models--river--sea" / "snapshots" / commit / SINGLE).exists()
    hub.faults.clear()
    before = hub.sent(SINGLE)
    opened = open_hub(SOURCE, client)
    assert opened.model.files[SINGLE].read_bytes() == files[SINGLE]
    assert hub.sent(SINGLE) - before == size - size // 2
    print(f"{fault.happened} attempts; then {hub.sent(SINGLE) - before} of {size} bytes")


@pytest.mark.parametrize(
    ("kind", "status"), [("hang_up", 0), ("status", 500), ("status", 503), ("status", 408)]
)
def test_a_hub_that_stumbles_is_asked_again(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes], kind: str, status: int
):
    faults = [hub.fail(kind, where, status=status) for where in ("/api/models", "config.json", SINGLE)]
    opened = open_hub(SOURCE, client)
    assert opened.model.files[SINGLE].read_bytes() == files[SINGLE]
    assert [fault.happened for fault in faults] == [1, 1, 1]
    print(f"{len(faults)} faults, {len(hub.requests)} requests")


def test_a_stall_ends_and_the_rest_comes(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]
):
    size = len(files[SINGLE])
    fault = hub.fail("stall", SINGLE, at=size // 3)
    open_hub(SOURCE, client)
    assert fault.happened == 1
    assert hub.sent(SINGLE) == size
    print(f"{hub.sent(SINGLE)} bytes in all")


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_wrong_bytes_are_thrown_away_and_said(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes], name: str, rng: random.Random
):
    fault = hub.fail("corrupt", name, at=rng.randrange(len(files[name])))
    with pytest.raises(DataLoss) as raised:
        open_hub(SOURCE, client)
    assert raised.value.reason == "CHECKSUM_MISMATCH"
    assert name in raised.value.message
    assert fault.happened == 1
    etag = File(files[name]).etag
    assert not [path for path in client.cache.glob("models--*/blobs/*") if path.name.startswith(etag)]
    assert not (client.cache / "models--river--sea" / "snapshots" / commit / name).exists()
    opened = open_hub(SOURCE, client)
    assert opened.model.files[name].read_bytes() == files[name]
    assert hub.sent(name) == 2 * len(files[name])
    print(f"{name}: {len(hub.of_file(name))} requests")


def test_a_damaged_part_is_found_before_it_counts(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]
):
    size = len(files[SINGLE])
    hub.fail("drop", SINGLE, at=size // 2, times=1000)
    with pytest.raises(Unavailable):
        open_hub(SOURCE, client)
    hub.faults.clear()
    (partial,) = incomplete(client)
    with partial.open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(DataLoss, match="thrown away"):
        open_hub(SOURCE, client)
    assert not incomplete(client)
    assert open_hub(SOURCE, client).model.files[SINGLE].read_bytes() == files[SINGLE]
    print(f"{len(hub.of_file(SINGLE))} requests")


def test_a_part_that_is_too_long_begins_again(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]
):
    download = download_of(client)
    download.cache.make_folders(commit)
    partial = download.cache.partial(client.listing(SOURCE).files[SINGLE])
    partial.write_bytes(bytes(len(files[SINGLE]) + 1))
    assert download.fetch([SINGLE])[SINGLE].read_bytes() == files[SINGLE]
    assert hub.sent(SINGLE) == len(files[SINGLE])


def test_a_rate_limit_is_kept_to_when_it_is_short(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]
):
    fault = hub.fail("status", SINGLE, status=429, headers={"Retry-After": "0"})
    assert open_hub(SOURCE, client).model.files[SINGLE].read_bytes() == files[SINGLE]
    assert fault.happened == 1


@pytest.mark.parametrize("where", ["/api/models", SINGLE])
def test_a_rate_limit_that_is_long_is_told(hub: HubServer, client: HubClient, commit: str, where: str):
    fault = hub.fail("status", where, times=1000, status=429, headers={"Retry-After": "120"})
    with pytest.raises(ResourceExhausted) as raised:
        open_hub(SOURCE, client)
    assert (raised.value.reason, raised.value.retry_after_s) == ("HUB_RATE_LIMITED", 120)
    assert fault.happened == 1
    print(f"{fault.happened} request was refused")


def test_one_failure_stops_the_others(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]
):
    shards = {f"{number}.safetensors": bytes([number]) * 200_000 for number in range(3)}
    hub.add(REPOSITORY, files | shards)
    hub.fail("stall", "0.safetensors", at=1000, times=1000)
    hub.fail("corrupt", "1.safetensors", at=1000)
    with pytest.raises(DataLoss, match=r"1\.safetensors"):
        download_of(client).fetch(list(shards))
    stalled = File(shards["0.safetensors"]).sha256
    (partial,) = [path for path in incomplete(client) if path.name.startswith(stalled)]
    assert partial.stat().st_size <= 1000
    print(f"the stalled one keeps {partial.stat().st_size} bytes")


def test_a_cached_file_of_another_size_is_fetched_again(
    hub: HubServer, client: HubClient, commit: str, files: dict[str, bytes]
):
    opened = open_hub(SOURCE, client)
    for name in (SINGLE, "config.json"):
        blob = opened.model.files[name].resolve()
        blob.write_bytes(files[name][:-1])
    before = hub.sent(SINGLE)
    assert open_hub(SOURCE, client).model.files[SINGLE].read_bytes() == files[SINGLE]
    assert hub.sent(SINGLE) - before == len(files[SINGLE])


def test_the_same_content_in_two_files_comes_once(hub: HubServer, client: HubClient):
    hub.add(REPOSITORY, {"a.safetensors": bytes(50_000), "b.safetensors": bytes(50_000)})
    found = download_of(client).fetch(["a.safetensors", "b.safetensors"])
    assert found["a.safetensors"].samefile(found["b.safetensors"])
    assert hub.sent("a.safetensors") == 50_000
    print("50000 bytes for two names")


def test_a_token_stays_with_the_hub(
    hub: HubServer, tmp_path: Path, client: HubClient, files: dict[str, bytes]
):
    hub.add(REPOSITORY, files, gated=True)
    hub.tokens.add("hf_good")
    hub.repositories[REPOSITORY].readers.add("hf_good")
    opened = open_hub(SOURCE, HubClient("hf_good", cache=client.cache))
    assert opened.model.files[SINGLE].read_bytes() == files[SINGLE]
    tokens = {
        host: {request.token for request in hub.requests if request.host == host} for host in ("hub", "cdn")
    }
    assert tokens == {"hub": {"hf_good"}, "cdn": {""}}
    print(f"{len(hub.requests)} requests")

"""Files that changed in the store after their import are DATA_LOSS for who loads them, until put right."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from damage import flip
from google.rpc import status_pb2
from raw_calls import Asker, importing
from running_suite import Suite
from service_process import ServiceProcess
from small_folder import write_model
from waiting import until

from treadle.api.inference.v1 import inference_pb2
from treadle.api.tokenizer.v1 import tokenizer_pb2
from treadle.api.worker.v1 import queue_pb2, worker_pb2, worker_pb2_grpc
from treadle.client import ModelSource, RegistryClient
from treadle.errors import TreadleError
from treadle.local.ports import free_ports
from treadle.rpc import from_status

AGAIN = "import the model again, which replaces it"


def own_model(folder: Path, name: str, seed: int) -> Path:
    """A model that shares no file that is flipped with any other, and whose texts nobody has loaded yet."""
    made = write_model(folder, seed=seed, template=f"{{{{ messages }}}} {name}")
    tokenizer = json.loads((made / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[name] = len(vocabulary)
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    (made / "tokenizer_config.json").write_text(json.dumps({"name": name}))
    return made


def damaged(error: TreadleError, file: str, artifact: str) -> None:
    """It says which file of which artifact, and the way out."""
    print(f"{error.code} {error.reason}: {error.message!r}")
    assert (error.code, error.reason) == ("DATA_LOSS", "DAMAGED_FILE")
    assert f"the file {file} of {artifact} is damaged" in error.message
    assert AGAIN in error.message
    assert (error.metadata["file"], error.metadata["artifact"]) == (file, artifact)
    assert error.metadata["expected_digest"] != error.metadata["found_digest"]
    assert error.retry_after_s is None


async def canonical(suite: Suite, model: str) -> Path:
    async with RegistryClient(suite.addresses["registry"]) as registry:
        return Path((await registry.resolve(model)).location)


async def import_again(suite: Suite, folder: Path) -> None:
    """The way out: it is not taken for what is there already."""
    last = None
    async with RegistryClient(suite.addresses["registry"]) as registry:
        async for last in registry.import_model(ModelSource("folder", str(folder))):  # noqa: B007
            pass
    assert last is not None
    assert not last.already_present


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
async def test_the_tokenizer_tells(asker: Asker, tmp_path: Path, file: str):
    name = "flipped-" + file.replace("_", "-")
    folder, processes = own_model(tmp_path / "model", name, 1), asker.processes()
    encode = tokenizer_pb2.EncodeRequest(model=name, inputs=[{"text": "the river runs"}]).SerializeToString()
    async with importing(asker.suite, {name: folder}) as digests:
        flip(await canonical(asker.suite, name) / file)
        for _ in range(2):
            with pytest.raises(TreadleError) as caught:
                await asker.ask("tokenizer", "Encode", encode)
            damaged(caught.value, file, digests[name])
        await asker.still_serves()
        await import_again(asker.suite, folder)
        answer = tokenizer_pb2.EncodeResponse.FromString(await asker.ask("tokenizer", "Encode", encode))
        assert len(answer.encodings[0].ids) == 3
    assert asker.processes() == processes


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[Callable[[ServiceProcess], ServiceProcess]]:
    """Kills the services that it is given, when the test ends."""
    given: list[ServiceProcess] = []

    def take(service: ServiceProcess) -> ServiceProcess:
        given.append(service)
        return service

    yield take
    for service in given:
        if service.alive:
            service.kill()


def another_worker(asker: Asker, model: str, folder: Path) -> ServiceProcess:
    """A worker that serves one model in the same suite."""
    (pid,) = (pid for pid, line in asker.processes().items() if line.endswith("-m treadle_worker"))
    environment = {
        name: value for name, value in psutil.Process(pid).environ().items() if name.startswith("TREADLE_")
    }
    ports = free_ports(2)
    own = {"TREADLE_WORKER_MODELS": model, "TREADLE_ENGINE_NUM_THREADS": "1"}
    own["TREADLE_ENGINE_KV_CACHE_BYTES"] = str(16 << 20)
    address, metrics_address = (f"127.0.0.1:{port}" for port in ports)
    return ServiceProcess("worker-flipped", "worker", address, metrics_address, environment | own, folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
async def test_the_worker_and_the_gateway_tell(
    asker: Asker, tmp_path: Path, stop: Callable[[ServiceProcess], ServiceProcess], file: str
):
    """The worker lives, says why it does not serve the model, and serves it once that is put right."""
    name, processes = "flipped-" + file.replace(".", "-"), asker.processes()
    folder = own_model(tmp_path / "model", name, seed=len(file))
    settings = json.loads((folder / "config.json").read_text()) | {"name": name}
    (folder / "config.json").write_text(json.dumps(settings))
    stopping, sampling = {"max_new_tokens": 3}, {"temperature": 0.0}
    generation = {"model": name, "text": "the river runs", "stopping": stopping, "sampling": sampling}
    generate = inference_pb2.GenerateRequest(generation=generation).SerializeToString()

    async def listed() -> inference_pb2.ServedModel:
        data = await asker.ask("gateway", "ListModels", b"")
        found = {one.model: one for one in inference_pb2.ListModelsResponse.FromString(data).models}
        return found.get(name, inference_pb2.ServedModel())

    async with importing(asker.suite, {name: folder}) as digests:
        flip(await canonical(asker.suite, name) / file)
        worker = stop(another_worker(asker, name, tmp_path))
        worker.start()
        took = await until(lambda: _has_error(listed), "ListModels says why the model is not served", 90)
        line = await listed()
        assert (line.artifact_digest, line.ready_workers) == (digests[name], 0)
        damaged(from_status(line.error), file, digests[name])
        for ask in (asker.ask("gateway", "Generate", generate), asker.read("GenerateStream", generate)):
            with pytest.raises(TreadleError) as caught:
                await ask
            damaged(caught.value, file, digests[name])
        damaged(from_status(await _worker_error(worker)), file, digests[name])
        assert worker.alive
        await asker.still_serves()
        await import_again(asker.suite, folder)
        again = await until(lambda: _is_ready(listed), "the model is served", 90)
        answer = inference_pb2.GenerateResponse.FromString(await asker.ask("gateway", "Generate", generate))
        assert answer.usage.output_tokens == 3
        print(
            f"told after {took:.1f} s, put right and served after {again:.1f} s more, by one worker process"
        )
        worker.kill()
    assert asker.processes() == processes


Listed = Callable[[], Awaitable[inference_pb2.ServedModel]]


async def _has_error(listed: Listed) -> bool:
    return (await listed()).HasField("error")


async def _is_ready(listed: Listed) -> bool:
    return (await listed()).ready_workers == 1


async def _worker_error(worker: ServiceProcess) -> status_pb2.Status:
    """What the worker's own status says of its one model."""
    async with grpc.aio.insecure_channel(worker.address) as channel:
        answer = await worker_pb2_grpc.WorkerServiceStub(channel).GetWorkerStatus(
            worker_pb2.GetWorkerStatusRequest(), timeout=10
        )
    (status,) = answer.profiles
    assert answer.state == status.profile.state == queue_pb2.WORKER_STATE_FAILED
    return status.profile.error


async def test_the_registry_tells_of_a_damaged_manifest(asker: Asker, tmp_path: Path):
    name = "flipped-manifest"
    folder, processes = own_model(tmp_path / "model", name, 7), asker.processes()
    async with (
        importing(asker.suite, {name: folder}),
        RegistryClient(asker.suite.addresses["registry"]) as registry,
    ):
        manifest = (await canonical(asker.suite, name)).parent / "manifest.json"
        whole = len(await registry.artifacts())
        manifest.write_text(manifest.read_text()[:-30])

        errors: list[TreadleError] = []

        async def is_told() -> bool:
            try:
                await registry.resolve(name)
            except TreadleError as error:
                errors.append(error)
            return bool(errors)

        # What was read a moment ago is not looked at again.
        await until(is_told, "the damage is found", timeout_s=10)
        (error,) = errors
        print(f"{error.code} {error.reason}: {error.message!r}")
        assert (error.code, error.reason) == ("DATA_LOSS", "CORRUPT_MANIFEST")
        assert "import the model again" in error.message
        assert len(await registry.artifacts()) == whole - 1
        await asker.still_serves()
        await import_again(asker.suite, folder)
        assert (await registry.resolve(name)).location == str(manifest.parent / "canonical")
    assert asker.processes() == processes

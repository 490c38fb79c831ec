"""Every port described by itself: a client that knows the address alone lists, builds and calls."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from grpc_status import rpc_status
from reflected_port import ReflectedPort, reflected
from running_suite import Suite

from treadle.api.inference.v1 import inference_pb2
from treadle.api.registry.v1 import registry_pb2
from treadle.api.tokenizer.v1 import tokenizer_pb2
from treadle.api.training.v1 import training_pb2
from treadle.api.worker.v1 import worker_pb2

INFERENCE = "treadle.api.inference.v1.InferenceService"
REGISTRY = "treadle.api.registry.v1.RegistryService"
TOKENIZER = "treadle.api.tokenizer.v1.TokenizerService"
TRAINING = "treadle.api.training.v1.TrainingService"
WORKER = "treadle.api.worker.v1.WorkerService"
HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"
OPERATIONS = "google.longrunning.Operations"

CONTRACTS = {
    "gateway": (inference_pb2, [INFERENCE]),
    "registry": (registry_pb2, [REGISTRY, OPERATIONS]),
    "tokenizer": (tokenizer_pb2, [TOKENIZER]),
    "trainer": (training_pb2, [TRAINING]),
    "worker": (worker_pb2, [WORKER]),
}


@pytest.fixture
def port(suite: Suite, request) -> Iterator[ReflectedPort]:
    with reflected(suite.addresses[request.param]) as port:
        yield port


on = pytest.mark.parametrize


@on(("port", "service"), [(name, name) for name in CONTRACTS], indirect=["port"])
def test_every_port_lists_its_services_and_is_healthy(port: ReflectedPort, service: str):
    own = CONTRACTS[service][1]
    assert port.services == sorted([*own, HEALTH, REFLECTION])
    for name in ("", "liveness", own[0]):
        status = port.call(f"{HEALTH}/Check", service=name).status
        serving = port.message("grpc.health.v1.HealthCheckResponse").ServingStatus.Name(status)
        assert serving == "SERVING", name


@on(("port", "service"), [(name, name) for name in CONTRACTS], indirect=["port"])
def test_a_port_describes_the_committed_contract_with_all_that_it_imports(port: ReflectedPort, service: str):
    module, names = CONTRACTS[service]
    files = {name: file for each in names for name, file in port.files(each).items()}
    committed = module.DESCRIPTOR.pool
    own = {name: file for name, file in files.items() if name.startswith("treadle/")}
    assert own
    for name, file in own.items():
        assert file.serialized_pb == committed.FindFileByName(name).serialized_pb, name
    methods = [method for name in names for method in port.service(name).methods]
    assert methods
    for method in methods:
        for described in (method.input_type, method.output_type):
            assert port.message(described.full_name).DESCRIPTOR is described
            assert described is not committed.FindMessageTypeByName(described.full_name)
    print(f"{service}: {len(methods)} methods, {len(files)} files: {sorted(files)}")


@on(
    ("port", "wanted"),
    [
        (
            "gateway",
            {"google/rpc/status.proto", "google/protobuf/duration.proto", "google/protobuf/any.proto"},
        ),
        ("registry", {"google/longrunning/operations.proto", "google/rpc/status.proto"}),
        ("trainer", {"google/rpc/status.proto", "google/protobuf/timestamp.proto"}),
    ],
    indirect=["port"],
)
def test_googles_files_come_under_their_own_names(port: ReflectedPort, wanted: set[str]):
    files = {name for service in port.services for name in port.files(service)}
    assert wanted <= files


@on("port", ["gateway"], indirect=True)
def test_generate(port: ReflectedPort):
    asked = {
        "model": "smollm2",
        "text": "The capital of France is",
        "sampling": {"temperature": 0.0},
        "stopping": {"max_new_tokens": 6},
    }
    answer = port.call(f"{INFERENCE}/Generate", generation=asked)
    assert answer.choices[0].text.startswith(" Paris")
    assert not isinstance(answer, inference_pb2.GenerateResponse)
    chunks = [response.chunk for response in port.stream(f"{INFERENCE}/GenerateStream", generation=asked)]
    assert [chunk.WhichOneof("chunk") for chunk in chunks[:: len(chunks) - 1]] == ["started", "finished"]
    assert "".join(chunk.tokens.text for chunk in chunks) == answer.choices[0].text
    cursor, request_id = chunks[1].cursor, chunks[0].started.request_id
    rest = port.stream(f"{INFERENCE}/Attach", request_id=request_id, cursor=cursor)
    assert [response.chunk for response in rest] == chunks[2:]


@on("port", ["gateway"], indirect=True)
def test_an_error_has_its_details(port: ReflectedPort):
    with pytest.raises(grpc.RpcError) as caught:
        port.call(f"{INFERENCE}/Generate", generation={"model": "smollm2", "text": ""})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    names = [detail.type_url for detail in rpc_status.from_call(caught.value).details]
    assert "type.googleapis.com/google.rpc.BadRequest" in names


@on("port", ["tokenizer"], indirect=True)
def test_encode(port: ReflectedPort):
    encoded = port.call(f"{TOKENIZER}/Encode", model="smollm2", inputs=[{"text": "A loom."}])
    ids = list(encoded.encodings[0].ids)
    assert ids
    decoded = port.call(f"{TOKENIZER}/Decode", model="smollm2", inputs=[{"ids": ids}])
    assert list(decoded.texts) == ["A loom."]


@on("port", ["registry"], indirect=True)
def test_resolve_model_and_operations(port: ReflectedPort):
    artifact = port.call(f"{REGISTRY}/ResolveModel", model="smollm2").artifact
    assert artifact.digest.startswith("sha256:")
    operations = port.call(f"{OPERATIONS}/ListOperations").operations
    assert operations
    assert all(operation.done for operation in operations)
    # The suite's own import, and whoever else's came since.
    imports = [each for each in operations if artifact.digest.encode() in each.response.value]
    assert imports
    # What stands in an Any is found by its type's name in the same descriptors.
    for operation in imports:
        for packed in (operation.metadata, operation.response):
            message = port.message(packed.TypeName())()
            assert packed.Unpack(message)
            assert artifact.digest in str(message) or packed is operation.metadata


@on("port", ["worker"], indirect=True)
def test_worker_status(port: ReflectedPort):
    (profile,) = port.call(f"{WORKER}/GetWorkerStatus").profiles
    assert profile.profile.model_name == "smollm2"
    assert profile.engine.num_free_blocks > 0


@on("port", ["trainer"], indirect=True)
def test_the_trainer_says_that_it_has_no_code_yet(port: ReflectedPort):
    with pytest.raises(grpc.RpcError) as caught:
        port.call(f"{TRAINING}/ListJobs")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

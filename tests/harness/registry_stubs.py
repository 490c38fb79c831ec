"""One registry as a test asks it: stubs, imports waited for, tiny folders to import."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
from google.longrunning import operations_pb2_grpc, operations_proto_pb2
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from safetensors.numpy import save_file

from treadle.api.registry.v1 import registry_pb2, registry_pb2_grpc
from treadle.models.config import parse_config
from treadle.models.llama import expected_tensors
from treadle.rpc import from_rpc_error, from_status, open_channel
from treadle_registry.config import RegistryConfig
from treadle_registry.serving import serving

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Message)
_TIMEOUT_S = 60


@dataclass
class RegistryStubs:
    """Stubs of one registry."""

    registry: Any
    operations: Any
    store: Path
    address: str = ""

    @property
    def port(self) -> int:
        """The registry's."""
        return int(self.address.rpartition(":")[2])

    async def import_model(self, **fields: Any) -> Any:
        return await answer(
            self.registry.ImportModel(registry_pb2.ImportModelRequest(**fields), timeout=_TIMEOUT_S)
        )

    async def finished(self, operation: Any) -> Any:
        """Waits for an operation's end."""
        wait = operations_proto_pb2.WaitOperationRequest(
            name=operation.name, timeout=duration_pb2.Duration(seconds=_TIMEOUT_S)
        )
        return await answer(self.operations.WaitOperation(wait, timeout=_TIMEOUT_S + 5))

    async def imported(self, **fields: Any) -> Any:
        """Imports to the end; gives the response, raises the operation's error."""
        return await self.response(await self.import_model(**fields), registry_pb2.ImportModelResponse())

    async def response(self, operation: Any, response: _M) -> _M:
        """An operation's response, of the type that is given; raises its error."""
        operation = await self.finished(operation)
        assert operation.done
        if operation.HasField("error"):
            raise from_status(operation.error)
        assert operation.response.Unpack(response)
        return response

    async def call(self, method: str, **fields: Any) -> Any:
        """One RPC of the registry by its name."""
        service = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]
        request = GetMessageClass(service.methods_by_name[method].input_type)(**fields)
        return await answer(getattr(self.registry, method)(request, timeout=_TIMEOUT_S))


async def answer(call: Awaitable[_T]) -> _T:
    """The response of a call; its error as the suite's own."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


@contextlib.asynccontextmanager
async def open_registry(store: Path, **settings: Any) -> AsyncIterator[RegistryStubs]:
    config = RegistryConfig(**{"address": "127.0.0.1:0", "store": store} | settings)
    async with serving(config) as server:
        address = f"127.0.0.1:{server.port}"
        async with open_channel(address) as channel:
            yield stubs_of(channel, store, address)


def stubs_of(channel: grpc.aio.Channel, store: Path, address: str) -> RegistryStubs:
    """Stubs over a channel that the caller closes."""
    return RegistryStubs(
        registry_pb2_grpc.RegistryServiceStub(channel),
        operations_pb2_grpc.OperationsStub(channel),
        store,
        address,
    )


def sizes(folder: str) -> dict[str, int]:
    """The files of a folder with their sizes."""
    return {path.name: path.stat().st_size for path in Path(folder).glob("*")}


def write_folder(folder: Path, seed: int = 0) -> Path:
    """A tiny Hugging Face folder."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    random = np.random.default_rng(seed)
    shapes = expected_tensors(parse_config(config))
    save_file(
        {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return folder


def half_done(store: Path) -> list[Path]:
    """What an import that ended has left."""
    return [
        path
        for path in store.rglob("*")
        if path.is_file() and ("tmp" in path.parts[len(store.parts) :] or "blobs" in path.parts)
    ]

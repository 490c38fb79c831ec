"""A client that knows an address and nothing else: the port's own descriptors are all its contract."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

_CALL_S = 120.0


class ReflectedPort:
    """Calls by full names; messages are made of dictionaries, in classes that only this port's pool has."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = DescriptorPool(self._database)

    @property
    def services(self) -> list[str]:
        """Full names, as the port lists them."""
        return sorted(self._database.get_services())

    def service(self, name: str) -> ServiceDescriptor:
        """What the port says of a service."""
        return self._pool.FindServiceByName(name)

    def files(self, service: str) -> dict[str, FileDescriptor]:
        """The service's file and all that it imports, by name."""
        found: dict[str, FileDescriptor] = {}
        left = [self.service(service).file]
        while left:
            file = left.pop()
            if file.name not in found:
                found[file.name] = file
                left += file.dependencies
        return found

    def message(self, name: str) -> Any:
        """The class of a message."""
        return GetMessageClass(self._pool.FindMessageTypeByName(name))

    def call(self, method: str, **fields: object) -> Any:
        """One unary call of "package.Service/Method"."""
        described, request, response = self._method(method)
        invoke = self._channel.unary_unary(
            f"/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        assert not described.server_streaming
        return invoke(request(**fields), timeout=_CALL_S)

    def stream(self, method: str, **fields: object) -> Iterator[Any]:
        """One call that answers with a stream."""
        described, request, response = self._method(method)
        invoke = self._channel.unary_stream(
            f"/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        assert described.server_streaming
        yield from invoke(request(**fields), timeout=_CALL_S)

    def _method(self, method: str) -> tuple[MethodDescriptor, Any, Any]:
        service, _, name = method.partition("/")
        described = self.service(service).methods_by_name[name]
        return described, GetMessageClass(described.input_type), GetMessageClass(described.output_type)


@contextlib.contextmanager
def reflected(address: str) -> Iterator[ReflectedPort]:
    """A port, for a while."""
    with grpc.insecure_channel(address) as channel:
        yield ReflectedPort(channel)

"""Client channels with the suite's keepalive and retry rules."""

from __future__ import annotations

import json

import grpc

from treadle.rpc.outgoing_metadata import sends
from treadle.security import Credentials
from treadle.telemetry.tracing import trace_headers

MAX_MESSAGE_BYTES = 16 << 20
"""The largest message either side takes."""

_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # The default back-off of up to two minutes would outlast every restart of a service.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # This is how long one try to connect may take, its handshake included.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

# Reads that may be sent again without asking: nothing that starts work.
_IDEMPOTENT = {
    "treadle.api.registry.v1.RegistryService": [
        "ResolveModel",
        "ListArtifacts",
        "ListAliases",
        "GetAliasHistory",
    ],
    "treadle.api.tokenizer.v1.TokenizerService": ["Encode", "Decode", "CountTokens", "RenderChat"],
    "treadle.api.inference.v1.InferenceService": ["ListModels"],
}


def _service_config() -> str:
    return json.dumps(
        {
            "methodConfig": [
                {
                    "name": [{"service": service, "method": method} for method in methods],
                    "retryPolicy": {
                        "maxAttempts": 4,
                        "initialBackoff": "0.1s",
                        "maxBackoff": "1s",
                        "backoffMultiplier": 2,
                        "retryableStatusCodes": ["UNAVAILABLE"],
                    },
                }
                for service, methods in _IDEMPOTENT.items()
            ],
            "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
        }
    )


def open_channel(
    address: str, credentials: Credentials | None = None, *, traced: bool = False
) -> grpc.aio.Channel:
    """A channel to "host:port" (or any target that gRPC resolves): one a target and process is enough.

    With `traced` every call takes the current trace along.
    """
    shown = credentials or Credentials()
    options = [*_OPTIONS, ("grpc.service_config", _service_config())]
    key = [("authorization", f"Bearer {shown.api_key}")] if shown.api_key else []
    # An interceptor costs each call some microseconds, also where it has nothing to add.
    interceptors = sends(lambda: [*key, *trace_headers()]) if key or traced else None
    if not shown.tls:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    tls = grpc.ssl_channel_credentials(shown.ca, shown.private_key, shown.certificate)
    return grpc.aio.secure_channel(address, tls, options=options, interceptors=interceptors)

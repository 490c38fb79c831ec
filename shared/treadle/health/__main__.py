"""Looks at one service's health and exits 0 or 1.

It runs beside the service every few seconds for as long as the container lives, so it imports gRPC and no
more; settings and TLS come in only where TLS is configured.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treadle.health.config import tls_is_configured

_Status = health_pb2.HealthCheckResponse.ServingStatus


def look(address: str, service: str, timeout_s: float) -> str:
    """The status's name ("SERVING", ...) that `grpc.health.v1` at "host:port" gives for `service`.

    Raises grpc.RpcError where nobody answers, and TreadleError for TLS settings that cannot be used.
    """
    request = health_pb2.HealthCheckRequest(service=service)
    if tls_is_configured():
        response = asyncio.run(_secured(address, request, timeout_s))
    else:
        with grpc.insecure_channel(address) as channel:
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
    return str(_Status.Name(response.status))


async def _secured(
    address: str, request: health_pb2.HealthCheckRequest, timeout_s: float
) -> health_pb2.HealthCheckResponse:
    from treadle.rpc import open_channel
    from treadle.security import TransportConfig

    async with open_channel(address, TransportConfig().credentials()) as channel:
        return await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)


def main() -> None:
    """Exits 0 when the service says SERVING, else 1; prints what it says."""
    parser = argparse.ArgumentParser(prog="python -m treadle.health", description=main.__doc__)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--service", default="", help='"" is readiness, "liveness" liveness')
    parser.add_argument("--timeout", type=float, default=3.0, metavar="SECONDS")
    asked = parser.parse_args()
    try:
        status = look(asked.address, asked.service, asked.timeout)
    except grpc.RpcError as error:
        sys.exit(f"{asked.address}: {error.code().name}, {error.details()}")
    except Exception as error:
        sys.exit(f"{asked.address}: {error}")
    print(f"{asked.address}: {status}")
    sys.exit(status != "SERVING")


if __name__ == "__main__":
    main()

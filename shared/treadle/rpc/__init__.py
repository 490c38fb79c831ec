"""gRPC plumbing that every service and client shares: statuses, servers, channels."""

from treadle.rpc.channel import open_channel
from treadle.rpc.server import RpcServer
from treadle.rpc.service_process import run_service
from treadle.rpc.status import from_rpc_error, from_status, to_status

__all__ = ["RpcServer", "from_rpc_error", "from_status", "open_channel", "run_service", "to_status"]

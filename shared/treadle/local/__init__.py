"""The whole suite on one machine: every service as a process, and an embedded Valkey.

`LocalStack` is what `treadle up` and `treadle demo` run.
"""

from treadle.local.config import LocalConfig
from treadle.local.home import Home
from treadle.local.observer import Observer, ServiceState
from treadle.local.service import ServiceSpec
from treadle.local.stack import LocalStack, ModelToServe, StackOptions
from treadle.local.supervisor import Supervisor

__all__ = [
    "Home",
    "LocalConfig",
    "LocalStack",
    "ModelToServe",
    "Observer",
    "ServiceSpec",
    "ServiceState",
    "StackOptions",
    "Supervisor",
]

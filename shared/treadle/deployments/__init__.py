"""What should be served under which alias, as the registry says it, and how to follow that."""

from treadle.deployments.deployment import Deployment, ServingConfiguration, Target
from treadle.deployments.known import KnownModels
from treadle.deployments.watching import ModelWatch, Watch, watch_models

__all__ = [
    "Deployment",
    "KnownModels",
    "ModelWatch",
    "ServingConfiguration",
    "Target",
    "Watch",
    "watch_models",
]

"""The Python client: plain dataclasses in and out, errors as `treadle.errors.TreadleError`."""

from treadle.client.answer import Answer, BatchItem, Choice, Chunk, Prompt, ServedModel, TokenLogprobs, Usage
from treadle.client.artifact import (
    Alias,
    Artifact,
    ArtifactFile,
    DtypeShare,
    HubOptions,
    ImportProgress,
    ModelSource,
    TaskFacts,
)
from treadle.client.async_client import AsyncClient
from treadle.client.deployment import (
    Deployment,
    DeploymentTarget,
    Eviction,
    Evictions,
    Lease,
    ModelChange,
    Promotion,
    TargetStatus,
)
from treadle.client.derivation import DerivationProgress
from treadle.client.planning import (
    CheckpointQuantization,
    DevicePlan,
    MemoryEstimate,
    ModelInspection,
)
from treadle.client.registry_client import RegistryClient
from treadle.client.request import GenerationOptions, GenerationRequest, Message
from treadle.client.stream import AnswerStream
from treadle.client.sync_client import Client, SyncAnswerStream
from treadle.client.transfers import Downloaded
from treadle.client.verification import DamagedFile, Verification
from treadle.deployments import ServingConfiguration
from treadle.security import Credentials

__all__ = [
    "Alias",
    "Answer",
    "AnswerStream",
    "Artifact",
    "ArtifactFile",
    "AsyncClient",
    "BatchItem",
    "CheckpointQuantization",
    "Choice",
    "Chunk",
    "Client",
    "Credentials",
    "DamagedFile",
    "Deployment",
    "DeploymentTarget",
    "DerivationProgress",
    "DevicePlan",
    "Downloaded",
    "DtypeShare",
    "Eviction",
    "Evictions",
    "GenerationOptions",
    "GenerationRequest",
    "HubOptions",
    "ImportProgress",
    "Lease",
    "MemoryEstimate",
    "Message",
    "ModelChange",
    "ModelInspection",
    "ModelSource",
    "Promotion",
    "Prompt",
    "RegistryClient",
    "ServedModel",
    "ServingConfiguration",
    "SyncAnswerStream",
    "TargetStatus",
    "TaskFacts",
    "TokenLogprobs",
    "Usage",
    "Verification",
]

"""Which roles may call which method. What stands in no line is for ADMIN alone."""

from __future__ import annotations

from treadle.security.principal import Role

_INFER, _TRAIN, _MONITOR = Role.INFER, Role.TRAIN, Role.MONITOR
_NOBODY_ELSE: frozenset[Role] = frozenset()
_ANY_KEY = frozenset(Role)

OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})
"""Called without a key: what probes processes has none."""

_SERVICES: dict[str, frozenset[Role]] = {
    "grpc.reflection.v1alpha.ServerReflection": _ANY_KEY,
    "treadle.api.inference.v1.InferenceService": frozenset({_INFER}),
    "treadle.api.tokenizer.v1.TokenizerService": frozenset({_INFER, _TRAIN}),
    "treadle.api.training.v1.TrainingService": frozenset({_TRAIN}),
    "google.longrunning.Operations": frozenset({_TRAIN}),
}

_LOOK_UP = frozenset({_INFER, _TRAIN, _MONITOR})
_METHODS: dict[str, frozenset[Role]] = {
    "treadle.api.registry.v1.RegistryService/ResolveModel": _LOOK_UP,
    "treadle.api.registry.v1.RegistryService/ListArtifacts": _LOOK_UP,
    "treadle.api.registry.v1.RegistryService/ListAliases": _LOOK_UP,
    "treadle.api.registry.v1.RegistryService/GetAliasHistory": _LOOK_UP,
    "treadle.api.registry.v1.RegistryService/GetDeployment": _LOOK_UP,
    "treadle.api.registry.v1.RegistryService/ListDeployments": _LOOK_UP,
    "treadle.api.registry.v1.RegistryService/ListLeases": _LOOK_UP,
    "treadle.api.registry.v1.RegistryService/WatchModels": _LOOK_UP,
    "treadle.api.registry.v1.RegistryService/EstimateMemory": _LOOK_UP,
    "treadle.api.registry.v1.RegistryService/PlanDeviceMap": _LOOK_UP,
    "treadle.api.registry.v1.RegistryService/DownloadBlob": _LOOK_UP,
    "treadle.api.worker.v1.WorkerService/GetWorkerStatus": frozenset({_MONITOR}),
}


def allowed_roles(method: str) -> frozenset[Role] | None:
    """The roles besides ADMIN that may call "/package.Service/Method"; None: no key is asked for."""
    name = method.removeprefix("/")
    service = name.partition("/")[0]
    if service in OPEN_SERVICES:
        return None
    return _METHODS.get(name, _SERVICES.get(service, _NOBODY_ELSE))

"""A device map that somebody wrote: checked, never changed. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from treadle.errors import invalid_field
from treadle.models.device_budget import Budget, ordered
from treadle.models.device_map import DeviceMap
from treadle.models.module_tree import ModuleTree

_SAID = 5
"""Names in a message; the rest is counted."""


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """A map, the bytes that it puts on each device, and what people should know of it."""

    device_map: DeviceMap
    used_bytes: Mapping[str, int]
    warnings: tuple[str, ...]


def check_device_map(tree: ModuleTree, device_map: DeviceMap) -> None:
    """Raises InvalidArgument for an unknown device or module, and for parameters that are left out."""
    ordered(dict.fromkeys(device_map.values(), 0), "device_map")
    modules = {module.name for module in tree.root.walk()}
    parameters = [tensor.name for module in tree.root.walk() for tensor in module.parameters]
    if unknown := sorted(device_map.keys() - modules - set(parameters)):
        raise invalid_field(
            "device_map", f"the model has no module {_some(unknown)}", reason="UNKNOWN_MODULE"
        )
    if left_out := [name for name in parameters if _device_of(name, device_map) is None]:
        raise invalid_field(
            "device_map",
            f"gives no device for {_some(left_out)}; name their modules, or the whole model as ''",
            reason="PARAMETERS_LEFT_OUT",
        )


def place(tree: ModuleTree, sizes: Mapping[str, float], device_map: DeviceMap, budget: Budget) -> PlacedModel:
    """What a whole map means; `sizes` are `tensor_bytes`, `budget` what the devices have."""
    used: dict[str, float] = {}
    tied: dict[str, str] = {}
    for tensor in tree.tensors():
        # accelerate drops the tables of a module that it divides: they are where the first part is.
        device = _device_of(tensor.name, device_map)
        if device is not None:
            used[device] = used.get(device, 0) + sizes[tensor.name]
    warnings = [*_ties_apart(tree, device_map, tied), *_blocks_apart(tree, device_map)]
    for name, first in tied.items():
        used[name] = used.get(name, 0) + sizes[first]
    for device, size in used.items():
        if device in budget and size > budget[device]:
            warnings.append(f"{device} gets {int(size)} bytes and has {int(budget[device])}")
    return PlacedModel(
        dict(device_map), {device: int(size) for device, size in used.items()}, tuple(warnings)
    )


def _ties_apart(tree: ModuleTree, device_map: DeviceMap, copies: dict[str, str]) -> list[str]:
    """Warnings of parameters that are one and lie on two devices; `copies` gets device and parameter."""
    warnings = []
    for name, first in tree.ties.items():
        here, there = _device_of(name, device_map), _device_of(first, device_map)
        if here is not None and here != there:
            copies[here] = first
            warnings.append(
                f"{name} is {first}, and they are on two devices ({here} and {there}): it is there twice"
            )
    return warnings


def _blocks_apart(tree: ModuleTree, device_map: DeviceMap) -> list[str]:
    """Warnings of blocks whose parts lie on several devices."""
    apart = []
    for module in tree.root.walk():
        if module.kind in tree.no_split:
            devices = {
                _device_of(tensor.name, device_map) for part in module.walk() for tensor in part.parameters
            }
            if len(devices) > 1:
                apart.append(module.name)
    if not apart:
        return []
    return [
        f"{_some(apart)} should be on one device each: what goes through them would change devices midway"
    ]


def _device_of(name: str, device_map: DeviceMap) -> str | None:
    """The device of the nearest module that the map names."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SAID} more" if len(names) > _SAID else ""
    return ", ".join(name[:100] for name in names[:_SAID]) + more

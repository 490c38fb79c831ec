"""Which module goes to which device: accelerate's `infer_auto_device_map`, over a tree of sizes. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.models.device_budget import CPU, DISK, MPS, Budget, is_accelerator
from treadle.models.module_tree import Module, ModuleTensor, ModuleTree

Node = Module | ModuleTensor
DeviceMap = dict[str, str]
"""Module (or parameter) to device; "" is the whole model."""


def infer_device_map(tree: ModuleTree, sizes: Mapping[str, float], budget: Budget) -> DeviceMap:
    """Fills the devices of `budget` in order, and the disk with what is left.

    `sizes` are `module_bytes`. Room for the largest layer is kept on the first accelerator and on the CPU,
    where a layer that was put elsewhere is brought back to be computed.
    """
    return merged(_Walk(tree, sizes, budget).run())


def merged(device_map: DeviceMap) -> DeviceMap:
    """The map with siblings that share a device put together."""
    result = dict(device_map)
    _merge_below(result, "")
    return result


def _merge_below(device_map: DeviceMap, name: str) -> None:
    prefix = f"{name}." if name else ""
    below = [key for key in device_map if key.startswith(prefix)]
    if len(below) > 1 and len({device_map[key] for key in below}) == 1:
        device = device_map[below[0]]
        for key in below:
            del device_map[key]
        device_map[name] = device
        return
    depth = name.count(".") + 2 if name else 1
    children = {".".join(key.split(".")[:depth]) for key in below if len(key) > len(name)}
    for child in children:
        _merge_below(device_map, child)


@dataclass(slots=True)
class _Largest:
    """The size of the largest undivided layer that is still to come, and all that have it."""

    size: float
    names: list[str]


class _Walk:
    """The modules that wait for a device, and the device that is being filled."""

    def __init__(self, tree: ModuleTree, sizes: Mapping[str, float], budget: Budget) -> None:
        self._tree, self._sizes, self._budget = tree, sizes, budget
        self._devices = [*budget, *([] if DISK in budget else [DISK])]
        accelerators = [device for device in self._devices if is_accelerator(device) or device == MPS]
        self._keeps_room = [MPS] if MPS in accelerators else [*accelerators[:1], CPU]
        self._ties = tree.tied_groups()
        self._used: dict[str, float] = dict.fromkeys(self._devices, 0)
        root = tree.root
        self._waiting: list[Node] = [*root.parameters, *root.children, *root.buffers]
        self._largest = self._find_largest(self._waiting)
        self._map: DeviceMap = {}

    def run(self) -> DeviceMap:
        """Every module's device."""
        current = 0
        while self._waiting:
            node = self._waiting.pop(0)
            self._forget(node.name)
            device = self._devices[current]
            reserved = self._largest.size if device in self._keeps_room else 0
            if not self._place(node, device, reserved):
                self._used[device] += reserved
                current += 1
                self._waiting.insert(0, node)
        return self._map

    def _place(self, node: Node, device: str, reserved: float) -> bool:
        """Puts the node on the device, or parts of it, or of what is tied to it, back into the line; False
        where it is the next device's turn."""
        size, tied = self._size(node.name), self._tied_to(node.name)
        with_ties = size + sum(self._size(other.name) - self._sizes.get(name, 0) for name, other in tied)
        # What is on the disk has no bound.
        if device == DISK:
            self._put(node, tied, device, with_ties)
            return True
        room = self._budget[device] - reserved
        if self._used[device] + with_ties <= room:
            self._put(node, tied, device, with_ties)
            return True
        if tied and self._used[device] + size <= room and self._split_tied(node, tied):
            return True
        return self._used[device] + size >= room and self._split(node)

    def _put(self, node: Node, tied: Sequence[tuple[str, Node]], device: str, size: float) -> None:
        self._used[device] += size
        self._map[node.name] = device
        for _, other in tied:
            self._waiting = [waiting for waiting in self._waiting if waiting.name != other.name]
            self._map[other.name] = device

    def _split_tied(self, node: Node, tied: Sequence[tuple[str, Node]]) -> bool:
        for _, other in tied:
            if self._is_whole(other):
                continue
            place = next(i for i, waiting in enumerate(self._waiting) if waiting.name == other.name)
            self._waiting[place : place + 1] = _parts(other)
            self._waiting.insert(0, node)
            self._find_largest_again()
            return True
        return False

    def _split(self, node: Node) -> bool:
        if self._is_whole(node):
            return False
        self._waiting = [*_parts(node), *self._waiting]
        self._find_largest_again()
        return True

    def _is_whole(self, node: Node) -> bool:
        """Whether it is never divided."""
        return isinstance(node, ModuleTensor) or not node.children or node.kind in self._tree.no_split

    def _tied_to(self, name: str) -> list[tuple[str, Node]]:
        """Parameters outside that are one with a parameter inside, and the waiting module of each."""
        inside = f"{name}."
        outside = [
            other
            for group in self._ties
            if any(f"{tied}.".startswith(inside) for tied in group)
            for other in group
            if not f"{other}.".startswith(inside)
        ]
        found = []
        for other in outside:
            module = next((node for node in self._waiting if other.startswith(f"{node.name}.")), None)
            # What it is tied to may have its place.
            if module is not None:
                found.append((other, module))
        return found

    def _size(self, name: str) -> float:
        return self._sizes.get(name, 0)

    def _forget(self, name: str) -> None:
        """The module's turn has come: it is none of those that room is kept for."""
        names = self._largest.names
        left = [other for other in names if other != name and not other.startswith(f"{name}.")]
        self._largest.names = left
        if not left:
            self._find_largest_again()

    def _find_largest_again(self) -> None:
        self._largest = self._find_largest([node for node in self._waiting if isinstance(node, Module)])

    def _find_largest(self, nodes: Sequence[Node]) -> _Largest:
        largest = _Largest(0, [])
        line = list(reversed(nodes))
        while line:
            node = line.pop()
            if self._is_whole(node):
                size = self._size(node.name)
                if size > largest.size:
                    largest = _Largest(size, [node.name])
                elif size == largest.size:
                    largest.names.append(node.name)
            elif isinstance(node, Module):
                line.extend(reversed(node.children))
        return largest


def _parts(node: Node) -> list[Node]:
    assert isinstance(node, Module)
    return [*node.parameters, *node.children]

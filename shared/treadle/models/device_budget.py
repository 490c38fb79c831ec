"""What each device may hold of a model: sizes, devices in order, and shares for a balanced map. No torch.

The rules are accelerate's `get_max_memory` and `get_balanced_memory`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from treadle.errors import invalid_field
from treadle.models.module_tree import Module, ModuleTree

DISK = "disk"
CPU = "cpu"
MPS = "mps"
_NAMED = (MPS, CPU, DISK)
_ACCELERATOR = re.compile(r"0|[1-9][0-9]{0,3}")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([KMG]iB|[KMG]B|[KMG]b|B)?", re.IGNORECASE)
_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1, "": 1}
_MOST_DEVICES = 256
_KEPT_OF_ONE = 0.9
"""Of the only accelerator, where nobody said how much of it to use: the rest is for activations."""

Budget = dict[str, float]
"""Bytes by device, accelerators ("0", "1", …) first, then "mps", "cpu" and "disk"."""


def read_size(text: str | int, where: str) -> int:
    """Bytes of a number, or of "10GiB" (2**30), "500MB" (10**6), "8Gb" (bits); raises InvalidArgument.

    Small letters mean the same but for the last: a "b" behind a decimal unit is a bit, as accelerate has it.
    """
    if isinstance(text, int):
        if text < 0:
            raise invalid_field(where, f"must be 0 or more bytes; got {text}")
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise invalid_field(where, f"must be bytes, or a size such as '10GiB' or '500MB'; got {text[:40]!r}")
    number, unit = match[1], match[2] or ""
    size = int(float(number) * _UNITS[unit.lower()]) if unit else int(float(number))
    is_bits = len(unit) == 2 and unit.endswith("b")
    return size // 8 if is_bits else size


def is_accelerator(device: str) -> bool:
    """Whether it is a number."""
    return _ACCELERATOR.fullmatch(device) is not None


def ordered(sizes: Mapping[str, float], where: str) -> Budget:
    """The devices in the order in which they are filled; raises InvalidArgument for an unknown one."""
    if len(sizes) > _MOST_DEVICES:
        raise invalid_field(where, f"names {len(sizes)} devices; at most {_MOST_DEVICES} are planned for")
    accelerators = sorted(filter(is_accelerator, sizes), key=int)
    if unknown := sorted(sizes.keys() - {*accelerators, *_NAMED}):
        raise invalid_field(
            where,
            f"the device {unknown[0][:40]!r} is unknown; accelerators are numbers ('0', '1'), then there are "
            "'mps', 'cpu' and 'disk'",
            reason="UNKNOWN_DEVICE",
        )
    return {device: sizes[device] for device in (*accelerators, *_NAMED) if device in sizes}


def balanced(
    budget: Budget, tree: ModuleTree, sizes: Mapping[str, float], *, low_zero: bool, is_users: bool
) -> Budget:
    """What each accelerator gets so that all are used alike; with `low_zero` the first as little as can be.

    `sizes` are `module_bytes`. `is_users`: somebody said how much to use, so that nothing is kept back.
    """
    budget = dict(budget)
    used = [device for device, size in budget.items() if is_accelerator(device) and size > 0]
    if not used:
        return budget
    if len(used) == 1:
        if not is_users:
            # accelerate takes it off the first one, whether or not that is the one with memory.
            first = next(device for device in budget if is_accelerator(device))
            budget[first] *= _KEPT_OF_ONE
        return budget
    count = len(used)
    if low_zero and any(str(number) not in budget for number in range(count)):
        raise invalid_field(
            "strategy",
            f"balanced_low_0 counts accelerators from '0' without a gap; got {', '.join(used[:10])}",
        )
    share = sizes.get("", 0) // (count - 1 if low_zero else count)
    share += int(1.25 * max(_first_blocks(tree, sizes), _mean_layer(sizes)))
    for device in used[:-1]:
        budget[device] = min(budget["0"] if low_zero and device == "0" else share, budget[device])
    if low_zero:
        others = sum(budget[str(number)] for number in range(1, count))
        budget["0"] = min(max(0, sizes.get("", 0) - others), budget["0"])
    return budget


def _first_blocks(tree: ModuleTree, sizes: Mapping[str, float]) -> float:
    """The largest of the first undivided module of each kind."""
    first: dict[str, Module] = {}
    for module in tree.root.walk():
        if module.kind in tree.no_split and module.name in sizes:
            first.setdefault(module.kind, module)
    return max((sizes[module.name] for module in first.values()), default=0)


def _mean_layer(sizes: Mapping[str, float]) -> int:
    """The mean of the modules that hold tensors and no modules."""
    tensors = set(_leaves(sizes))
    modules = {name: size for name, size in sizes.items() if name not in tensors}
    leaves = _leaves(modules)
    return int(sum(modules[name] for name in leaves) / max(len(leaves), 1))


def _leaves(sizes: Mapping[str, float]) -> list[str]:
    parents = {name.rpartition(".")[0] for name in sizes if "." in name}
    return [name for name in sizes if name and name not in parents]

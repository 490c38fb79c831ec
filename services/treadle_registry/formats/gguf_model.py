"""A GGUF file as a model to import."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from treadle.models.config import parse_config
from treadle.transfer.file_names import is_file_name
from treadle_registry.formats.canonical import WEIGHTS, TextParts
from treadle_registry.formats.gguf_config import config_from_gguf, generation_config_from_gguf
from treadle_registry.formats.gguf_reader import GgufFile
from treadle_registry.formats.gguf_tensors import GgufTensors
from treadle_registry.formats.gguf_tokenizer import tokenizer_from_gguf
from treadle_registry.formats.safetensors_file import TensorDigests, write_bfloat16
from treadle_registry.operations.progress import Report, Stage, StageMeter
from treadle_registry.store.staging import Staging


class GgufModel:
    """One GGUF file: dequantised to bfloat16, its tokenizer and configuration rebuilt."""

    def __init__(self, file: Path) -> None:
        # A name that the store does not take says nothing about what is in the file.
        self._name = file.name if is_file_name(file.name) else "model.gguf"
        self.files = {self._name: file}
        """What is kept as it came: name in `source/` and where it lies."""
        self._file = file

    def check(self) -> TextParts:
        """Everything but the weights' values, from where the file lies; raises what is wrong with it."""
        return self._read(self._file)

    def stage(self, staging: Staging, report: Report) -> tuple[TextParts, TensorDigests]:
        """Writes the canonical weights from the copy in `staging`."""
        path = staging.path(f"source/{self._name}")
        parts = self._read(path)
        with GgufFile(path) as file, staging.create(WEIGHTS) as write:
            tensors = GgufTensors(file, parse_config(dict(parts.config)))
            total = 2 * sum(math.prod(shape) for shape in tensors.shapes.values())
            meter = StageMeter(report, Stage.CONVERTING, total)

            def slices(name: str) -> Iterator[memoryview]:
                for piece in tensors.slices(name):
                    yield piece
                    meter.add(piece.nbytes)

            return parts, write_bfloat16(write, tensors.shapes, slices)

    def _read(self, path: Path) -> TextParts:
        with GgufFile(path) as file:
            config = config_from_gguf(file)
            GgufTensors(file, parse_config(config))
            tokenizer = tokenizer_from_gguf(file)
            license_name = file.metadata.get("general.license", "")
            return TextParts(
                config=config,
                tokenizer_json=tokenizer.tokenizer_json.encode(),
                tokenizer=json.loads(tokenizer.tokenizer_json),
                tokenizer_config=tokenizer.config,
                chat_templates=tokenizer.chat_templates,
                generation=generation_config_from_gguf(file, config),
                license=license_name[:100] if isinstance(license_name, str) else "",
                dtypes=file.dtype_shares(),
            )

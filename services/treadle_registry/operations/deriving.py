"""A derivation from end to end, in this process: look whether it was made, convert, publish."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from treadle.errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from treadle.models.encoder_config import EncoderConfig
from treadle.models.families import AnyConfig, expected_tensors, parse_any_config
from treadle.models.quantization_config import FORMS
from treadle.models.stored_folder import StoredFile, StoredFolder
from treadle_registry.formats.canonical import WEIGHTS, facts_of_config
from treadle_registry.formats.float_tensors import FLOAT_TYPES, FloatTensors, StoredFloats
from treadle_registry.formats.gguf_reader import GgufFile
from treadle_registry.formats.gguf_tensors import GgufTensors
from treadle_registry.formats.json_files import json_bytes
from treadle_registry.formats.peft_adapter import CONFIG as ADAPTER_CONFIG
from treadle_registry.formats.peft_adapter import WEIGHTS as ADAPTER_WEIGHTS
from treadle_registry.formats.peft_adapter import PeftAdapter, adapter_files
from treadle_registry.formats.safetensors_file import TensorDigests, dtype_shares, hash_tensors, read_header
from treadle_registry.formats.tensor_file import TensorFile, stored_bytes
from treadle_registry.names import source_path
from treadle_registry.operations.conversions import (
    Conversion,
    DtypeConversion,
    MergeConversion,
    QuantizedConversion,
)
from treadle_registry.operations.progress import Progress, Report, Stage, StageMeter, unheard
from treadle_registry.store.derivation import DERIVER, Derivation
from treadle_registry.store.digests import Digests, compute_digest, digest_json
from treadle_registry.store.exclusive import exclusive
from treadle_registry.store.manifest import Manifest
from treadle_registry.store.staging import Staging, check_room, disk_errors
from treadle_registry.store.store import Published, Store

_CONFIG_FILE = "config.json"
_OF_WEIGHTS = (".safetensors", ".safetensors.index.json")


def derive(store: Store, parent_digest: str, derivation: Derivation, report: Report = unheard) -> Published:
    """Makes another form of an artifact, or gives the one that was made before and is whole.

    Of several who ask for the same at once one works and the others wait for it. Blocks for as long as it
    takes: about four seconds for a hundred million parameters. Raises TreadleError: NotFound,
    FailedPrecondition for a parent that is quantised already, DataLoss for one that is damaged, Aborted for
    one that goes meanwhile.
    """
    report(Progress(Stage.CHECKING))
    parent = store.get(parent_digest)
    _check_parent(parent.manifest)
    _check_kind(parent, derivation)
    if _is_already(parent, derivation):
        return parent
    with disk_errors("the derived model"), store.staging() as staging:
        if derivation.kind == "adapter_merge":
            derivation = _stage_adapter(staging, derivation)
        with (
            exclusive(store.root / "tmp", f"derive-{derivation.key(parent_digest)}"),
            _still_there(store, parent_digest),
        ):
            return (
                _made_before(store, parent_digest, derivation)
                or _Derivation(store, staging, parent, derivation, report).run()
            )


def _check_parent(manifest: Manifest) -> None:
    if manifest.facts.quantization:
        whole = f", {manifest.parent_digest}" if manifest.parent_digest else "; import that, not quantised"
        raise FailedPrecondition(
            f"the model is stored as {manifest.facts.quantization} already; derive from the model that "
            f"it was made of{whole}",
            reason="QUANTIZED_PARENT",
        )


def _check_kind(parent: Published, derivation: Derivation) -> None:
    """Raises FailedPrecondition (UNSUPPORTED_ARCHITECTURE) for what is not made of an encoder."""
    if derivation.kind == "dtype" or _generates(parent.manifest):
        return
    kind = parent.manifest.facts.model_type
    if derivation.kind == "adapter_merge":
        what = f"adapters are merged into models that generate, and this is an encoder ({kind}): merge it in "
        what += "PEFT (merge_and_unload) and import the result"
    else:
        what = (
            f"an encoder ({kind}) is not stored as {derivation.value}: serve the float model, quantised as "
        )
        what += "it is loaded (quantization int8 of its deployment)"
    raise FailedPrecondition(what, reason="UNSUPPORTED_ARCHITECTURE")


def _is_already(parent: Published, derivation: Derivation) -> bool:
    """Whether an imported model's canonical weights are of the type that is asked for."""
    if derivation.kind != "dtype" or parent.manifest.parent_digest:
        return False
    if _generates(parent.manifest):
        return derivation.value == "bfloat16"
    # By the file, as the manifest's shares count what was left out, too, and may be another registry's word.
    # One that is damaged is found to be so below.
    with contextlib.suppress(InvalidArgument, OSError):
        stored = read_header(parent.canonical_folder.parent / WEIGHTS)
        return {tensor.dtype for tensor in stored.values()} == {FLOAT_TYPES[derivation.value]}
    return False


def _generates(manifest: Manifest) -> bool:
    """Whether it is a decoder, by what was said of it when it came."""
    return "generate" in manifest.task_facts.tasks


def _made_before(store: Store, parent_digest: str, derivation: Derivation) -> Published | None:
    """The artifact that this tool made with these parameters; a damaged one is made anew."""
    key = derivation.key(parent_digest)
    for known in store.readable():
        manifest = known.manifest
        if manifest.derivation is None or manifest.converter != DERIVER or manifest.fetched_from:
            continue
        if manifest.derivation.key(manifest.parent_digest) == key:
            return known if store.is_whole(known) else None
    return None


@contextlib.contextmanager
def _still_there(store: Store, digest: str) -> Iterator[None]:
    """Tells a parent that was deleted meanwhile from one that is damaged."""
    try:
        yield
    except (FileNotFoundError, DataLoss) as error:
        try:
            store.get(digest)
        except NotFound:
            raise Aborted(
                "the model was deleted while another was made of it; import it again", reason="DELETED"
            ) from error
        if isinstance(error, DataLoss):
            raise
        raise DataLoss(
            f"{error.filename} of {digest} is gone; import the model again, which replaces it",
            reason="DAMAGED_FILE",
        ) from error


def _stage_adapter(staging: Staging, derivation: Derivation) -> Derivation:
    """Copies the adapter's files, which are hashed on the way: from here on only the copies are read."""
    folder = source_path(derivation.folder, derivation.field)
    for name, path in adapter_files(folder).items():
        try:
            staging.copy(path, f"source/{name}")
        except PermissionError as error:
            raise PermissionDenied(
                f"the registry may not read {name} of the adapter", reason="SOURCE_NOT_READABLE"
            ) from error
    return replace(derivation, value=adapter_digest(staging.listed("source")))


def adapter_digest(files: Iterable[StoredFile]) -> str:
    """The name of an adapter's content; raises KeyError where one of its two files is not among `files`."""
    digests = {file.path: file.digest for file in files}
    return digest_json(
        {"kind": "adapter/1", "config": digests[ADAPTER_CONFIG], "weights": digests[ADAPTER_WEIGHTS]}
    )


class _Derivation:
    """One derivation that is really made."""

    def __init__(
        self, store: Store, staging: Staging, parent: Published, derivation: Derivation, report: Report
    ) -> None:
        self._store, self._staging, self._report = store, staging, report
        self._parent, self._derivation = parent, derivation
        # A parent that was imported has its values as they came, which may be finer than the canonical ones;
        # an encoder's are the same.
        manifest = parent.manifest
        imported = not manifest.parent_digest and manifest.source_files
        self._from_source = derivation.kind == "dtype" and bool(imported) and _generates(manifest)

    def run(self) -> Published:
        """Checks the parent's files, converts, publishes."""
        self._verify_parent()
        raw = json.loads((self._parent.canonical_folder / _CONFIG_FILE).read_bytes())
        config = parse_any_config(raw)
        with self._values(config) as values:
            conversion = self._conversion(raw, config)
            needed = sum(map(stored_bytes, conversion.layouts.values()))
            check_room(self._store.root, needed, "the derived model has")
            self._convert(config, values, conversion)
        self._copy_text(conversion.config)
        manifest = self._manifest(conversion.config)
        self._report(Progress(Stage.PUBLISHING))
        return self._store.publish(self._staging, manifest)

    def _verify_parent(self) -> None:
        """Hashes every file that is read; raises DataLoss that names the damaged one."""
        manifest = self._parent.manifest
        folder = self._parent.canonical_folder
        canonical = StoredFolder(folder, manifest.digest, manifest.files)
        if self._from_source:
            StoredFolder(folder.parent / "source", manifest.digest, manifest.source_files).verify()
            canonical.verify([file.path for file in manifest.files if not file.path.endswith(_OF_WEIGHTS)])
        else:
            canonical.verify()

    @contextlib.contextmanager
    def _values(self, config: AnyConfig) -> Iterator[FloatTensors]:
        """Where the parent's values are read."""
        if not self._from_source:
            yield self._canonical()
            return
        folder = self._parent.canonical_folder.parent / "source"
        names = [file.path for file in self._parent.manifest.source_files]
        gguf = [name for name in names if name.endswith(".gguf")]
        if gguf and not isinstance(config, EncoderConfig):
            with GgufFile(folder / gguf[0]) as file:
                yield GgufTensors(file, config)
            return
        yield StoredFloats([folder / name for name in names if name.endswith(".safetensors")])

    def _canonical(self) -> StoredFloats:
        names = [file.path for file in self._parent.manifest.files]
        folder = self._parent.canonical_folder
        return StoredFloats([folder / name for name in names if name.endswith(".safetensors")])

    def _conversion(self, raw: Mapping[str, Any], config: AnyConfig) -> Conversion:
        derivation = self._derivation
        if derivation.kind == "dtype":
            return DtypeConversion(raw, self._shapes(config), derivation.value)
        assert not isinstance(config, EncoderConfig)
        if derivation.kind == "quantization":
            quantization = next(form for form in FORMS if form == derivation.value)
            return QuantizedConversion(raw, config, self._canonical(), quantization)
        adapter = PeftAdapter(self._staging.path("source"), config)
        return MergeConversion(raw, config, self._canonical(), adapter)

    def _shapes(self, config: AnyConfig) -> Mapping[str, tuple[int, ...]]:
        """The parent's canonical tensors; an encoder may have some that none must have."""
        return self._canonical().shapes if isinstance(config, EncoderConfig) else expected_tensors(config)

    def _convert(self, config: AnyConfig, values: FloatTensors, conversion: Conversion) -> None:
        shapes = self._shapes(config)
        # Of the parent, as it lies in the canonical folder.
        meter = StageMeter(self._report, Stage.CONVERTING, 2 * sum(map(math.prod, shapes.values())))
        with self._staging.create_at_offsets(WEIGHTS) as write_at:
            file = TensorFile(write_at, conversion.layouts)
            for name in shapes:
                first = 0
                for piece in values.pieces(name):
                    for part, data in conversion.pieces(name, first, piece):
                        file.append(part, data)
                    first += len(piece)
                    meter.add(2 * piece.size)
            file.close()

    def _copy_text(self, config: Mapping[str, Any]) -> None:
        """Everything but the weights is the parent's, which was hashed already."""
        for file in self._parent.manifest.files:
            if file.path != _CONFIG_FILE and not file.path.endswith(_OF_WEIGHTS):
                self._staging.copy(self._parent.canonical_folder / file.path, f"canonical/{file.path}")
        self._staging.write(f"canonical/{_CONFIG_FILE}", json_bytes(config))

    def _manifest(self, config: Mapping[str, Any]) -> Manifest:
        parent, derivation = self._parent.manifest, self._derivation
        assert parent.digests is not None
        path = self._staging.path(WEIGHTS)
        stored = read_header(path)
        tensors: TensorDigests = {
            name: (stored[name].dtype, stored[name].shape, digest)
            for name, digest, _ in hash_tensors(path, stored)
        }
        quantization = derivation.value if derivation.kind == "quantization" else ""
        return Manifest(
            digests=Digests(
                compute=compute_digest(config, tensors),
                tokenizer=parent.digests.tokenizer,
                presentation=parent.digests.presentation,
            ),
            facts=replace(
                parent.facts,
                # A head that was tied has numbers of its own once it is quantised.
                parameters=facts_of_config(config, parse_any_config(dict(config))).parameters,
                quantization=quantization,
                dtypes=dtype_shares(stored),
            ),
            defaults=parent.defaults,
            task_facts=parent.task_facts,
            files=self._staging.listed("canonical"),
            source_files=self._staging.listed("source"),
            source=f"{parent.source} {derivation}",
            create_time=time.time(),
            converter=DERIVER,
            parent_digest=parent.digest,
            derivation=derivation,
        )

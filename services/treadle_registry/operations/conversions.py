"""What each kind of derivation makes of a model's weights, tensor by tensor.

A conversion names the tensors of the result and, given some rows of one of the parent's, says which bytes of
which of them follow. No more than those rows is held, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from treadle.errors import FailedPrecondition
from treadle.models.bfloat16 import widen_bfloat16
from treadle.models.config import ModelConfig
from treadle.models.llama import EMBEDDING, HEAD, expected_tensors
from treadle.models.quantization import (
    pack_bytes,
    pack_words,
    quantize_int4,
    quantize_int8,
    quantize_mxfp4,
)
from treadle.models.quantization_config import KEY, Quantization, quantization_config
from treadle.models.stored_weights import StoredLayout, parts_of, quantized_products
from treadle_registry.formats.float_tensors import FLOAT_TYPES, Floats, StoredFloats, encode
from treadle_registry.formats.peft_adapter import LowRank, PeftAdapter

Pieces = Iterator[tuple[str, bytes | memoryview]]
"""The next bytes of tensors of the result, by name."""


class Conversion(Protocol):
    """One kind of derivation of one model."""

    config: Mapping[str, Any]
    """config.json of the result."""
    layouts: Mapping[str, StoredLayout]
    """The tensors of the result."""

    def pieces(self, name: str, first: int, values: Floats) -> Pieces:
        """What follows from the next values of the parent's tensor `name`; `first` is their first row."""
        ...


class DtypeConversion:
    """Every tensor in another type."""

    def __init__(self, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        """`shapes` are those of the parent's tensors."""
        key = "dtype" if "dtype" in raw else "torch_dtype"
        self.config: Mapping[str, Any] = {**raw, key: dtype}
        self._stored = FLOAT_TYPES[dtype]
        self.layouts: Mapping[str, StoredLayout] = {
            name: StoredLayout(shape, self._stored) for name, shape in shapes.items()
        }

    def pieces(self, name: str, first: int, values: Floats) -> Pieces:
        """Raises FailedPrecondition (OUT_OF_RANGE_WEIGHTS) for what float16 cannot hold."""
        if self._stored == "F16":
            _check_float16(name, values)
        yield name, encode(values, self._stored)


_FLOAT16_OVERFLOWS = 65520.0
"""From here on the nearest float16 is infinity."""


def _check_float16(name: str, values: Floats) -> None:
    largest = float(np.abs(values).max(initial=0))
    if not largest < _FLOAT16_OVERFLOWS:
        raise FailedPrecondition(
            f"{name} has the value {largest:g}, which float16 cannot hold (65504 at most); take bfloat16 or "
            "float32",
            reason="OUT_OF_RANGE_WEIGHTS",
        )


class QuantizedConversion:
    """The products' weights in few bits; embedding, norms and biases as they are.

    A head that is the embedding becomes a tensor of its own where it is quantised.
    """

    def __init__(
        self, raw: Mapping[str, Any], config: ModelConfig, weights: StoredFloats, quantization: Quantization
    ) -> None:
        self._weights = weights
        described = {**raw, KEY: quantization_config(quantization, config)}
        shapes = expected_tensors(config)
        head = HEAD.removesuffix(".weight")
        products = quantized_products(config, quantization)
        self._products = {f"{product}.weight": (product, form) for product, form in products.items()}
        """By the tensor that they are made of."""
        self._head = None
        if head in products and HEAD not in shapes:
            self._head = self._products.pop(HEAD)
            described["tie_word_embeddings"] = False
        layouts = {
            name: StoredLayout(shape, weights.dtype(name))
            for name, shape in shapes.items()
            if name not in self._products
        }
        for product, form in products.items():
            layouts |= parts_of(product, shapes.get(f"{product}.weight", shapes[EMBEDDING]), form)
        self.config: Mapping[str, Any] = described
        self.layouts: Mapping[str, StoredLayout] = layouts

    def pieces(self, name: str, first: int, values: Floats) -> Pieces:
        """Raises FailedPrecondition: NOT_FINITE_WEIGHTS, as NaN and infinity have no few bits, and
        OUT_OF_RANGE_WEIGHTS for what int4's scales cannot span."""
        if name in self._products:
            yield from self._quantized(*self._products[name], first, values)
        else:
            yield name, encode(values, self._weights.dtype(name))
        if name == EMBEDDING and self._head is not None:
            yield from self._quantized(*self._head, first, values)

    def _quantized(self, product: str, form: Quantization, first: int, weight_RI: Floats) -> Pieces:
        sizes = f"{product}.weight_shape"
        if first == 0 and sizes in self.layouts:
            outputs = self.layouts[f"{product}.weight_scale"].shape[0]
            yield sizes, np.array([outputs, weight_RI.shape[1]], "<i8").data
        yield from _quantized(product, form, weight_RI)


def _quantized(product: str, form: Quantization, weight_RI: Floats) -> Pieces:
    weight, scale, packed = f"{product}.weight", f"{product}.weight_scale", f"{product}.weight_packed"
    if not np.isfinite(weight_RI).all():
        raise FailedPrecondition(
            f"{weight} has values that are not finite, which cannot be quantised; import a sound model",
            reason="NOT_FINITE_WEIGHTS",
        )
    if form == "int8":
        int8 = quantize_int8(weight_RI)
        yield weight, int8.q_OI.data
        yield scale, int8.scale_Og.data
    elif form == "int4":
        int4 = quantize_int4(weight_RI)
        if not all(np.isfinite(widen_bfloat16(of_groups)).all() for of_groups in int4[1:]):
            raise FailedPrecondition(
                f"{weight} has values too far apart for the bfloat16 scale of an int4 group; take int8",
                reason="OUT_OF_RANGE_WEIGHTS",
            )
        yield packed, pack_words(int4.q_OI).data
        yield scale, int4.scale_Og.data
        yield f"{product}.weight_min", int4.minimum_Og.data
    else:
        mxfp4 = quantize_mxfp4(weight_RI)
        yield packed, pack_bytes(mxfp4.code_OI).data
        yield scale, mxfp4.scale_Og.data


class MergeConversion:
    """W + scaling * B A, computed in float32 and rounded once to the type that W has."""

    def __init__(
        self, raw: Mapping[str, Any], config: ModelConfig, weights: StoredFloats, adapter: PeftAdapter
    ) -> None:
        self.config = raw
        self._weights, self._adapter = weights, adapter
        self._added: tuple[str, LowRank] | None = None
        self.layouts: Mapping[str, StoredLayout] = {
            name: StoredLayout(shape, weights.dtype(name)) for name, shape in expected_tensors(config).items()
        }

    def pieces(self, name: str, first: int, values: Floats) -> Pieces:
        """Raises InvalidArgument (CORRUPT_ADAPTER) for an adapter that is not finite, FailedPrecondition
        (OUT_OF_RANGE_WEIGHTS) for sums that float16 cannot hold."""
        if name in self._adapter.tensors:
            if self._added is None or self._added[0] != name:
                self._added = name, self._adapter.load(name)
            values = values + self._added[1].rows(first, len(values))
            if self._weights.dtype(name) == "F16":
                _check_float16(name, values)
        yield name, encode(values, self._weights.dtype(name))

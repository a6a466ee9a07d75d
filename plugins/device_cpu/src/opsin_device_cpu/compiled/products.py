"""Linear layers on the compiled products: weights of 16, 8 and 4 bits, in one copy.

Decision, layout and numbers: docs/decisions/0077-cpu-native-products.md.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from opsin.api import Activation, LinearFn, QuantizedWeight, WeightForm, WeightKind
from opsin_device_cpu.native import library

MAX_INPUTS = 65536
"""Above, a sum of integer products might not fit 32 bits."""

_KINDS: Mapping[WeightKind, int] = {"bfloat16": 0, "float16": 1, "int8": 2, "int4": 3, "table4": 4}
_ACTIVATIONS: Mapping[Activation | None, int] = {
    None: 0,
    "silu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "quick_gelu": 4,
}


def serves(form: WeightForm, in_features: int | None) -> bool:
    """Whether a compiled kernel takes a weight in this form."""
    if library() is None or in_features is None:
        return False
    if form.kind in ("float16", "bfloat16"):
        return True
    group = form.group_size
    return in_features <= MAX_INPUTS and (group is None or group % 4 == 0 or group == in_features)


class Product:
    """act(x @ W.T + bias) over a weight in panels; a `LinearFn`.

    Args:
        packed: what ``opsin_weight_pack`` returned.
        shape: (N, K).
        bias: (N,) or None.
        activation: applied to the result.
        rounded: whether activations are rounded to 8 bits.
        order: int64 (K,) or None, see `QuantizedWeight`.
    """

    def __init__(
        self,
        native: ctypes.CDLL,
        packed: int,
        shape: tuple[int, int],
        bias: Tensor | None,
        activation: Activation | None,
        *,
        rounded: bool = False,
        order: Tensor | None = None,
    ) -> None:
        self.nbytes: int = native.opsin_weight_bytes(packed)
        self._free = weakref.finalize(self, native.opsin_weight_free, packed)
        self._run, self._read, self._packed = native.opsin_linear, native.opsin_weight_rows, packed
        self._out, self._in = shape
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self._bias_at = None if self._bias is None else self._bias.data_ptr()
        self._activation, self._rounded, self._order = _ACTIVATIONS[activation], rounded, order

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., K) of float32 or bfloat16 -> (..., N) of the same dtype; sums are float32.

        Raises:
            ValueError: x has another width, or is not on the CPU.
        """
        if x.shape[-1] != self._in or not x.is_cpu:
            raise ValueError(f"got {tuple(x.shape)} on {x.device}, expected (..., {self._in}) on the CPU")
        rows = x if self._order is None else x.index_select(-1, self._order)
        rows = rows.to(torch.float32).contiguous()
        y = torch.empty(*x.shape[:-1], self._out)
        failed = self._run(
            self._packed,
            rows.data_ptr(),
            rows.numel() // self._in,
            self._bias_at,
            self._activation,
            self._rounded,
            y.data_ptr(),
        )
        assert not failed, "sizes were checked"
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight: int64 (T,) -> float32 (T, K), read back from the panels.

        Raises:
            IndexError: an id is out of range.
        """
        ids = ids.contiguous()
        out = torch.empty(ids.numel(), self._in)
        if self._read(self._packed, ids.data_ptr(), ids.numel(), out.data_ptr()):
            raise IndexError(f"an id is not in 0 .. {self._out - 1}")
        if self._order is not None:
            unsorted = torch.empty_like(out)
            unsorted[:, self._order] = out
            return unsorted
        return out


def prepare_narrow_linear(
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    *,
    keep_weight: bool,
    few_rows: bool = False,
) -> LinearFn:
    """`opsin.api.PrepareLinear` of a weight in bfloat16 or float16: sums in float32, no digit lost."""
    kind: WeightKind = "bfloat16" if weight.dtype == torch.bfloat16 else "float16"
    source = weight.detach().contiguous()
    rows, wide = source.shape
    packed = _pack(kind, rows, wide, wide, source, None, None, None)
    return Product(_native(), packed, (rows, wide), bias, activation)


def prepare_quantized_linear(
    weight: QuantizedWeight,
    bias: Tensor | None,
    activation: Activation | None,
    *,
    keep_weight: bool,
    few_rows: bool = False,
) -> LinearFn:
    """`opsin.api.PrepareQuantizedLinear`."""
    rows, wide = weight.shape
    form = weight.form
    tensors = [
        None if t is None else t.contiguous()
        for t in (weight.codes, weight.scales, weight.zeros, weight.table)
    ]
    packed = _pack(form.kind, rows, wide, form.group_size or wide, *tensors)
    rounded = form.round_activations and form.kind in ("int8", "int4")
    return Product(_native(), packed, (rows, wide), bias, activation, rounded=rounded, order=weight.order)


def _native() -> ctypes.CDLL:
    native = library()
    assert native is not None, "asked for only where it is"
    return native


def _pack(kind: WeightKind, rows: int, wide: int, group: int, *tensors: Tensor | None) -> int:
    """The weight in panels.

    Raises:
        ValueError: sizes do not fit each other.
    """
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    packed: int | None = _native().opsin_weight_pack(_KINDS[kind], rows, wide, group, *addresses)
    if packed is None:
        raise ValueError(
            f"a weight of {kind}, {rows} x {wide} in groups of {group}, cannot be packed: "
            "its groups do not divide its inputs, or memory is out"
        )
    return packed

"""Weights of fewer bits: the forms they have, and the one shape that every layout of checkpoints becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WeightKind = Literal["float16", "bfloat16", "int8", "int4", "table4"]
"""Of a stored element: a 16-bit float, an integer of 8 or 4 bits, or a 4-bit index of a table."""

_UNSIGNED_ZERO = 8
"""What an int4 code means zero by, where a weight brings no zero points: codes are 0 to 15."""


@dataclass(frozen=True, kw_only=True)
class WeightForm:
    """How the weight of a linear layer is stored, and what may be done to its activations. Since 1.2.

    Attributes:
        kind: of the stored elements.
        group_size: inputs that share a scale; None: one scale per output row (and none for 16-bit floats).
        zero_points: whether there is a zero point beside each scale.
        round_activations: whether activations may be rounded to 8 bits, with one scale per row that depends
            on that row only: the user has allowed it, or the checkpoint was made for it.
    """

    kind: WeightKind
    group_size: int | None = None
    zero_points: bool = False
    round_activations: bool = False

    def __str__(self) -> str:
        """A short name, e.g. ``"int4 group 32, zero points, activations int8"``."""
        group = "" if self.group_size is None else f" group {self.group_size}"
        marks = [", zero points"] * self.zero_points + [", activations int8"] * self.round_activations
        return f"{self.kind}{group}{''.join(marks)}"


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """The weight of a linear layer, N outputs and K inputs, in integers or indices. Since 1.2.

    With g the group of column k (``k // group_size``, 0 without groups)::

        W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g]        int8, int4
        W[n, k] = table[codes[n, k]] * scales[n, g]                 table4

    Attributes:
        form: how it is stored. ``group_size`` divides K; there are G groups.
        codes: int8: int8 (N, K). int4 and table4: uint8 (N, ceil(K / 2)), codes 0 to 15, the low half of a
            byte for even k and the high half for odd k; the unused half of an odd K is 0.
        scales: float32 (N, G).
        zeros: int16 (N, G), from -128 to 128 for int8 and from 0 to 16 for int4 (GPTQ's run to 16); None:
            0 for int8, 8 for int4.
        table: float32 (16,), of table4 only.
        order: int64 (K,), or None: column j of ``codes`` belongs to input ``order[j]``, as weights rounded in
            the order of their importance are grouped: ``x[..., order]`` is what meets the columns.

    Raises:
        ValueError: tensors do not fit each other or the form.
    """

    form: WeightForm
    codes: Tensor
    scales: Tensor
    in_features: int
    zeros: Tensor | None = None
    table: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        rows, (wide, packed) = self.codes.shape[0], (self.in_features, self.form.kind != "int8")
        group = self.form.group_size
        if self.form.kind in ("float16", "bfloat16"):
            raise ValueError(f"a weight of {self.form.kind} is a plain tensor")
        if group is not None and (group < 1 or wide % group):
            raise ValueError(f"groups of {group} do not divide {wide} inputs")
        groups = 1 if group is None else wide // group
        expected = {
            "codes": ((rows, -(-wide // 2) if packed else wide), "uint8" if packed else "int8"),
            "scales": ((rows, groups), "float32"),
            "zeros": ((rows, groups) if self.form.zero_points else None, "int16"),
            "table": ((16,) if self.form.kind == "table4" else None, "float32"),
        }
        if self.order is not None:
            expected["order"] = ((wide,), "int64")
        for name, (shape, dtype) in expected.items():
            tensor: Tensor | None = getattr(self, name)
            got = None if tensor is None else tuple(tensor.shape)
            if got != shape or (tensor is not None and str(tensor.dtype) != f"torch.{dtype}"):
                kind = "" if tensor is None else f" of {tensor.dtype}"
                raise ValueError(
                    f"{name} of a weight of {self.form}: got {got}{kind}, expected {shape} of {dtype}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.in_features

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def to(self, device: str) -> QuantizedWeight:
        """A contiguous copy on a device: of its own, never a view of what it was made from."""
        moved: Any = {n: t.to(device, copy=True).contiguous() for n, t in self._tensors().items()}
        return replace(self, **moved)

    def with_rounded_activations(self, allowed: bool = True) -> QuantizedWeight:
        """The same weight, whose activations may or may not be rounded."""
        return replace(self, form=replace(self.form, round_activations=allowed))

    def narrow(self, dim: Literal[0, 1], start: int, length: int) -> QuantizedWeight:
        """Some of the rows (``dim`` 0) or columns (``dim`` 1). A view where that can be.

        Columns that cut through a group get smaller groups, whose scales repeat: nothing is rounded again.

        Raises:
            ValueError: columns of a weight that has an ``order`` (its groups would be uneven), or columns of
                packed codes that begin at an odd one.
        """
        if dim == 0:
            per_row: Any = {
                n: t.narrow(0, start, length) for n, t in self._tensors().items() if n in _PER_ROW
            }
            return replace(self, **per_row)
        if self.order is not None:
            raise ValueError("columns of a weight with an order of its own cannot be taken; dequantize it")
        if self.form.kind == "int8":
            codes = self.codes.narrow(1, start, length)
        else:
            if start % 2:
                raise ValueError(f"columns from {start}: packed codes can be cut at even columns only")
            codes = self.codes.narrow(1, start // 2, -(-length // 2))
            if length % 2 and start + length < self.in_features:
                codes = codes.clone()
                codes[:, -1] &= 0x0F
        group = self.form.group_size
        if group is None:
            return replace(self, codes=codes, in_features=length)
        shared = math.gcd(group, start, length)
        first, count = start // shared, length // shared
        scales, zeros = (
            None if t is None else t.repeat_interleave(group // shared, 1).narrow(1, first, count)
            for t in (self.scales, self.zeros)
        )
        assert scales is not None
        form = replace(self.form, group_size=shared)
        return replace(self, form=form, codes=codes, scales=scales, zeros=zeros, in_features=length)

    def stacks_with(self, other: QuantizedWeight) -> bool:
        """Whether `stack` takes both: equal form (zero points aside), width, table and order."""
        same_form = replace(self.form, zero_points=False) == replace(other.form, zero_points=False)
        return (
            same_form
            and self.in_features == other.in_features
            and _alike(self.table, other.table)
            and _alike(self.order, other.order)
        )

    @staticmethod
    def stack(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """The rows of several weights as one, as those of q, k and v.

        Raises:
            ValueError: they do not fit each other, see `stacks_with`.
        """
        first, *others = parts
        if not all(first.stacks_with(other) for other in others):
            raise ValueError(f"weights of {', '.join(str(part.form) for part in parts)} cannot be stacked")
        if not others:
            return first
        with_zeros = any(part.zeros is not None for part in parts)
        return replace(
            first,
            form=replace(first.form, zero_points=with_zeros),
            codes=_cat([part.codes for part in parts]),
            scales=_cat([part.scales for part in parts]),
            zeros=_cat([part.zero_points() for part in parts]) if with_zeros else None,
        )

    def integers(self) -> Tensor:
        """(N, K) codes, one per element: int8 as they are; int4 and table4 unpacked to uint8."""
        if self.form.kind == "int8":
            return self.codes
        halves = self.codes.new_empty(*self.codes.shape, 2)
        halves[..., 0] = self.codes & 0x0F
        halves[..., 1] = self.codes >> 4
        return halves.flatten(1)[:, : self.in_features]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as floats, (N, K), computed in float32; columns are in the order of the inputs."""
        rows, wide = self.shape
        codes = self.integers()
        if self.table is not None:
            values = self.table[codes.int()]
        else:
            values = codes.float()
        grouped = values.view(rows, self.scales.shape[1], -1)
        if self.table is None:
            grouped = grouped - self.zero_points().unsqueeze(-1)
        weight = (grouped * self.scales.unsqueeze(-1)).view(rows, wide)
        if self.order is not None:
            unsorted = weight.new_empty(weight.shape)
            unsorted[:, self.order] = weight
            weight = unsorted
        return weight.to(dtype)

    def zero_points(self) -> Tensor:
        """int16 (N, G): ``zeros``, or what stands for them where there are none."""
        if self.zeros is not None:
            return self.zeros
        middle = 0 if self.form.kind == "int8" else _UNSIGNED_ZERO
        return self.scales.new_full(self.scales.shape, middle).short()

    def _tensors(self) -> dict[str, Tensor]:
        names = ("codes", "scales", "zeros", "table", "order")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.equal(other)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts. This module does without torch's own functions: plugins import it."""
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    first = 0
    for part in parts:
        whole.narrow(0, first, len(part)).copy_(part)
        first += len(part)
    return whole


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What may become of the weights of a model's linear layers while they are loaded. Since 1.2.

    Attributes:
        decoder, head, other: the form that floats of the decoder's layers, of its output head, and of all
            other layers are rounded to; None: they are not.
        allowed: whether the user has asked for fewer bits: stored integers may then be met by activations
            rounded to 8 bits, and become int8 with a scale per row where the device cannot read their form.
        keep_stored: whether stored integers stay integers where the device can read them.
    """

    decoder: WeightForm | None = None
    head: WeightForm | None = None
    other: WeightForm | None = None
    allowed: bool = False
    keep_stored: bool = True


_PER_ROW = frozenset({"codes", "scales", "zeros"})

"""Linear layers and token embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from opsin.api import (
    Activation,
    AllReduce,
    BuildContext,
    KernelQuery,
    LinearFn,
    Parallel,
    PrepareLinear,
    QuantizedWeight,
    WeightForm,
)
from opsin.layers.module import Layer, Slot, owned
from opsin.layers.rounding import in_form, round_weight, usable_forms

Split = Literal["column", "row"]

Piece = Tensor | QuantizedWeight
"""The weight of one of the tensors that a layer is fused from."""


_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def activation(name: str, field: str = "hidden_act") -> Activation:
    """The activation that config.json names.

    Raises:
        ValueError: there is no such one; the message names ``field``.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"{field} is {name!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


class Linear(Layer):
    """act(x @ W.T + b), possibly fused from several checkpoint tensors stacked along the output.

    Args:
        context: build context.
        in_features: width of x.
        out_features: rows of W; or, for a fused layer, checkpoint name -> rows, in stacking order.
        bias: whether there is a bias.
        activation: applied to the result, fused where the device can.
        split: tensor parallelism: ``"column"`` splits the output, each of its parts, ``"row"`` the input (and
            sums over ranks); None: every rank has the whole layer.
        stored_shape: shape of the checkpoint's weight where it is not (out, in), e.g. that of a convolution
            whose stride equals its kernel.
        num_sums: in float32, compute the product as this many shorter sums over the input, which round
            less. Patch values are large and nearly equal; the norm that follows removes them but not their
            rounding error. Not with an activation.
        few_rows: whether the layer often sees single rows (a decoder's layer).
        unit: what is split is cut in multiples of it (`opsin.api.Parallel.share`). Since 1.2.
        fused: whether the checkpoint stores the parts stacked, as one weight and one bias under the layer's
            own name. Since 1.2.

    Attributes:
        tied: whether the layer multiplies by the table of an `Embedding` and takes no weight of its own.
    """

    tied = False

    def __init__(
        self,
        context: BuildContext,
        in_features: int,
        out_features: int | Mapping[str, int],
        *,
        bias: bool,
        activation: Activation | None = None,
        split: Split | None = None,
        stored_shape: tuple[int, ...] | None = None,
        num_sums: int = 1,
        few_rows: bool = False,
        unit: int = 1,
        fused: bool = False,
    ) -> None:
        super().__init__()
        parts = {"": out_features} if isinstance(out_features, int) else dict(out_features)
        self._place = context.parallel if split else Parallel()
        self._split = split
        self._stored_shape = stored_shape
        self._dtype, self._device = context.dtype, context.device
        self._activation, self._has_bias, self._few_rows = activation, bias, few_rows
        cut, whole = partial(_section, self._place, unit), partial(_section, Parallel(), 1)
        sections = [(cut if split == "column" else whole)(wide) for wide in parts.values()]
        self._parts = {"": sections} if fused else {n: [s] for n, s in zip(parts, sections)}
        self._columns = (cut if split == "row" else whole)(in_features)
        self.in_features = self._columns.length
        self.out_features = sum(section.length for section in sections)
        self._kernels, self._rounding = context.kernels, context.rounding
        self._query = KernelQuery(
            op="prepare_linear",
            dtype=dtype_name(context.dtype),
            in_features=self.in_features,
            out_features=self.out_features,
            activation=activation,
            bias=bias,
        )
        self._num_sums = num_sums
        self._sum_over_ranks: AllReduce | None = None
        if split == "row" and self._place.world_size > 1:
            if activation is not None:
                raise ValueError(
                    "a layer whose input is split applies no activation: it sums over ranks first"
                )
            summed = KernelQuery(op="all_reduce", dtype=dtype_name(context.dtype), size=self.out_features)
            self._sum_over_ranks = context.kernels.all_reduce(summed)
        self._whole: Tensor | None = None
        self._pieces: list[Piece | None] = [None] * len(self._parts)
        self._bias: Tensor | None = None
        self._stored: dict[str, None] = {}
        self._to_come = len(self._parts) * (2 if bias else 1)
        self._run: LinearFn | None = None

    def slots(self) -> Iterator[Slot]:
        """A weight, and a bias if there is one, for each part; nothing where the weight is tied."""
        if self.tied:
            return
        at = 0
        for index, (name, sections) in enumerate(self._parts.items()):
            prefix = f"{name}." if name else ""
            part = Part(index, sections, at)
            rows = sum(section.whole for section in sections)
            yield Slot(
                f"{prefix}weight",
                self._stored_shape or (rows, self._columns.whole),
                partial(self._take, part),
                beside=bool(name),
                put_quantized=None if self._stored_shape else partial(self._take_quantized, part),
            )
            if self._has_bias:
                yield Slot(f"{prefix}bias", (rows,), partial(self._take_bias, part), beside=bool(name))
            at += part.length

    def _take(self, part: Part, tensor: Tensor) -> None:
        flat = part.rows_of(tensor.reshape(-1, self._columns.whole))
        form = self._target()
        self._note(tensor.dtype, form)
        if form is not None:  # all of a row is rounded, so that ranks have the codes that one has
            self._keep_integers(part, round_weight(flat, form))
        else:
            self._keep_floats(part, flat.narrow(1, self._columns.start, self.in_features))
        self._arrived()

    def _keep_floats(self, part: Part, flat: Tensor) -> None:
        dtype = self.storage(flat.dtype)
        if len(self._parts) == 1:
            self._pieces[part.index] = owned(flat, self._device, dtype)
            return
        self._pieces[part.index] = flat[:0]  # its rows are in the whole
        if self._whole is None:
            shape = (self.out_features, self.in_features)
            self._whole = torch.empty(shape, dtype=dtype, device=self._device)
        elif self._whole.dtype != dtype:  # parts of several dtypes
            self._whole = self._whole.to(self._dtype)
        self._whole.narrow(0, part.at, len(flat)).copy_(flat)

    def _take_quantized(self, part: Part, weight: QuantizedWeight) -> None:
        self._stored[str(weight.form)] = None
        mine = [weight.narrow(0, first, length) for first, length in part.ranges()]
        self._keep_integers(part, QuantizedWeight.stack(mine))
        self._arrived()

    def _keep_integers(self, part: Part, weight: QuantizedWeight) -> None:
        first, wide = self._columns.start, self.in_features
        if wide == self._columns.whole:
            self._pieces[part.index] = weight
        elif weight.order is not None or (first % 2 and weight.form.kind != "int8"):
            self._keep_floats(part, weight.dequantize(torch.float32).narrow(1, first, wide))
        else:
            self._pieces[part.index] = weight.narrow(1, first, wide)

    def _take_bias(self, part: Part, tensor: Tensor) -> None:
        if self._bias is None:
            self._bias = torch.empty(self.out_features, dtype=self._dtype, device=self._device)
        self._bias.narrow(0, part.at, part.length).copy_(part.rows_of(tensor))
        self._arrived()

    def _arrived(self) -> None:
        self._to_come -= 1
        if self._to_come == 0:
            self._finish(keep_weight=False)

    def adopt(self, weight: Tensor) -> None:
        """Use a weight that another layer keeps (a tied output head)."""
        form = self._target()
        self._note(weight.dtype, form)
        self._pieces = [weight if form is None else round_weight(weight, form)]
        self._finish(keep_weight=True)

    def rounded_to(self) -> WeightForm | None:
        """The form that weights of floats are rounded to in this layer; None: they are not."""
        if self._num_sums > 1:
            return None  # whoever wants shorter sums has numbers that rounding would spoil
        return self._rounding.decoder if self._few_rows else self._rounding.other

    def _note(self, dtype: torch.dtype, form: WeightForm | None) -> None:
        rounded = "" if form is None else f" rounded to {replace(form, round_activations=False)}"
        self._stored[f"{dtype_name(dtype)}{rounded}"] = None

    def _target(self) -> WeightForm | None:
        """The form that floats are rounded to: the one asked for, or the next best that the device reads.

        None: they stay floats, as none was asked for or the device reads none.
        """
        form = self.rounded_to()
        if form is None:
            return None
        usable = usable_forms(form, self._rounding)
        return next((form for form in usable if self._fits(form) and self._reads(form)), None)

    def _fits(self, form: WeightForm) -> bool:
        return self._columns.whole % (form.group_size or 1) == 0

    def _reads(self, form: WeightForm) -> bool:
        query = replace(self._query, op="prepare_quantized_linear", weight=form)
        return self._kernels.supports(query)

    def storage(self, stored: torch.dtype) -> torch.dtype:
        """What a weight of floats is kept in: as it is stored, where the device reads that losslessly."""
        if self._dtype != torch.float32 or stored not in (torch.float16, torch.bfloat16):
            return self._dtype
        taken = self._kernels.supports(replace(self._query, weight=_narrow_form(stored)))
        return stored if taken else self._dtype

    def _finish(self, *, keep_weight: bool) -> None:
        bias = self._bias
        if self._split == "row" and self._place.rank > 0:
            bias = None  # the sum over ranks must hold it once
        self._run = self._ready(bias, keep_weight=keep_weight)
        self._pieces = [None] * len(self._parts)
        self._whole = self._bias = None

    def _ready(self, bias: Tensor | None, *, keep_weight: bool) -> LinearFn:
        pieces = [piece for piece in self._pieces if piece is not None]
        quantized = [piece for piece in pieces if isinstance(piece, QuantizedWeight)]
        if not quantized:
            [weight] = pieces if self._whole is None else [self._whole]
            assert isinstance(weight, Tensor)
            return self._over_floats(weight, bias, keep_weight=keep_weight)
        if len(quantized) == len(pieces) and all(quantized[0].stacks_with(other) for other in quantized):
            return self._over_quantized(QuantizedWeight.stack(quantized), bias)
        runs, at = [], 0
        for piece, sections in zip(pieces, self._parts.values(), strict=True):
            count = sum(section.length for section in sections)
            part = None if bias is None else bias.narrow(0, at, count).clone()
            if isinstance(piece, QuantizedWeight):
                runs.append(self._over_quantized(piece, part))
            else:
                assert self._whole is not None, "several parts of floats stand in the whole"
                own = self._whole.narrow(0, at, count).clone()
                runs.append(self._over_floats(own, part, keep_weight=False))
            at += count
        return lambda x: torch.cat([run(x) for run in runs], dim=-1)

    def _over_floats(self, weight: Tensor, bias: Tensor | None, *, keep_weight: bool) -> LinearFn:
        form = None if weight.dtype == self._dtype else _narrow_form(weight.dtype)
        query = replace(self._query, out_features=len(weight), bias=bias is not None, weight=form)
        prepare = self._kernels.prepare_linear(query)
        if self._num_sums > 1 and self._dtype == torch.float32:  # in others, rounding each sum costs more
            assert self._activation is None, "an activation applies to the whole sum"
            prepare = in_shorter_sums(prepare, self._num_sums)
        self._kernels.count_weight(", ".join(self._stored), dtype_name(weight.dtype))
        return prepare(weight, bias, self._activation, keep_weight=keep_weight, few_rows=self._few_rows)

    def _over_quantized(self, weight: QuantizedWeight, bias: Tensor | None) -> LinearFn:
        query = replace(
            self._query, op="prepare_quantized_linear", out_features=weight.shape[0], bias=bias is not None
        )
        for form in usable_forms(weight.form, self._rounding):
            formed = replace(query, weight=form)
            if self._kernels.supports(formed):
                prepare = self._kernels.prepare_quantized_linear(formed)
                self._kernels.count_weight(", ".join(self._stored), str(form))
                put = in_form(weight, form).to(self._device)
                return prepare(put, bias, self._activation, keep_weight=False, few_rows=self._few_rows)
        floats = weight.dequantize(torch.float32).to(self._device, self._dtype)
        return self._over_floats(floats, bias, keep_weight=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        assert self._run is not None, "weights are not loaded"
        y = self._run(x)
        return y if self._sum_over_ranks is None else self._sum_over_ranks(y, self._place)


@dataclass(frozen=True)
class _Section:
    """A dimension of a stored tensor, and this rank's part of it."""

    whole: int
    start: int
    length: int


def _section(place: Parallel, unit: int, whole: int) -> _Section:
    return _Section(whole, *place.share(whole, unit))


class Part:
    """One of the tensors that a layer is fused from: its sections, and where its rows stand in the layer."""

    def __init__(self, index: int, sections: Sequence[_Section], at: int) -> None:
        self.index, self.sections, self.at = index, sections, at
        self.length = sum(section.length for section in sections)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """This rank's rows of the stored tensor; a view where they stand together."""
        if self.length == len(tensor):
            return tensor
        mine = [tensor.narrow(0, first, length) for first, length in self.ranges()]
        return mine[0] if len(mine) == 1 else torch.cat(mine)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Where this rank's rows begin in the stored tensor, and how many there are, section by section."""
        before = 0
        for section in self.sections:
            yield before + section.start, section.length
            before += section.whole


def _narrow_form(dtype: torch.dtype) -> WeightForm:
    return WeightForm(kind="float16" if dtype == torch.float16 else "bfloat16")


def in_shorter_sums(prepare: PrepareLinear, num_sums: int) -> PrepareLinear:
    """x @ W.T as the sum of ``num_sums`` products over equal parts of the input."""

    def prepared(
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None,
        *,
        keep_weight: bool,  # noqa: ARG001 (the parts are copies in any case)
        few_rows: bool = False,
    ) -> LinearFn:
        first, *others = (
            prepare(part.contiguous(), None if i else bias, activation, keep_weight=False, few_rows=few_rows)
            for i, part in enumerate(weight.chunk(num_sums, dim=1))
        )

        def linear(x: Tensor) -> Tensor:
            part, *rest = x.chunk(num_sums, dim=-1)
            y = first(part)
            for run, part in zip(others, rest, strict=True):
                y = y + run(part)
            return y

        return linear

    return prepared


class Embedding(Layer):
    """Token embeddings, multiplied by ``scale``; ``tied`` is an output head that shares the table.

    Only rank 0 keeps the table: there tokens are embedded.
    """

    def __init__(
        self, context: BuildContext, rows: int, width: int, *, tied: Linear | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self._shape, self._scale = (rows, width), scale
        self._dtype, self._device = context.dtype, context.device
        self._keeps = context.parallel.rank == 0
        self._share: Callable[[Tensor], None] | None = None
        self._storage: Callable[[torch.dtype], torch.dtype] | None = None
        if tied is not None:
            tied.tied = True
            self._share, self._storage = tied.adopt, tied.storage
        self.weight: Tensor | None = None

    def slots(self) -> Iterator[Slot]:
        """The table (V, H)."""
        yield Slot("weight", self._shape, self._put)

    def _put(self, tensor: Tensor) -> None:
        if self._keeps:
            dtype = self._dtype if self._storage is None else self._storage(tensor.dtype)
            tensor = self.weight = owned(tensor, self._device, dtype)
        if self._share is not None:
            self._share(tensor)

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 (T,) -> (T, H)."""
        assert self.weight is not None, "weights are not loaded"
        rows = self.weight.index_select(0, token_ids).to(self._dtype)
        return rows if self._scale == 1 else rows * self._scale

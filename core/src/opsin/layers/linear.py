"""Linear layers and token embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from opsin.api import Activation, BuildContext, KernelQuery, LinearFn, PrepareLinear
from opsin.layers.module import Layer, Slot, owned

Split = Literal["column", "row"]


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
        split: tensor parallelism: ``"column"`` splits the output, ``"row"`` the input (and sums over
            ranks); None: every rank has the whole layer.
        stored_shape: shape of the checkpoint's weight where it is not (out, in), e.g. that of a convolution
            whose stride equals its kernel.
        num_sums: in float32, compute the product as this many shorter sums over the input, which round
            less. Patch values are large and nearly equal; the norm that follows removes them but not their
            rounding error. Not with an activation.
        few_rows: whether the layer often sees single rows (a decoder's layer).

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
    ) -> None:
        super().__init__()
        self._parts = {"": out_features} if isinstance(out_features, int) else dict(out_features)
        self._rank, self._world = context.parallel.rank, context.parallel.world_size
        if split is None:
            self._world = 1
        self._split = split
        self._in, self._stored_shape = in_features, stored_shape
        self._dtype, self._device = context.dtype, context.device
        self._activation, self._has_bias, self._few_rows = activation, bias, few_rows
        out = sum(self._parts.values())
        self.in_features = in_features // (self._world if split == "row" else 1)
        self.out_features = out // (self._world if split == "column" else 1)
        self._prepare = context.kernels.prepare_linear(
            KernelQuery(
                op="prepare_linear",
                dtype=dtype_name(context.dtype),
                in_features=self.in_features,
                out_features=self.out_features,
                activation=activation,
                bias=bias,
            )
        )
        if num_sums > 1 and context.dtype == torch.float32:  # in other dtypes rounding each sum costs more
            assert activation is None, "an activation applies to the whole sum"
            self._prepare = in_shorter_sums(self._prepare, num_sums)
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._to_come = len(self._parts) * (2 if bias else 1)
        self._run: LinearFn | None = None

    def slots(self) -> Iterator[Slot]:
        """A weight, and a bias if there is one, for each part; nothing where the weight is tied."""
        if self.tied:
            return
        first = 0
        for name, rows in self._parts.items():
            prefix = f"{name}." if name else ""
            shape = self._stored_shape or (rows, self._in)
            yield Slot(f"{prefix}weight", shape, self._putter("_weight", first, rows), beside=bool(name))
            if self._has_bias:
                yield Slot(f"{prefix}bias", (rows,), self._putter("_bias", first, rows), beside=bool(name))
            first += rows

    def _putter(self, target: str, first: int, rows: int) -> Callable[[Tensor], None]:
        def put(tensor: Tensor) -> None:
            flat = tensor.reshape(rows, self._in) if target == "_weight" else tensor
            at, count = first, rows
            if self._split == "column" and self._world > 1:
                at, count = first // self._world, rows // self._world
                flat = flat.narrow(0, self._rank * count, count)
            if self._split == "row" and self._world > 1 and target == "_weight":
                flat = flat.narrow(1, self._rank * self.in_features, self.in_features)
            if len(self._parts) == 1:
                setattr(self, target, owned(flat, self._device, self._dtype))
            else:
                whole = getattr(self, target)
                if whole is None:
                    shape = (self.out_features, *flat.shape[1:])
                    whole = torch.empty(shape, dtype=self._dtype, device=self._device)
                    setattr(self, target, whole)
                whole.narrow(0, at, count).copy_(flat)
            self._to_come -= 1
            if self._to_come == 0:
                self._finish(keep_weight=False)

        return put

    def adopt(self, weight: Tensor) -> None:
        """Use a weight that another layer keeps (a tied output head)."""
        self._weight = weight
        self._finish(keep_weight=True)

    def _finish(self, *, keep_weight: bool) -> None:
        assert self._weight is not None
        bias = self._bias
        if self._split == "row" and self._rank > 0:
            bias = None  # the sum over ranks must hold it once
        self._run = self._prepare(
            self._weight, bias, self._activation, keep_weight=keep_weight, few_rows=self._few_rows
        )
        self._weight = self._bias = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        assert self._run is not None, "weights are not loaded"
        y = self._run(x)
        if self._split == "row" and self._world > 1:
            torch.distributed.all_reduce(y)
        return y


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
    """Token embeddings, multiplied by ``scale``; ``tied`` is an output head that shares the table."""

    def __init__(
        self, context: BuildContext, rows: int, width: int, *, tied: Linear | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self._shape, self._scale = (rows, width), scale
        self._dtype, self._device = context.dtype, context.device
        self._share: Callable[[Tensor], None] | None = None
        if tied is not None:
            tied.tied = True
            self._share = tied.adopt
        self.weight: Tensor | None = None

    def slots(self) -> Iterator[Slot]:
        """The table (V, H)."""
        yield Slot("weight", self._shape, self._put)

    def _put(self, tensor: Tensor) -> None:
        self.weight = owned(tensor, self._device, self._dtype)
        if self._share is not None:
            self._share(self.weight)

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 (T,) -> (T, H)."""
        assert self.weight is not None, "weights are not loaded"
        rows = self.weight.index_select(0, token_ids)
        return rows if self._scale == 1 else rows * self._scale

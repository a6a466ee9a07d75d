"""RMS norm and layer norm."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from opsin.api import BuildContext, KernelQuery
from opsin.layers.linear import dtype_name
from opsin.layers.module import Layer, Slot, owned


class Norm(Layer):
    """A norm's weight, and its bias if there is one."""

    def __init__(self, context: BuildContext, size: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self._size, self._eps = size, eps
        self._dtype, self._device = context.dtype, context.device
        self._has_bias = bias
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def slots(self) -> Iterator[Slot]:
        """Weight and bias (size,)."""
        yield Slot("weight", (self._size,), lambda tensor: setattr(self, "weight", self._own(tensor)))
        if self._has_bias:
            yield Slot("bias", (self._size,), lambda tensor: setattr(self, "bias", self._own(tensor)))

    def _own(self, tensor: Tensor) -> Tensor:
        return owned(tensor, self._device, self._dtype)


class RMSNorm(Norm):
    """Root-mean-square norm with an optional residual added first."""

    def __init__(self, context: BuildContext, size: int, eps: float) -> None:
        super().__init__(context, size, eps, bias=False)
        query = KernelQuery(op="rms_norm", dtype=dtype_name(context.dtype), size=size)
        self._kernel = context.kernels.rms_norm(query)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (T, size) -> (norm(x + residual), x + residual)."""
        assert self.weight is not None, "weights are not loaded"
        return self._kernel(x, self.weight, self._eps, residual)


class LayerNorm(Norm):
    """Layer norm."""

    def __init__(self, context: BuildContext, size: int, eps: float, *, bias: bool = True) -> None:
        super().__init__(context, size, eps, bias=bias)
        query = KernelQuery(op="layer_norm", dtype=dtype_name(context.dtype), size=size, bias=bias)
        self._kernel = context.kernels.layer_norm(query)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> the same shape."""
        assert self.weight is not None, "weights are not loaded"
        return self._kernel(x, self.weight, self.bias, self._eps)

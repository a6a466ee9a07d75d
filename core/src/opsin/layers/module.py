"""What layers are: modules with typed calls; those that take weights declare them as slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from opsin.api import QuantizedWeight

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class _Forward(Protocol[P, R]):
    def forward(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


class Module(nn.Module):
    """An ``nn.Module`` whose call has the type of its ``forward``; torch declares every call as ``Any``."""

    if TYPE_CHECKING:

        def __call__(self: _Forward[P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...


@dataclass(frozen=True)
class Slot:
    """One checkpoint tensor a layer takes.

    Attributes:
        name: key, relative to the layer (``"weight"``) or to its parent (``"q_proj.weight"``).
        shape: full shape in the checkpoint.
        put: takes the tensor (any dtype, host memory); called once.
        beside: whether the name is relative to the layer's parent.
        optional: whether a checkpoint may go without.
        put_quantized: takes a weight in integers instead, called once in place of ``put``; None: the slot
            takes floats only, and gets those that the integers stand for. Since 1.2.
    """

    name: str
    shape: tuple[int, ...]
    put: Callable[[Tensor], None]
    beside: bool = False
    optional: bool = False
    put_quantized: Callable[[QuantizedWeight], None] | None = None


class Layer(Module):
    """A module that takes weights."""

    def slots(self) -> Iterator[Slot]:
        """The checkpoint tensors this layer takes."""
        raise AssertionError(f"{type(self).__name__} declares no slots")


def owned(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """A contiguous copy. What a layer keeps must not be a view: it would hold the whole mapped file."""
    return tensor.to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)

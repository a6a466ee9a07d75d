"""One case of the kernels' contract, and the bench on which it is tried."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opsin.api import Device, KernelQuery
from opsin.kernels import Kernels

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error, relative to the largest magnitude of the expected result."""


@dataclass(frozen=True)
class KernelCase:
    """One thing a kernel must do. Its string is its name, stable across runs."""

    name: str
    query: KernelQuery
    check: Callable[[Bench], None] = field(repr=False)

    def __str__(self) -> str:
        return self.name


class Bench:
    """A device under test, with inputs that depend on the case's name only.

    Attributes:
        worst: the largest error so far, as a share of the allowed one.
    """

    def __init__(self, case: KernelCase, device: Device, kernels: Kernels) -> None:
        self.device, self.kernels, self.query = device, kernels, case.query
        self.dtype: torch.dtype = getattr(torch, case.query.dtype)
        self.worst = 0.0
        self._generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers that the run dtype holds exactly, as float32 on the host."""
        drawn = torch.randn(shape, generator=self._generator) * scale
        return drawn.to(self.dtype).float()

    def shuffled(self, count: int) -> list[int]:
        """0 .. count - 1 in some order."""
        order: list[int] = torch.randperm(count, generator=self._generator).tolist()
        return order

    def put(self, x: Tensor) -> Tensor:
        """A compact copy on the device, in the run dtype."""
        return x.to(self.dtype, copy=True).to(self.device.torch_device)

    def fused(self, *parts: Tensor) -> list[Tensor]:
        """(T, heads, D) tensors on the device as a fused projection leaves them: views into its rows."""
        rows = self.put(torch.cat([part.flatten(1) for part in parts], dim=-1))
        sizes = [part.shape[1] * part.shape[2] for part in parts]
        views = rows.split(sizes, dim=-1)
        return [view.unflatten(-1, part.shape[1:]) for view, part in zip(views, parts)]

    def compare(self, got: Tensor, expected: Tensor, what: str) -> None:
        """Compare ``got``, on the device in the run dtype, with ``expected``, float32 on the host.

        Raises:
            AssertionError: they differ; ``what`` names them in the message.
        """
        assert got.dtype == self.dtype, f"{what}: got {got.dtype}, expected {self.dtype}"
        assert got.shape == expected.shape, (
            f"{what}: got {tuple(got.shape)}, expected {tuple(expected.shape)}"
        )
        largest = expected.abs().max().item() if expected.numel() else 0.0
        limit = TOLERANCE[self.dtype] * max(1.0, largest)
        given = got.to("cpu").float()
        torch.testing.assert_close(given, expected, rtol=0.0, atol=limit, msg=lambda text: f"{what}: {text}")
        if expected.numel():
            self.worst = max(self.worst, (given - expected).abs().max().item() / limit)

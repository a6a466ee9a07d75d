"""What an engine asks of torch itself on a device, beyond the op table: small cases against the host.

`opsin doctor --selftest` runs them; a device plugin's tests may.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opsin.api import Device

_POSITIONS = (1.0, 1_000.0, 30_000.0)
"""Of long contexts: the angle of the fastest frequency is the position itself."""

_ANGLE_ERROR = 2e-3
"""Of a sine or cosine: a step of float16 just below 1 is 5e-4."""


@dataclass(frozen=True)
class TorchCase:
    """One thing that torch must do on a device. Its string is its name."""

    name: str
    check: Callable[[str], None] = field(repr=False)

    def __str__(self) -> str:
        return self.name


def torch_cases() -> list[TorchCase]:
    """All cases."""
    return [
        TorchCase("rows of a table, by int32 and int64", _rows),
        TorchCase("rows put into their places", _put),
        TorchCase("sine and cosine up to position 30,000", _angles),
        TorchCase("the largest of a row: NaN counts, of equals the first", _largest),
        TorchCase("the largest of a row by name of their places", _top_k),
        TorchCase("logsumexp of large numbers", _logsumexp),
        TorchCase("small integers to float and back", _integers),
    ]


def check_torch(case: TorchCase, device: Device) -> None:
    """Run one case.

    Raises:
        AssertionError: the result is wrong; the message says how.
    """
    with torch.inference_mode():
        case.check(device.torch_device)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def _same(got: Tensor, expected: Tensor, what: str, atol: float = 0.0) -> None:
    torch.testing.assert_close(
        got.to("cpu"), expected, rtol=0, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def _rows(device: str) -> None:
    table, wanted = _draw(50, 8).half(), [3, 49, 0, 3]
    for dtype in (torch.int32, torch.int64):
        got = table.to(device).index_select(0, torch.tensor(wanted, dtype=dtype).to(device))
        _same(got, table[wanted], f"rows by {dtype}")


def _put(device: str) -> None:
    x, new, rows = _draw(9, 4).half(), _draw(3, 4).half(), torch.tensor([8, 0, 5])
    there = x.to(device)
    there[rows.to(device)] = new.to(device)
    x[rows] = new
    _same(there, x, "index_put")


def _angles(device: str) -> None:
    inverse = 10_000.0 ** -(torch.arange(32) / 32)
    angles = torch.tensor(_POSITIONS)[:, None] * inverse
    for name, function in (("cos", torch.cos), ("sin", torch.sin)):
        got, expected = function(angles.to(device)), function(angles)
        for position, row, wanted in zip(_POSITIONS, got, expected):
            _same(row, wanted, f"{name} at position {position:,.0f}", _ANGLE_ERROR)


def _largest(device: str) -> None:
    x = torch.tensor([[1.0, math.nan, 5.0], [2.0, 7.0, 7.0], [-math.inf, -1.0, -2.0]])
    for dtype in (torch.float32, torch.float16):
        values, ids = x.to(dtype).to(device).max(-1)
        _same(values.float(), torch.tensor([math.nan, 7.0, -1.0]), f"largest in {dtype}")
        _same(ids.long(), torch.tensor([1, 1, 1]), f"where the largest is in {dtype}")


def _top_k(device: str) -> None:
    x = torch.randperm(3 * 400, generator=torch.Generator().manual_seed(3)).view(3, 400).float()
    values, ids = x.to(device).topk(20, dim=-1)
    expected = x.topk(20, dim=-1)
    _same(values, expected.values, "topk")
    _same(ids.long(), expected.indices, "where they are")


def _logsumexp(device: str) -> None:
    x = _draw(4, 300) * 30
    _same(x.to(device).logsumexp(-1), x.logsumexp(-1), "logsumexp", 1e-2)


def _integers(device: str) -> None:
    numbers = torch.tensor([0, 1, 127, 4_095, 65_535, 1_000_000], dtype=torch.int32)
    _same(numbers.to(device).float(), numbers.float(), "to float")
    _same(numbers.to(device).long(), numbers.long(), "to int64")

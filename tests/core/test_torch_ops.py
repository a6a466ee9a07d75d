"""What the engine asks of torch on a device: the cases hold on the host, and bite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opsin.plugins import load_plugins
from opsin.testing.torch_ops import TorchCase, check_torch, torch_cases


def cpu() -> Any:
    plugins = load_plugins()
    spec, index, _ = plugins.select_device("cpu")
    return plugins.open_device(spec, index)


@pytest.mark.parametrize("case", torch_cases(), ids=str)
def test_the_host_is_right(case: TorchCase) -> None:
    check_torch(case, cpu())


def wrong_cos(x: Tensor) -> Tensor:
    """No range reduction: as if the angle were in float16."""
    return x.half().float().cos()


def no_nan(self: Tensor, *args: Any, **named: Any) -> Any:
    return torch.max(torch.nan_to_num(self, nan=-1e30), *args, **named)


@pytest.mark.parametrize(
    ("name", "target", "broken"),
    [
        ("sine and cosine", "torch.cos", wrong_cos),
        ("the largest of a row: NaN", "torch.Tensor.max", no_nan),
        ("logsumexp", "torch.Tensor.logsumexp", lambda x, dim: x.exp().sum(dim).log() + 0.1),
    ],
)
def test_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch, name: str, target: str, broken: Any) -> None:
    [case] = [case for case in torch_cases() if str(case).startswith(name)]
    if target == "torch.cos":  # the case compares a function with itself, on two devices
        right = torch.cos
        calls = iter([broken, right])
        broken = lambda x: next(calls)(x)  # noqa: E731
    elif target != "torch.Tensor.max":
        right_sum = torch.Tensor.logsumexp
        turns = iter([broken, right_sum])
        broken = lambda x, dim: next(turns)(x, dim)  # noqa: E731
    monkeypatch.setattr(target, broken)
    with pytest.raises(AssertionError):
        check_torch(case, cpu())

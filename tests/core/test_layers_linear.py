"""`opsin.layers.Linear` as a sum of shorter sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opsin.api import BuildContext
from opsin.kernels import Kernels
from opsin.layers import Linear


def loaded(weight: Tensor, bias: Tensor, num_sums: int) -> Linear:
    context = BuildContext(config={}, kernels=Kernels(), dtype=weight.dtype)
    layer = Linear(context, weight.shape[1], weight.shape[0], bias=True, num_sums=num_sums)
    for slot, tensor in zip(layer.slots(), (weight, bias), strict=True):
        assert slot.shape == tuple(tensor.shape)
        slot.put(tensor)
    return layer


@pytest.mark.parametrize("num_sums", [2, 3, 12])
def test_a_product_is_the_sum_of_its_parts(num_sums: int) -> None:
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, 588, generator=random), torch.randn(32, generator=random)
    x = torch.randn(500, 588, generator=random)
    first, *rest = zip(x.chunk(num_sums, 1), weight.chunk(num_sums, 1), strict=True)
    expected = torch.nn.functional.linear(first[0], first[1].contiguous(), bias)
    for part, columns in rest:
        expected = expected + part @ columns.T.contiguous()
    given = loaded(weight, bias, num_sums)(x)
    assert float((given - expected).norm() / expected.norm()) < 1e-6
    exact = x.double() @ weight.double().T + bias
    assert float((given - exact).norm() / exact.norm()) < 1e-6


def test_types_that_round_every_result_are_summed_at_once() -> None:
    random = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=random).bfloat16() for shape in ((8, 60), (8,), (5, 60)))
    assert torch.equal(loaded(weight, bias, 3)(x), loaded(weight, bias, 1)(x))

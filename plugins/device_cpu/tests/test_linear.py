"""Every way a linear layer may be multiplied, and when a float16 copy is made."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from opsin_device_cpu import half, linear
from opsin_device_cpu.half import Float16Copies, float16_exponent
from opsin_device_cpu.linear import (
    MAX_FEW_BFLOAT16_ROWS,
    MAX_FEW_ROWS,
    PACK_MIN_BYTES,
    LinearPreparer,
    onednn_takes_bfloat16,
)

OUT, IN = 704, 768  # more than PACK_MIN_BYTES in both dtypes, and no power of two
PLENTY = 2**30
INSTRUCTIONS = (False, True) if onednn_takes_bfloat16() else (False,)
"""Ways that this processor allows: with AVX2 alone oneDNN packs and multiplies no bfloat16."""


def random_weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)) * IN**-0.5


@pytest.mark.parametrize(
    ("dtype", "coarse", "copy_bytes", "instructions", "keep", "rows"),
    list(
        itertools.product(
            (torch.float32, torch.bfloat16),
            (False, True),
            (0, PLENTY),
            INSTRUCTIONS,
            (False, True),
            (1, 3, 5, MAX_FEW_ROWS, MAX_FEW_ROWS + 1, 70, MAX_FEW_BFLOAT16_ROWS + 1),
        )
    ),
)
def test_all_ways_agree(
    dtype: torch.dtype, coarse: bool, copy_bytes: int, instructions: bool, keep: bool, rows: int
) -> None:
    weight = random_weight()
    weight = (weight.bfloat16() if coarse else weight).to(dtype)
    assert weight.nbytes >= PACK_MIN_BYTES
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, IN, generator=generator).to(dtype)
    bias = torch.randn(OUT, generator=generator).to(dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    prepare = LinearPreparer(Float16Copies(copy_bytes, 1), bfloat16_instructions=instructions)
    got = prepare(weight, bias, None, keep_weight=keep, few_rows=True)(x)
    assert got.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 2**-8  # half a unit in the last place
    torch.testing.assert_close(got.double(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("rows", [1, 3, 4, 70])
def test_bfloat16_where_onednn_has_none(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """What a processor with AVX2 alone does, on any: oneDNN is not called."""
    monkeypatch.setattr(linear, "onednn_takes_bfloat16", lambda: False)
    monkeypatch.setattr(linear, "_onednn", lambda *_: pytest.fail("oneDNN was called"))
    weight, x = random_weight().bfloat16(), torch.randn(rows, IN).bfloat16()
    prepare = LinearPreparer(Float16Copies(0, 1), bfloat16_instructions=False)
    got = prepare(weight, None, None, keep_weight=True, few_rows=False)(x)
    torch.testing.assert_close(got.double(), F.linear(x.double(), weight.double()), rtol=2**-8, atol=2**-8)


def test_a_copy_is_made_only_without_loss_and_within_the_budget() -> None:
    def copies(weight: torch.Tensor, budget: int) -> int:
        preparer = LinearPreparer(Float16Copies(budget, 2), bfloat16_instructions=False)
        for _ in range(3):
            preparer(weight, None, None, keep_weight=False, few_rows=True)
        return (budget - preparer.copies.bytes_left) // (2 * weight.numel())

    coarse = random_weight().bfloat16().float()
    assert copies(coarse, PLENTY) == 3
    assert copies(coarse, 2 * OUT * IN * 2 + 1) == 2
    assert copies(coarse, 0) == 0
    assert copies(random_weight(), PLENTY) == 0
    assert copies(coarse[:64], PLENTY) == 0  # small: as it is


def test_no_copy_without_need() -> None:
    copies = Float16Copies(PLENTY, 1)
    coarse = random_weight().bfloat16()
    for instructions in INSTRUCTIONS:
        preparer = LinearPreparer(copies, bfloat16_instructions=instructions)
        preparer(coarse.float(), None, None, keep_weight=False, few_rows=False)
    if True in INSTRUCTIONS:
        preparer(coarse, None, None, keep_weight=False, few_rows=True)  # reads two bytes a weight as it is
    assert copies.bytes_left == PLENTY


def test_a_weight_with_many_rows_is_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "PART_ELEMENTS", 100 * IN)
    weight = random_weight().bfloat16().float()
    bias, x = torch.arange(OUT).float(), torch.randn(2, 3, IN)
    copy = Float16Copies(PLENTY, 2).linear(weight, bias)
    assert copy is not None
    torch.testing.assert_close(copy(x), F.linear(x, weight, bias))
    torch.testing.assert_close(copy(x[0, 0]), F.linear(x[0, 0], weight, bias))


@pytest.mark.parametrize("largest", [1e-20, 0.3, 1.0, 70_000.0, 1e30])
def test_bfloat16_numbers_fit_float16_after_scaling(largest: float) -> None:
    weight = (random_weight().clamp(-1, 1) * largest).bfloat16().float()
    exponent = float16_exponent(weight)
    assert exponent is not None
    back = torch.ldexp(torch.ldexp(weight, torch.tensor(exponent)).half().float(), torch.tensor(-exponent))
    assert (back - weight).abs().max() <= weight.abs().max() * 2**-30


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([[1.0, 1.0 + 2**-12]]),
        torch.tensor([[0.0, 0.0]]),
        torch.tensor([[1.0, float("inf")]]),
        torch.tensor([[1.0, float("nan")]]),
    ],
    ids=["too fine", "zero", "infinite", "not a number"],
)
def test_other_numbers_do_not(weight: torch.Tensor) -> None:
    assert float16_exponent(weight) is None

"""The op table's contract, on the CPU's kernels."""

from __future__ import annotations

import pytest

from opsin.api import WeightForm
from opsin.testing.kernels import WEIGHT_FORMS, KernelCase, check_kernel, formed_linears, kernel_cases
from opsin_device_cpu.device import open_device
from opsin_device_cpu.plugin import opsin_register_kernels

DEVICE = open_device(0)

NARROW = ("float16", "bfloat16")


@pytest.mark.parametrize("case", kernel_cases(DEVICE.capabilities.dtypes, later_ops=True), ids=str)
def test_kernel(case: KernelCase) -> None:
    assert check_kernel(case, DEVICE, opsin_register_kernels()).provider == "cpu"


ROWS = WeightForm(kind="int8", round_activations=True)
EXACT = [form for form in WEIGHT_FORMS if form.kind not in NARROW and not form.round_activations]
FORMED = [
    case
    for dtype in DEVICE.capabilities.dtypes
    for form in (ROWS, *EXACT)
    for case in formed_linears(form, dtype)
]
"""What torch alone serves: all forms exactly, and the integer product where rounding is allowed."""


@pytest.mark.parametrize("case", FORMED, ids=str)
def test_weights_of_fewer_bits(case: KernelCase) -> None:
    assert check_kernel(case, DEVICE, opsin_register_kernels()).provider == "cpu"

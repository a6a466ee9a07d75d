"""The op table's contract, on the CPU's kernels."""

from __future__ import annotations

import pytest

from opsin.testing.kernels import KernelCase, check_kernel, kernel_cases
from opsin_device_cpu.device import open_device
from opsin_device_cpu.plugin import opsin_register_kernels

DEVICE = open_device(0)


@pytest.mark.parametrize("case", kernel_cases(DEVICE.capabilities.dtypes, later_ops=True), ids=str)
def test_kernel(case: KernelCase) -> None:
    assert check_kernel(case, DEVICE, opsin_register_kernels()).provider == "cpu"

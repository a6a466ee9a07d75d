"""The op table's contract on the vendor's kernels: the very suite that the CPU's kernels pass."""

from __future__ import annotations

import pytest

from opsin.testing.kernels import KernelCase, check_kernel, kernel_cases
from opsin_device_mlu.device import open_device
from opsin_device_mlu.plugin import opsin_register_kernels
from tests.mlu.conftest import NEW, OLD
from tests.mlu_sim import CARD, use_ops

CASES = kernel_cases(("float16", "float32"))

CHANGED = ("rotary", "paged_attention", "dense_attention")
"""Ops whose functions differ between the generations in more than their names' ends."""

RUNS = [(OLD, case) for case in CASES]
RUNS += [(NEW, case) for case in CASES if case.query.op in CHANGED and "scattered" not in case.name]


def expected_provider(case: KernelCase) -> str:
    """The vendor's gates are SiLU and GELU; all else is served."""
    declined = case.query.op == "gated_act" and case.query.activation in ("gelu_tanh", "quick_gelu")
    return "reference" if declined else "mlu"


@pytest.mark.parametrize(("version", "case"), RUNS, ids=str)
def test_kernel(version: str, case: KernelCase) -> None:
    use_ops(version)
    provider = check_kernel(case, open_device(0), opsin_register_kernels()).provider
    assert provider == expected_provider(case)
    assert any(name.startswith("tmo::") for name in CARD.trace) == (provider == "mlu" and _has_rows(case))


def _has_rows(case: KernelCase) -> bool:
    """A linear layer answers a batch of no rows by itself."""
    return not (case.query.op == "prepare_linear" and "-0x" in case.name)

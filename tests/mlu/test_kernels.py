"""The op table's contract on the vendor's kernels: the very suite that the CPU's kernels pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from opsin.testing.kernels import KernelCase, check_kernel, kernel_cases
from opsin_device_mlu.device import open_device
from opsin_device_mlu.plugin import opsin_register_kernels
from tests.mlu.conftest import NEW, OLD
from tests.mlu_sim import CARD, SWITCHES, use_ops

CASES = kernel_cases(("float16", "float32"))

CHANGED = ("rotary", "paged_attention", "dense_attention")
"""Ops whose functions differ between the generations in more than their names' ends."""

HALVES_ONLY = ("rms_norm", "layer_norm", "rotary", "plan_attention", "write_kv", "paged_attention")
"""The manual of 1.3.2 lists no float32 for their functions."""


def runs() -> Iterator[Any]:
    """The manual's generation whole; of the later one and of what runs on the reference, some."""
    for number, case in enumerate(CASES):
        on_reference = case.query.op in HALVES_ONLY and case.query.dtype == "float32"
        marks = [pytest.mark.slow] if on_reference and number % 10 else []
        yield pytest.param(OLD, case, marks=marks, id=f"{OLD}-{case}")
    later = [case for case in CASES if case.query.op in CHANGED and "scattered" not in case.name]
    for number, case in enumerate(later):
        yield pytest.param(NEW, case, marks=[pytest.mark.slow] if number % 8 else [], id=f"{NEW}-{case}")


def expected_provider(case: KernelCase) -> str:
    """An exact GELU is no approximate one; float32 goes where the manual has it."""
    declined = case.query.op == "gated_act" and case.query.activation == "gelu_tanh"
    declined |= case.query.op in HALVES_ONLY and case.query.dtype == "float32"
    return "reference" if declined else "mlu"


@pytest.mark.parametrize(("version", "case"), list(runs()))
def test_kernel(version: str, case: KernelCase) -> None:
    use_ops(version)
    device, specs = open_device(0), opsin_register_kernels()
    [spec] = [spec for spec in specs if spec.op == case.query.op]
    spec.supports(case.query)  # tried before the trace begins
    with CARD.recorded() as trace:
        provider = check_kernel(case, device, specs).provider
    assert provider == expected_provider(case)
    assert any(name.startswith("tmo::") for name in trace) == (provider == "mlu" and _has_rows(case))


@pytest.mark.parametrize("case", kernel_cases(("bfloat16",))[::5], ids=str)
def test_a_later_card_has_bfloat16(case: KernelCase) -> None:
    with CARD.changed(major=5, name="MLU590"):
        outcome = check_kernel(case, open_device(0), opsin_register_kernels())
        assert outcome.provider == expected_provider(case)


@pytest.mark.parametrize(
    "case", [case for case in kernel_cases(("float32",)) if case.query.op in HALVES_ONLY][::5], ids=str
)
def test_float32_where_the_card_has_it_and_the_manual_does_not(
    case: KernelCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSIN_MLU_FLOAT32", "1")
    with SWITCHES.changed(float32="right"):
        assert check_kernel(case, open_device(0), opsin_register_kernels()).provider == "mlu"
    use_ops(OLD)
    monkeypatch.setenv("OPSIN_MLU_GRAPHS", "1")  # what was measured above is not of this card
    assert check_kernel(case, open_device(0), opsin_register_kernels()).provider == "reference"


def _has_rows(case: KernelCase) -> bool:
    """A linear layer answers a batch of no rows by itself."""
    return not (case.query.op == "prepare_linear" and "-0x" in case.name)

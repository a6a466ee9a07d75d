"""``opsin doctor`` beside a simulated card, as a person would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opsin.cli.doctor import examine
from opsin.testing import kernels as contract
from tests.mlu_sim import SWITCHES

ROOT = Path(__file__).parents[2]
KEPT = ("rms_norm-float16-2x96", "rotary-float16-2x8", "paged_attention-float16-8:2x128-mixed")


@pytest.fixture
def _few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are run in test_kernels.py."""
    every = contract.kernel_cases

    def some(dtypes: Any, **options: Any) -> list[contract.KernelCase]:
        return [case for case in every(dtypes, **options) if case.name.startswith(KEPT)]

    monkeypatch.setattr("opsin.cli.doctor.selftest.kernel_cases", some)


@pytest.mark.usefixtures("_few_cases")
def test_the_self_test_passes() -> None:
    report = examine("mlu:0", selftest=True)
    assert report["advice"] == []
    assert report["opened"]["card"] == "MLU370-S4, capability 3.7"
    results = {result["op"]: result for result in report["selftest"]}
    nan = "paged_attention, NaN in unwritten slots"
    assert set(results) == {"rms_norm", "rotary", "paged_attention", nan, "torch"}
    assert all(result["on_device"] == result["cases"] > 0 for result in results.values())
    assert all(0 < result["worst"] < 1 for op, result in results.items() if op != "torch")


@pytest.mark.usefixtures("_few_cases")
def test_whole_blocks_that_are_loaded_are_no_fault() -> None:
    """The cache begins with zeros; where NaN gets through is told apart."""
    with SWITCHES.changed(tail="loaded"):
        report = examine("mlu:0", selftest=True)
    assert report["advice"] == []
    results = {result["op"]: result for result in report["selftest"]}
    assert not results["paged_attention"]["failures"]
    assert results["paged_attention, NaN in unwritten slots"]["failures"]


@pytest.mark.usefixtures("_few_cases")
def test_a_wrong_kernel_fails_visibly() -> None:
    import torch_mlu_ops

    right = torch_mlu_ops.apply_rotary

    def apply_rotary(
        input: Any,
        sin_cache: Any,
        cos_cache: Any,
        position_ids: Any,
        cu_seqlens: Any,
        interleaved: bool,
        discrete: bool,
        dynamic_ntk: bool,
        max_seqlen: int,
    ) -> Any:
        """Cosines and sines exchanged."""
        return right(
            input,
            cos_cache,
            sin_cache,
            position_ids,
            cu_seqlens,
            interleaved,
            discrete,
            dynamic_ntk,
            max_seqlen,
        )

    torch_mlu_ops.apply_rotary = apply_rotary
    report = examine("mlu", selftest=True)
    [line] = report["advice"]
    assert line.startswith("rotary in float16 is not used: tried by the names of its arguments")
    assert "rotated queries: off by" in line
    results = {result["op"]: result for result in report["selftest"] if result["dtype"] == "float16"}
    assert results["rotary"]["on_reference"] == results["rotary"]["cases"]
    assert results["rms_norm"]["on_device"] == results["rms_norm"]["cases"]


@pytest.mark.usefixtures("_few_cases")
def test_a_kernel_that_is_wrong_where_it_was_not_tried_fails_visibly() -> None:
    """The small case is right; the contract's cases are many."""
    import torch_mlu_ops

    right = torch_mlu_ops.fused_rms_norm

    def fused_rms_norm(x: Any, *others: Any, **named: Any) -> Any:
        result = right(x, *others, **named)
        return result * 2 if x.shape[-1] == 96 and not isinstance(result, tuple) else result

    torch_mlu_ops.fused_rms_norm = fused_rms_norm
    report = examine("mlu", selftest=True)
    [line] = report["advice"]
    assert line.startswith("self-test: rms_norm in float16 failed")


def test_the_command_itself() -> None:
    command = [sys.executable, "-m", "tests.mlu_sim", "--ops", "1.8.0", "--devices", "2", "-m"]
    done = subprocess.run(
        [*command, "opsin", "doctor", "--json", "--device", "mlu:1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    [mlu] = [device for device in report["devices"] if device["name"] == "mlu"]
    assert mlu["reason"] == "2 × MLU370-S4, torch_mlu_ops 1.8.0"
    assert report["opened"]["torch device"] == "mlu:1"
    assert "windows -1 for none" in report["opened"]["  paged_attention 64 decoding in float16"]

"""``opsin doctor --selftest`` and ``--model``: kernels and checkpoints against their contracts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from opsin.api import Device, KernelSpec
from opsin.plugins import Plugins
from opsin.testing.kernels import NAN_CASE, WEIGHT_FORMS, check_kernel, kernel_cases
from opsin.testing.torch_ops import check_torch, torch_cases

_NAN = ", NaN in unwritten slots"
"""No fault of a device: a cache begins with zeros. Where these fail, numbers that are not finite (an overflow
in float16) outlive the request that made them, in the slots beside those of a later one."""

_TORCH_OP = "torch"
_BETWEEN_RANKS = ("all_reduce", "all_gather")


@dataclass
class OpResult:
    """What came of the cases of one op in one dtype.

    Attributes:
        op, dtype: of the cases.
        cases: how many there are.
        on_device: served by a kernel of the device.
        on_reference: declined by the device, served by the reference (on the device too).
        worst: largest error of a case, as a share of the allowed one; of the cases that passed.
        failures: case -> what was wrong.
    """

    op: str
    dtype: str
    cases: int = 0
    on_device: int = 0
    on_reference: int = 0
    worst: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)


def selftest(device: Device, specs: Sequence[KernelSpec]) -> list[dict[str, Any]]:
    """Run all kernel cases for the device's dtypes, and what is asked of torch itself.

    Shows progress on a terminal; never raises for a case.
    """
    results: dict[tuple[str, str], OpResult] = {}
    cases = kernel_cases(device.capabilities.dtypes, later_ops=True, weights=WEIGHT_FORMS)
    if device.capabilities.communication != "gloo":  # ranks of these cases are threads of one process
        cases = [case for case in cases if case.query.op not in _BETWEEN_RANKS]
    for case in tqdm(cases, desc="self-test", unit="case", disable=None):
        op, dtype = str(case.query.op), case.query.dtype
        if case.name.endswith(NAN_CASE):
            op += _NAN
        result = results.setdefault((op, dtype), OpResult(op, dtype))
        result.cases += 1
        try:
            outcome = check_kernel(case, device, specs)
        except Exception as error:  # a wrong result, or whatever a vendor's kernel raises
            result.failures[str(case)] = f"{type(error).__name__}: {error}"
            continue
        result.on_device += outcome.provider != "reference"
        result.on_reference += outcome.provider == "reference"
        result.worst = max(result.worst, outcome.worst)
    ours = results[_TORCH_OP, "any"] = OpResult(_TORCH_OP, "any")
    for asked in torch_cases():
        ours.cases += 1
        try:
            check_torch(asked, device)
            ours.on_device += 1
        except Exception as error:
            ours.failures[str(asked)] = f"{type(error).__name__}: {error}"
    return [asdict(result) for result in results.values()]


def advice(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each op that failed."""
    lines = []
    for result in results:
        if result["failures"] and not result["op"].endswith(_NAN):
            case, text = next(iter(result["failures"].items()))
            lines.append(
                f"self-test: {result['op']} in {result['dtype']} failed {len(result['failures'])} of "
                f"{result['cases']} cases; first {case}: {' '.join(text.split())[:300]}"
            )
    return lines


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For the table: op, dtype, cases, device, reference, failed, worst error."""
    return [
        [
            result["op"],
            result["dtype"],
            *(str(result[name]) for name in ("cases", "on_device", "on_reference")),
            str(len(result["failures"])),
            f"{result['worst']:.0%} of the allowed",
        ]
        for result in results
    ]


def check_checkpoint(model: str, plugins: Plugins, device: str) -> list[dict[str, str]]:
    """The quick part of the contract of models, on a user's checkpoint.

    Ready-made embeddings are left out: families take them in layouts of their own.

    Raises:
        OpsinError: the checkpoint cannot be loaded on the device.
    """
    from opsin.testing.models import CheckFailed, ModelUnderTest, check_model, model_checks

    results = []
    under_test = ModelUnderTest(model, plugins=plugins, device=device, takes_embeds=False, num_requests=8)
    with under_test as subject:
        _ = subject.llm  # what keeps it from being loaded is no failed check
        for check in tqdm(model_checks(quick=True), desc="checks", unit="check", disable=None):
            try:
                outcome = check_model(check, subject)
            except CheckFailed as failure:
                results.append({"check": check.name, "result": "failed", "detail": str(failure)})
                continue
            result = "passed" if outcome.applies else "does not apply"
            results.append({"check": check.name, "result": result, "detail": outcome.detail})
    return results


def failed_checks(model: str, results: Sequence[Mapping[str, str]]) -> list[str]:
    """One line for each check that failed."""
    return [f"{model}: {r['check']}: {r['detail']}" for r in results if r["result"] == "failed"]

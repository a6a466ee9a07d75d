"""On a machine without a card: what the probe says, and what asking for the device says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from opsin.api import KernelQuery
from opsin_device_mlu.device import open_device, probe
from opsin_device_mlu.plugin import opsin_register_devices, opsin_register_kernels


def test_torch_mlu_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlu", None)  # as if, on a machine that has it too
    found = probe()
    assert (found.score, found.reason) == (0, "torch_mlu is not installed")
    assert "docs/devices/mlu370.md" in found.next_step
    with pytest.raises(ValueError, match='device "mlu:0": torch_mlu is not installed'):
        open_device(0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("raise OSError('libcndev.so: cannot open shared object file')", "OSError: libcndev.so"),
        ("import torch_mlu._MLUC", "ModuleNotFoundError: No module named 'torch_mlu._MLUC'"),
        ("raise SystemError('built for torch 2.4')", "SystemError: built for torch 2.4"),
    ],
)
def test_torch_mlu_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, reason: str
) -> None:
    (tmp_path / "torch_mlu").mkdir()
    (tmp_path / "torch_mlu" / "__init__.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    found = probe()
    assert found.score == 0
    assert reason in found.reason
    assert "cnmon" in found.next_step


def test_registering_imports_nothing_of_the_vendor_s() -> None:
    [device] = opsin_register_devices()
    specs = opsin_register_kernels()
    assert (device.name, device.torch_type, len(specs)) == ("mlu", "mlu", 10)
    assert not any(spec.supports(KernelQuery(op="rms_norm", dtype="float16", size=8)) for spec in specs)
    assert "torch_mlu" not in sys.modules

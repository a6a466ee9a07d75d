"""What the device says about itself and takes from its surroundings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opsin_device_cpu import device, limits


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPSIN_CPU_THREADS", "OMP_NUM_THREADS", "OPSIN_CPU_COPY_BYTES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty version 2 hierarchy that this process is at the root of."""
    monkeypatch.setattr(limits, "CGROUPS", tmp_path)
    monkeypatch.setattr(limits, "_cgroup_folders", lambda controller: [tmp_path])
    return tmp_path


def test_threads_follow_the_user_then_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.threads()[0] == limits.usable_cores() >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert device.threads() == (3, "OMP_NUM_THREADS")
    monkeypatch.setenv("OPSIN_CPU_THREADS", "2")
    assert device.threads() == (2, "OPSIN_CPU_THREADS")


@pytest.mark.parametrize("text", ["0", "two", "-1", "1.5"])
def test_a_bad_thread_count_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSIN_CPU_THREADS", text)
    with pytest.raises(ValueError, match=f"OPSIN_CPU_THREADS='{text}'"):
        device.open_device(0)
    probe = device.probe()
    assert probe.score == 0
    assert "OPSIN_CPU_THREADS" in probe.reason
    assert probe.next_step


def test_opening_sets_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OPSIN_CPU_THREADS", "1")
        opened = device.open_device(0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert opened.torch_device == "cpu"
    assert "float32" in opened.capabilities.dtypes
    assert set(opened.capabilities.dtype_for.values()) <= set(opened.capabilities.dtypes)


def test_there_is_one_cpu() -> None:
    with pytest.raises(ValueError, match='pass device="cpu"'):
        device.open_device(1)


def test_a_quota_limits_the_cores(cgroup: Path) -> None:
    assert limits.container_cores() is None
    (cgroup / "cpu.max").write_text("max 100000\n")
    assert limits.container_cores() is None
    (cgroup / "cpu.max").write_text("150000 100000\n")
    assert limits.container_cores() == 1.5
    assert limits.usable_cores() == 1


def test_a_version_1_quota_limits_the_cores(cgroup: Path) -> None:
    (cgroup / "cpu.cfs_quota_us").write_text("-1\n")
    (cgroup / "cpu.cfs_period_us").write_text("100000\n")
    assert limits.container_cores() is None
    (cgroup / "cpu.cfs_quota_us").write_text("50000\n")
    assert limits.container_cores() == 0.5
    assert limits.usable_cores() == 1


def test_a_memory_limit_counts_what_can_be_reclaimed(cgroup: Path) -> None:
    machine = device.memory()
    assert 0 < machine.free_bytes <= machine.total_bytes
    (cgroup / "memory.max").write_text(f"{64 * 2**20}\n")
    (cgroup / "memory.current").write_text(f"{60 * 2**20}\n")
    (cgroup / "memory.stat").write_text(f"anon 5\ninactive_file {10 * 2**20}\n")
    limited = device.memory()
    assert limited.total_bytes == 64 * 2**20
    assert limited.free_bytes == 14 * 2**20


def test_a_missing_memory_limit_is_no_limit(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("1\n")
    assert limits.container_memory() is None


def test_the_cgroup_of_this_process_and_all_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CGROUPS", tmp_path)
    monkeypatch.setattr(limits, "_read", lambda path: "0::/outer/inner\n4:cpu,cpuacct:/box")
    folders = limits._cgroup_folders("cpu")
    expected = ["outer/inner", "outer", "", "cpu/box", "cpu"]
    assert folders == [tmp_path / part for part in expected]


def test_the_budget_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.copy_bytes() == device.memory().total_bytes // device.COPY_SHARE
    monkeypatch.setenv("OPSIN_CPU_COPY_BYTES", "0")
    assert device.copy_bytes() == 0
    monkeypatch.setenv("OPSIN_CPU_COPY_BYTES", "1 GB")
    with pytest.raises(ValueError, match="OPSIN_CPU_COPY_BYTES='1 GB'"):
        device.copy_bytes()

"""What the operating system lets this process use: cores, container quotas, instruction sets."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import psutil

from opsin.api import MemoryInfo

CGROUPS = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Physical cores in this process's affinity, at most its container's CPU quota, at least 1.

    Two hardware threads of one core share its vector units, so a second one does not help a matrix product.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        count: int = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    else:
        count = len({_core_of(cpu) for cpu in affinity(0)})
    quota = container_cores()
    return max(1, count if quota is None else min(count, int(quota)))


def _core_of(cpu: int) -> str:
    """A name that hardware threads of one core share."""
    siblings = _read(CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list")
    return siblings or str(cpu)


def container_cores() -> float | None:
    """CPU quota of the tightest cgroup around this process, None without one."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        both = (_read(folder / "cpu.max") or "").split()  # version 2: "quota period" or "max period"
        if len(both) != 2:
            both = [_read(folder / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        quota, period = both
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def container_memory() -> MemoryInfo | None:
    """Memory limit of the tightest cgroup around this process, None without one."""
    found = []
    for folder in _cgroup_folders("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes") or ""
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes") or ""
        if limit.isdecimal() and used.isdecimal():
            free = int(limit) - int(used) + _reclaimable(folder)
            found.append(MemoryInfo(free_bytes=max(0, free), total_bytes=int(limit)))
    return min(found, key=lambda info: info.free_bytes, default=None)


def _reclaimable(folder: Path) -> int:
    """File pages that the system drops when memory is wanted; they count as used."""
    for line in (_read(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _cgroup_folders(controller: str) -> list[Path]:
    """This process's cgroup for a controller and all around it, in version 2 or 1."""
    folders: list[Path] = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        inner = root / path.lstrip("/")
        # Inside a container the path may be the host's and not exist here; the root then is the container.
        folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    return list(dict.fromkeys(folders))


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set names as Linux writes them (``flags`` on x86, ``Features`` on Arm); else empty."""
    return frozenset(_cpuinfo("flags", "Features").split())


@cache
def processor_name() -> str:
    """Empty where the system does not say."""
    return _cpuinfo("model name", "Model")


def _cpuinfo(*names: str) -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None

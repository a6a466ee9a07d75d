"""What opening the device does to the C library's allocator, in processes of their own: it stays done."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

MAP_A_BUFFER = """
import resource, torch
from opsin_device_cpu.device import open_device

size, count = 40 * 2**20, 20
details = open_device(0).details
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(count):
    torch.empty(size, dtype=torch.uint8).fill_(1)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(details["allocator keeps freed memory"], faults * resource.getpagesize() / size)
"""


def run(**environment: str) -> tuple[str, float]:
    """Whether the allocator was set, and how many of 20 equal buffers were mapped anew."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", MAP_A_BUFFER],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, **environment},
    )
    kept, mapped = done.stdout.split()
    return kept, float(mapped)


def test_large_buffers_are_reused() -> None:
    kept, mapped = run()
    if platform.libc_ver()[0] == "glibc":
        assert kept == "True"
        assert mapped < 5
    else:
        assert kept == "False"


def test_the_users_settings_win() -> None:
    assert run(MALLOC_ARENA_MAX="2")[0] == "False"

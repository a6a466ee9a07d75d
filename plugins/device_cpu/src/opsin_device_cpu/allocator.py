"""The C library's memory allocator, told to keep what is freed.

By default glibc maps each large buffer anew and unmaps it when it is freed, and the system clears every
page of it again at first use: for the 40 MB that a layer writes for 1,024 tokens this takes as long as a
good part of the product itself (numbers in docs/decisions/0023-cpu-allocator.md).
"""

from __future__ import annotations

import ctypes
import os
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_LARGEST_KEPT = 512 * 2**20
_NEVER = 2**31 - 1

_USER_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have buffers of up to 512 MiB reused. Process-wide; other C libraries and users' settings win.

    One arena for all threads: the others cannot hold large buffers, and the engine may run in any thread.

    Returns:
        Whether the allocator took the settings.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _USER_SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    taken = [mallopt(name, value) for name, value in settings]  # all of them, whether or not one fails
    return all(taken)

"""The compiled kernels: found, checked and loaded. They are never required.

`native/` holds C++ with a C ABI: it knows neither Python nor torch and takes pointers and sizes. Whatever is
passed must stay alive during the call; the interpreter's lock is released meanwhile. Packaging and loading:
docs/decisions/0075-cpu-native-package.md; threads: docs/decisions/0076-cpu-native-threads.md.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

ABI_VERSION = 1
"""What ``opsin_abi_version`` must say: raised there and here with every change of a signature."""

LIBRARY = Path(__file__).with_name("libopsin_cpu.so")

ISA_VARIABLE = "OPSIN_CPU_ISA"
NATIVE_VARIABLE = "OPSIN_CPU_NATIVE"
POOL_VARIABLE = "OPSIN_CPU_POOL"

_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "opsin_plan": (c_int, (c_void_p, c_int64)),
    "opsin_paged": (
        c_int,
        (
            *(c_void_p, *(c_void_p, c_int64) * 3, c_void_p, c_void_p, c_int64),
            *(c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_float, c_int64),
        ),
    ),
    "opsin_dense": (
        c_int,
        (
            *(*(c_void_p, c_int64) * 3, c_void_p, c_int64, c_void_p, c_void_p),
            *(c_int64, c_int64, c_int64, c_int64, c_float, c_int64),
        ),
    ),
    "opsin_rotate": (c_int, (c_void_p, *(c_int64,) * 4, c_void_p, c_void_p, c_int64, c_int64)),
    "opsin_rms_norm": (
        c_int,
        (c_int64, c_int64, c_int64, *(c_void_p, c_int64) * 2, c_void_p, c_float, c_void_p, c_int64),
    ),
    "opsin_layer_norm": (
        c_int,
        (c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_float, c_void_p, c_int64),
    ),
    "opsin_gated": (c_int, (*(c_int64,) * 4, c_void_p, c_int64, c_void_p, c_int64)),
    "opsin_activate": (c_int, (c_int64, c_int64, c_int64, c_void_p)),
    "opsin_abi_version": (c_int, ()),
    "opsin_isa": (c_char_p, ()),
    "opsin_has_isa": (c_int, (c_char_p,)),
    "opsin_num_workers": (c_int, ()),
    "opsin_set_workers": (None, (c_int,)),
    "opsin_set_spins": (None, (c_int,)),
    "opsin_set_gomp": (None, (c_void_p,)),
    "opsin_measure_read": (c_int32, (c_void_p, c_int64)),
    "opsin_measure_multiply": (c_int64, (c_int64,)),
    "opsin_weight_pack": (
        c_void_p,
        (c_int32, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "opsin_weight_free": (None, (c_void_p,)),
    "opsin_weight_bytes": (c_int64, (c_void_p,)),
    "opsin_weight_rows": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p)),
    "opsin_ranks_bytes": (c_int64, (c_int32,)),
    "opsin_ranks_slot_bytes": (c_int64, ()),
    "opsin_ranks_missing": (c_int32, (c_void_p, c_int32, c_uint32)),
    "opsin_ranks_sum": (
        c_int32,
        (c_void_p, c_int32, c_int32, c_uint32, c_int32, c_void_p, c_int64, c_int32, c_int32, c_int32),
    ),
    "opsin_ranks_gather": (
        c_int32,
        (c_void_p, c_int32, c_int32, c_uint32, c_void_p, c_int64, c_void_p, c_void_p, *(c_int32,) * 3),
    ),
    "opsin_linear": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p, c_int32, c_int32, c_void_p)),
}


@dataclass(frozen=True)
class Loaded:
    """The outcome of looking for the library.

    Attributes:
        library: None where it cannot be used.
        reason: the instruction set in use, or why there is no library and what to do.
    """

    library: ctypes.CDLL | None
    reason: str


@cache
def loaded() -> Loaded:
    """Look once per process."""
    if os.environ.get(NATIVE_VARIABLE, "1") == "0":
        return Loaded(None, f"switched off by {NATIVE_VARIABLE}=0")
    if not LIBRARY.exists():
        return Loaded(None, "not built: install a C++ compiler (g++ or clang++), then opsin-device-cpu again")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return Loaded(None, f"{LIBRARY.name} cannot be loaded: {error}; install opsin-device-cpu again")
    problem = _declare(library)
    if problem is not None:
        return Loaded(None, problem)
    isa = library.opsin_isa().decode()
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted and wanted != isa:
        return Loaded(None, f"{ISA_VARIABLE}={wanted!r}: this processor or library has no such kernels")
    return Loaded(library, f"{isa}, {_use_threads(library)}")


def library() -> ctypes.CDLL | None:
    """The compiled kernels, None without."""
    return loaded().library


def set_threads(count: int) -> None:
    """How many threads the kernels work on, the calling one included."""
    native = library()
    if native is not None:
        native.opsin_set_workers(count)


def declare(native: ctypes.CDLL, signatures: dict[str, tuple[type | None, tuple[type, ...]]]) -> None:
    """Tell ctypes what the library's functions take and return.

    Raises:
        AttributeError: the library lacks one of them.
    """
    for name, (result, arguments) in signatures.items():
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments


def _declare(native: ctypes.CDLL) -> str | None:
    """Why the library cannot be used, None if it can."""
    again = "install opsin-device-cpu again"
    try:
        declare(native, {"opsin_abi_version": _SIGNATURES["opsin_abi_version"]})
        version = native.opsin_abi_version()
        if version != ABI_VERSION:
            return f"{LIBRARY.name} has ABI version {version}, expected {ABI_VERSION}: {again}"
        declare(native, _SIGNATURES)
    except AttributeError as error:
        return f"{LIBRARY.name} is not this package's: {error}; {again}"
    return None


def _use_threads(native: ctypes.CDLL) -> str:
    native.opsin_set_workers(torch.get_num_threads())
    if os.environ.get(POOL_VARIABLE) == "torch":
        gomp = torch_gomp()
        if gomp is not None:
            native.opsin_set_gomp(gomp)
            return "threads of torch's OpenMP"
    return "threads of its own"


def torch_gomp() -> int | None:
    """Address of GOMP_parallel in the GNU OpenMP library that torch has loaded; None if it uses another."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    if len(paths) != 1:
        return None
    return ctypes.cast(ctypes.CDLL(paths.pop()).GOMP_parallel, c_void_p).value

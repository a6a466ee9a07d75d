"""Tensors on ``mlu`` over host memory.

A storage made from a data pointer carries any device; a tensor's storage, offset, size and stride are then
set past the dispatcher. The result is a true TensorImpl: views of it alias, strides are real.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.mlu_sim.card import CARD, MAX_ELEMENTS

CPU = torch.device("cpu")
CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_SET = torch.ops.aten.set_.source_Storage_storage_offset
_STORAGE = torch._C._construct_storage_from_data_pointer  # type: ignore[attr-defined]


def on_mlu(x: object) -> bool:
    """Whether x is a tensor on the simulated card."""
    return isinstance(x, Tensor) and x.device.type == "mlu"


def alias(x: Tensor) -> Tensor:
    """A CPU tensor over the very bytes of an mlu tensor."""
    storage = x.untyped_storage()
    view = torch.empty(0, dtype=x.dtype)
    view.set_(_STORAGE(storage.data_ptr(), CPU, storage.nbytes()), x.storage_offset(), x.size(), x.stride())
    return view


def adopt(x: Tensor, index: int) -> Tensor:
    """An mlu tensor that takes over the bytes of a fresh CPU tensor; counted until its storage dies."""
    if x.numel() > MAX_ELEMENTS:
        raise RuntimeError(f"the MLU370 takes no tensor of {x.numel()} elements; at most {MAX_ELEMENTS}")
    host = x.untyped_storage()
    num_bytes = host.nbytes()
    CARD.allocate(index, num_bytes)
    storage = _STORAGE(host.data_ptr(), torch.device("mlu", index), num_bytes)
    # The finalizer's arguments keep the host storage exactly as long as the mlu storage lives.
    weakref.finalize(storage, _release, host, index, num_bytes).atexit = False
    made = _empty(x.dtype, index)
    place(made, storage, x.storage_offset(), x.size(), x.stride())
    return made


def place(
    x: Tensor, storage: torch.UntypedStorage, offset: int, size: Sequence[int], stride: Sequence[int]
) -> None:
    """Point an mlu tensor at a storage."""
    _SET.redispatch(CPU_KEY, x, storage, offset, list(size), list(stride))


def _release(host: torch.UntypedStorage, index: int, num_bytes: int) -> None:
    CARD.free(index, num_bytes)


def _empty(dtype: torch.dtype, index: int) -> Tensor:
    if index == 0:
        made: Tensor = torch._C._acc.create_empty_tensor([0], dtype)
        return made
    return _empty_elsewhere(dtype, index)


# torch's constructor knows device 0 only. A DLPack capsule can name any other.


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_EXTENSION_DEVICE = 12  # kDLExtDev
_CODES = {  # kDLInt, kDLUInt, kDLFloat, kDLBfloat, kDLBool
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.bool: (6, 8),
}
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_kept: dict[tuple[torch.dtype, int], tuple[_DLManagedTensor, ctypes.Array[ctypes.c_int64]]] = {}


def _empty_elsewhere(dtype: torch.dtype, index: int) -> Tensor:
    """An empty tensor on ``mlu:index``."""
    if (dtype, index) not in _kept:
        code, bits = _CODES[dtype]
        shape = (ctypes.c_int64 * 1)(0)
        tensor = _DLTensor(None, _EXTENSION_DEVICE, index, 1, code, bits, 1, shape, None, 0)
        _kept[dtype, index] = (_DLManagedTensor(tensor, None, None), shape)
    managed = _kept[dtype, index][0]
    made: Tensor = torch._C._from_dlpack(_capsule(ctypes.addressof(managed), b"dltensor", None))
    return made

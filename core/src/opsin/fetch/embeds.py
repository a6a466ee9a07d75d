"""Ready-made embeddings that came over HTTP: safetensors or NumPy files in base64, never pickles."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from opsin.errors import MediaError
from opsin.inputs.data_url import check_num_bytes

MAX_TENSORS = 4
MAX_DIMS = 3
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
_NUMPY_DTYPES = ("<f4", "<f2", "<i8", "<i4")
_EXPECTED = "expected a safetensors or .npy file in base64"


def decode_embeds(value: Any, max_bytes: int) -> Tensor | dict[str, Tensor]:
    """The value of an ``image_embeds`` or ``video_embeds`` part -> what the model family's mapper takes.

    Args:
        value: base64 of a .npy file, or of a safetensors file with one tensor: gives that tensor. Base64 of a
            safetensors file with several, or a dict of name -> base64 of one: gives them by name.
        max_bytes: most bytes of all files together.

    Raises:
        MediaError: another form, another dtype, NaN or infinity, or too much. The message never quotes a
            library.
    """
    if isinstance(value, Mapping):
        if len(value) > MAX_TENSORS:
            raise MediaError(f"got {len(value)} tensors of embeddings; at most {MAX_TENSORS} are accepted")
        named: dict[str, Tensor] = {}
        for name, text in value.items():
            data = _decode(text, max_bytes)
            max_bytes -= len(data)
            named[str(name)] = _single(_tensors(data))
        return _checked(named)
    tensors = _checked(_tensors(_decode(value, max_bytes)))
    return tensors if len(tensors) > 1 else _single(tensors)


def _decode(text: Any, max_bytes: int) -> bytes:
    if not isinstance(text, str):
        raise MediaError(f"got embeddings as a {type(text).__name__}; {_EXPECTED}")
    check_num_bytes(len(text) * 3 // 4 - 2, max_bytes)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"the embeddings are not valid base64; {_EXPECTED}") from None


def _tensors(data: bytes) -> dict[str, Tensor]:
    if data.startswith(b"\x93NUMPY"):
        return {"": _read_npy(data)}
    try:
        loaded: dict[str, Tensor] = safetensors.torch.load(data)
    except Exception:  # its text may tell of addresses, and its types are not all exported
        raise MediaError(f"the embeddings cannot be read; {_EXPECTED}") from None
    return loaded


def _read_npy(data: bytes) -> Tensor:
    """A .npy file without NumPy's reader, which allocates what the header claims."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = read[version](file)
        described = dtype.str
    except Exception:
        raise MediaError(f"the .npy file cannot be read; {_EXPECTED}") from None
    if described not in _NUMPY_DTYPES:
        raise MediaError("the .npy file has a dtype that is not accepted; expected float32 or float16")
    content = data[file.tell() :]
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != len(content):
        raise MediaError("the .npy file has another size than its header says")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")
    return torch.from_numpy(array.copy())


def _single(tensors: Mapping[str, Tensor]) -> Tensor:
    if len(tensors) != 1:
        raise MediaError(f"got a file with {len(tensors)} tensors; expected one")
    return next(iter(tensors.values()))


def _checked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not 1 <= len(tensors) <= MAX_TENSORS:
        raise MediaError(f"got {len(tensors)} tensors of embeddings; expected 1 to {MAX_TENSORS}")
    for tensor in tensors.values():
        if tensor.dtype not in (*FLOATS, *INTEGERS):
            raise MediaError("the embeddings have a dtype that is not accepted; expected float32 or 16 bit")
        if tensor.ndim > MAX_DIMS or 0 in tensor.shape:
            raise MediaError(f"the embeddings have shape {tuple(tensor.shape)}; expected 2 or 3 dimensions")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise MediaError("the embeddings hold NaN or infinity")
    if not any(tensor.is_floating_point() for tensor in tensors.values()):
        raise MediaError("got embeddings of integers; expected float32, bfloat16 or float16")
    return tensors

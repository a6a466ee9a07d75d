"""Embeddings over HTTP: only by flag, only files that cannot run code, only sound ones."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
import struct
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from opsin.errors import MediaError
from opsin.fetch.fetcher import MediaFetcher
from opsin.fetch.settings import FetchSettings
from opsin.inputs.conversation import Conversation

ROWS = torch.linspace(-1, 1, 24).reshape(4, 6)
GRID = torch.tensor([[1, 4, 4]])


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def resolved(value: Any, kind: str = "image_embeds", **settings: Any) -> Any:
    async def resolve() -> Any:
        fetcher = MediaFetcher(FetchSettings(**{"enable_mm_embeds": True, **settings}))
        messages = [{"role": "user", "content": [{"type": kind, kind: value}]}]
        conversation = await fetcher.resolve(Conversation.parse(messages))
        await fetcher.aclose()
        return conversation.media[0].value

    return asyncio.run(resolve())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors(dtype: torch.dtype) -> None:
    rows = ROWS.to(dtype)
    assert torch.equal(resolved(text(save({"any": rows}))), rows)
    named = {"image_embeds": rows, "image_grid_thw": GRID}
    together = resolved(text(save(named)))
    apart = resolved({name: text(save({"x": tensor})) for name, tensor in named.items()})
    for result in (together, apart):
        assert set(result) == set(named)
        assert all(torch.equal(result[name], tensor) for name, tensor in named.items())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(dtype: Any, order: Any) -> None:
    rows = np.asarray(ROWS.numpy().astype(dtype), order=order)
    given = resolved(text(npy(rows)))
    assert torch.equal(given, torch.from_numpy(np.ascontiguousarray(rows)))
    both = resolved(
        {"video_embeds": text(npy(rows)), "video_grid_thw": text(npy(GRID.numpy()))}, "video_embeds"
    )
    assert torch.equal(both["video_grid_thw"], GRID)


def test_they_come_by_flag_only() -> None:
    with pytest.raises(
        MediaError, match=r"content\[0\]: this server takes no ready-made embeddings; --enable-mm"
    ):
        resolved(text(save({"x": ROWS})), enable_mm_embeds=False)


def torch_file() -> bytes:
    file = io.BytesIO()
    torch.save(ROWS, file)
    return file.getvalue()


class _Bomb:
    """What a pickle can do: this one would end the test run."""

    def __reduce__(self) -> Any:
        return (exit, (17,))


def header_only(shape: str, dtype: str = "<f4", fortran: str = "False") -> bytes:
    """A .npy file of version 1 that has nothing but its header."""
    header = f"{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header


def safetensors_file(header: Any, data: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


BAD_FILES = {
    "torch.save": torch_file(),
    "pickle": pickle.dumps(_Bomb()),
    "npy with a pickle inside": npy(np.array([_Bomb()], dtype=object), allow_pickle=True),
    "npz": b"PK\x03\x04" + bytes(40),
    "nothing": b"",
    "noise": bytes(range(256)),
    "npy that claims a terabyte": header_only("(500000, 500000)"),
    "npy that claims less than it has": header_only("(1, 1)") + bytes(64),
    "npy of negative sides": header_only("(-1, -1)") + bytes(4),
    "npy of sides that are no numbers": header_only("('a',)") + bytes(4),
    "npy with a call in its header": header_only("(__import__('os').getpid(),)"),
    "npy with a header that does not end": b"\x93NUMPY\x01\0\xff\xff{",
    "npy of version 9": b"\x93NUMPY\x09\0" + bytes(100),
    "npy of strings": npy(np.array(["abc"])),
    "npy of a structure": npy(np.zeros(2, dtype=[("a", "<f4")])),
    "npy of complex numbers": npy(np.zeros((2, 2), dtype=np.complex64)),
    "npy of the other byte order": npy(ROWS.numpy().astype(">f4")),
    "npy of doubles": npy(ROWS.double().numpy()),
    "npy of integers only": npy(GRID.numpy()),
    "safetensors that claims more than it has": safetensors_file(
        {"x": {"dtype": "F32", "shape": [500000, 500000], "data_offsets": [0, 10**12]}}
    ),
    "safetensors with a header of an exabyte": struct.pack("<Q", 2**60) + b"{}",
    "safetensors without tensors": safetensors_file({}),
    "safetensors of doubles": save({"x": ROWS.double()}),
    "safetensors of integers only": save({"x": GRID}),
    "safetensors of five tensors": save({str(index): ROWS + index for index in range(5)}),
    "NaN": save({"x": ROWS * float("nan")}),
    "infinity": npy(np.full((2, 2), np.inf, dtype=np.float32)),
    "four dimensions": save({"x": ROWS.reshape(1, 1, 4, 6)}),
    "no rows": save({"x": torch.zeros(0, 6)}),
}


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_are_refused(data: bytes) -> None:
    for value in (text(data), {"image_embeds": text(data)}):
        with pytest.raises(MediaError, match=r"^messages\[0\]\.content\[0\]: ") as caught:
            resolved(value)
        message = str(caught.value)
        assert not any(word in message.lower() for word in ("0x", "error", "rust", "numpy.", "/"))
        assert len(message) < 200


@pytest.mark.parametrize(
    "value",
    [
        *(3, [], [1.0, 2.0], "", "not base64!", "/etc/passwd", True),
        *({}, {"a": 3}, {"a": None}, {"a": {"b": "c"}}, {"a": "/etc/passwd"}),
        {str(index): text(save({"x": ROWS})) for index in range(5)},
        {"a": text(save({"x": ROWS, "y": GRID}))},
    ],
)
def test_values_that_are_no_files(value: Any) -> None:
    with pytest.raises(MediaError, match=r"^messages\[0\]\.content\[0\]: "):
        resolved(value)


def test_their_bytes_are_capped() -> None:
    big = torch.zeros(100, 100)
    with pytest.raises(MediaError, match="at most 20000 are accepted"):
        resolved(text(save({"x": big})), max_media_bytes=20_000)
    with pytest.raises(MediaError, match="at most"):
        resolved({name: text(npy(big.numpy())) for name in "ab"}, max_media_bytes=50_000)
    with pytest.raises(MediaError, match="the media of a request are too large; at most 30000 bytes"):
        resolved(text(save({"x": big})), max_request_media_bytes=30_000)
    whole: Tensor = resolved(text(save({"x": big})), max_media_bytes=50_000)
    assert whole.shape == (100, 100)

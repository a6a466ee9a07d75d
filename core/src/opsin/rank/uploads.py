"""The numbers of a step on their way to the device: all in one transfer, before anything of it runs.

A transfer makes the host wait for the device, and what is queued after one waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 16
"""Each array begins at a multiple of 64 bytes."""


class Uploads:
    """Collects arrays of integers, hands out where they will be on the device, and sends them.

    Where tensors are in host memory there is nothing to send.

    Args:
        device: where they go.
        capacity: numbers that there is room for; an array beyond it is sent by itself.
        pinned: whether host memory can be pinned, so that the host need not wait.
    """

    def __init__(self, device: str, capacity: int, *, pinned: bool = False) -> None:
        self._device, self._pinned, self._used = device, pinned, 0
        self._there: Tensor | None = None
        if torch.device(device).type != "cpu":
            capacity += _ALIGNED
            self._there = torch.empty(capacity, dtype=torch.int32, device=device)
            self._here = torch.empty(capacity, dtype=torch.int32, pin_memory=pinned)
            self._numbers: np.ndarray[Any, np.dtype[np.int32]] = self._here.numpy()

    def put(self, numbers: Sequence[int] | np.ndarray[Any, np.dtype[Any]]) -> Tensor:
        """int32 (n,) on the device, to be read once they are sent."""
        if self._there is None:
            return torch.as_tensor(numbers, dtype=torch.int32)
        first, count = self._used, len(numbers)
        if first + count > len(self._there):
            return torch.as_tensor(numbers, dtype=torch.int32).to(self._device)
        self._numbers[first : first + count] = numbers
        self._used = first + -(-count // _ALIGNED) * _ALIGNED
        return self._there[first : first + count]

    def send(self) -> None:
        """The transfer."""
        if self._there is not None and self._used:
            used = min(self._used, len(self._there))
            self._there[:used].copy_(self._here[:used], non_blocking=self._pinned)

"""Cosines and sines of rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """theta ** (-2i / width) for i < width / 2, float32 (Su et al. 2021, eq. 15)."""
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))


class RotaryTable(nn.Module):
    """Cosines and sines of a step's positions, computed once a step and used by every layer.

    Args:
        head_size: D.
        theta: base of the frequencies.
        sections: M-RoPE: how many of the D/2 frequencies follow each axis; None: one axis.
    """

    def __init__(
        self, head_size: int, theta: float, *, sections: Sequence[int] | None = None, device: str = "cpu"
    ) -> None:
        super().__init__()
        self._inverse = inverse_frequencies(head_size, theta).to(device)
        self._axis: Tensor | None = None
        if sections is not None:
            assert sum(sections) == head_size // 2, (sections, head_size)
            axis = torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections))
            self._axis = axis.to(device)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 (A, T) -> cos, sin, float32 (T, D), the halves alike."""
        if self._axis is None:
            angles = positions[0].float().unsqueeze(1) * self._inverse
        else:
            # frequency i turns with its axis' position (M-RoPE; Wang et al. 2024, section 2.1)
            angles = positions.float().index_select(0, self._axis).t() * self._inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

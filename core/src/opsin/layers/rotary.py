"""Cosines and sines of rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opsin.layers.module import Module


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """theta ** (-2i / width) for i < width / 2, float32 (Su et al. 2021, eq. 15)."""
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))


class RotaryTable(Module):
    """Cosines and sines of a step's positions, computed once per step and used by every layer.

    Args:
        head_size: D.
        theta: base of the frequencies.
        sections: number of the D/2 frequencies that follow each axis (M-RoPE); None: one axis.
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

    @classmethod
    def from_config(
        cls, text: Mapping[str, Any], head_size: int, device: str, *, mrope: bool = False
    ) -> RotaryTable:
        """From a `text_config`; ``mrope``: whether the family's positions have several axes.

        Raises:
            ValueError: ``rope_parameters`` describe another kind of rotary positions.
        """
        rope = text["rope_parameters"]
        kind, sections = rope["rope_type"], rope.get("mrope_section")
        kinds = ("default", "mrope") if mrope else ("default",)
        if kind not in kinds or (sections is None) == mrope:
            raise ValueError(
                f"rope_scaling (or rope_parameters) of type {kind!r} with mrope_section {sections}: expected "
                f"type {' or '.join(map(repr, kinds))} {'with' if mrope else 'without'} an mrope_section"
            )
        return cls(head_size, rope["rope_theta"], sections=sections, device=device)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 (A, T) -> cos, sin, float32 (T, D), both halves equal."""
        if self._axis is None:
            angles = positions[0].float().unsqueeze(1) * self._inverse
        else:
            # Frequency i turns with its axis' position (M-RoPE; Wang et al. 2024, section 2.1).
            angles = positions.float().index_select(0, self._axis).t() * self._inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

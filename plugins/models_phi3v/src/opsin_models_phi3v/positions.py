"""Rotary positions, with other frequencies for long sequences ("su" scaling, LongRoPE: Ding et al. 2024).

A sequence of up to ``original_max_position_embeddings`` tokens uses the short factors; a longer one uses the
long factors for *all* of its tokens (``Phi3SuScaledRotaryEmbedding`` in ``modeling_phi3_v.py`` of the hub's
repositories).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsin.api import PlacedMedia, Positions
from opsin.layers import Module, RotaryTable, text_config


def positions(config: Mapping[str, Any], token_ids: Sequence[int], media: Sequence[PlacedMedia]) -> Positions:
    """0, 1, 2, ..., and the length above which the long factors are used."""
    scaled = text_config(config)["rope_parameters"]["rope_type"] != "default"
    switch = (int(config["original_max_position_embeddings"]),) if scaled else ()
    return Positions(prompt=np.arange(len(token_ids), dtype=np.int64)[None], switch_lengths=switch)


class LongRotaryTable(Module):
    """Cosines and sines of a step whose sequences are short or long.

    Args:
        head_size: D.
        theta: base of the frequencies.
        short, long: factors by which each of the D/2 wave lengths is stretched, for each variant.
        attention_factor: factor of cosines and sines; attention logits are scaled by its square.
    """

    def __init__(
        self,
        head_size: int,
        theta: float,
        *,
        short: Sequence[float],
        long: Sequence[float],
        attention_factor: float,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
        self._inverse = (1.0 / (torch.tensor([short, long]) * theta**exponents)).to(device)
        self._attention_factor = attention_factor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 (2, T), positions and variants (0: short) -> cos, sin, float32 (T, D), both halves equal."""
        angles = positions[0].float().unsqueeze(1) * self._inverse.index_select(0, positions[1])
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self._attention_factor, angles.sin() * self._attention_factor


def rotary_table(config: Mapping[str, Any], head_size: int, device: str) -> RotaryTable | LongRotaryTable:
    """The table of a config.json.

    Raises:
        ValueError: its rotary positions are of another kind, or their factors do not fit the heads.
    """
    text = text_config(config)
    rope = text["rope_parameters"]
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind == "default":
        return RotaryTable.from_config(text, head_size, device)
    short, long = rope.get("short_factor", ()), rope.get("long_factor", ())
    if kind not in ("su", "longrope") or not len(short) == len(long) == head_size // 2:
        raise ValueError(
            f"rope_scaling of type {kind!r} with {len(short)} short and {len(long)} long factors; this "
            f"family has type 'su' or 'longrope' with {head_size // 2} of each"
        )
    original = config["original_max_position_embeddings"]
    scale = config["max_position_embeddings"] / original
    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return LongRotaryTable(head_size, theta, short=short, long=long, attention_factor=factor, device=device)

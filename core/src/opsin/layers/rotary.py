"""Cosines and sines of rotary positions, and positions on several axes (M-RoPE)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsin.api import PlacedMedia, Positions
from opsin.layers.module import Module
from opsin.layers.text import original_length

_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "longrope": frozenset(
        {"factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {"factor", "attention_factor", "original_max_position_embeddings"}
        | {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    ),
}
"""Types of rotary positions, and what ``rope_parameters`` has for each besides `_COMMON`."""

_COMMON = frozenset(
    {"rope_type", "rope_theta", "mrope_section", "mrope_interleaved", "partial_rotary_factor"}
)


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """theta ** (-2i / width) for i < width / 2, float32 (Su et al. 2021, eq. 15)."""
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))


class RotaryTable(Module):
    """Cosines and sines of a step's positions, computed once per step and used by every layer.

    Args:
        head_size: D.
        theta: base of the frequencies.
        sections: number of the D/2 frequencies that follow each axis (M-RoPE); None: one axis.
        device: torch device.
        interleaved: whether the axes take turns, frequency by frequency, instead of having each a section.
    """

    def __init__(
        self,
        head_size: int,
        theta: float,
        *,
        sections: Sequence[int] | None = None,
        device: str = "cpu",
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self._inverse = inverse_frequencies(head_size, theta)[None].to(device)
        self._factor = 1.0
        self._num_rows = 1 if sections is None else len(sections)
        self._axis: Tensor | None = None
        self._copies: tuple[Tensor, Tensor | None] | None = None
        if sections is not None:
            assert sum(sections) == head_size // 2, (sections, head_size)
            axis = torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections))
            if interleaved:
                axis = interleaved_axes(sections)
            self._axis = axis.to(device)

    @classmethod
    def from_config(
        cls,
        text: Mapping[str, Any],
        head_size: int,
        device: str,
        *,
        mrope: bool = False,
        interleaved: bool = False,
    ) -> RotaryTable:
        """From a `text_config`; ``mrope``: whether the family's positions have several axes.

        ``interleaved``: whether these take turns; ``mrope_interleaved`` of config.json must agree.

        A family whose checkpoints may be of type "longrope" gives `switch_lengths` with its positions.

        Raises:
            ValueError: ``rope_parameters`` describe another kind of rotary positions.
        """
        rope = text["rope_parameters"]
        sections = rope.get("mrope_section")
        if (sections is None) == mrope:
            raise ValueError(
                f"rope_scaling (or rope_parameters) has mrope_section {sections}: expected "
                f"{'one' if mrope else 'none'} in this family"
            )
        if mrope and (not _integers(sections) or sum(sections) != head_size // 2):
            raise ValueError(
                f"mrope_section is {sections!r}; expected integers whose sum is {head_size // 2}"
            )
        if rope.get("mrope_interleaved") not in (None, interleaved):
            raise ValueError(
                f"mrope_interleaved of rope_scaling (or rope_parameters) is {rope['mrope_interleaved']!r}; "
                f"expected {str(interleaved).lower()} in this family"
            )
        inverse, factor = _scaled(text, head_size)
        table = cls(head_size, rope["rope_theta"], sections=sections, device=device, interleaved=interleaved)
        table._factor = factor
        table._inverse = inverse.to(device)
        table._num_rows += len(inverse) > 1
        return table

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 (A, T) -> cos, sin, float32 (T, D) on the table's device, both halves equal.

        They are computed where the positions are.

        With frequencies of several variants, (A + 1, T): the variant of each token is the last row.
        """
        if len(positions) < self._num_rows:
            raise ValueError(
                f"positions have {len(positions)} rows, expected {self._num_rows}: those of the axes, and "
                "with switch_lengths the variants"
            )
        frequencies, axis = self._beside(positions)
        inverse = frequencies[0]
        if len(frequencies) > 1:
            inverse = frequencies.index_select(0, positions[-1])
        if axis is None:
            angles = positions[0].float().unsqueeze(1) * inverse
        else:
            # Frequency i turns with its axis' position (M-RoPE; Wang et al. 2024, section 2.1).
            angles = positions.float().index_select(0, axis).t() * inverse
        angles = torch.cat((angles, angles), dim=-1)
        there = self._inverse.device
        return (angles.cos() * self._factor).to(there), (angles.sin() * self._factor).to(there)

    def _beside(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Frequencies and axes where the positions are, see `opsin.api.Capabilities.host_angles`."""
        if positions.device == self._inverse.device:
            return self._inverse, self._axis
        if self._copies is None:
            axis = None if self._axis is None else self._axis.to(positions.device)
            self._copies = self._inverse.to(positions.device), axis
        return self._copies


def interleaved_axes(sections: Sequence[int]) -> Tensor:
    """Which axis each frequency follows where the axes take turns, int64 (sum of sections,).

    Axis a > 0 has the frequencies a, a + A, a + 2A, ..., as many as its section says; the first axis has the
    rest (transformers: ``recomposition_frequencies``).
    """
    axes = torch.zeros(sum(sections), dtype=torch.int64)
    for axis, count in enumerate(sections[1:], 1):
        axes[axis : count * len(sections) : len(sections)] = axis
    return axes


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _scaled(text: Mapping[str, Any], width: int) -> tuple[Tensor, float]:
    """Frequencies of each variant, float32 (variants, D/2), and a factor of cosines and sines.

    The formulas are those of transformers (``modeling_rope_utils.py``), which names their sources.

    Raises:
        ValueError: the type is unknown, or a field is, or it cannot be used.
    """
    rope = text["rope_parameters"]
    kind = rope["rope_type"]
    if kind not in _FIELDS:
        raise ValueError(
            f"rope_scaling (or rope_parameters) is of type {kind!r}; expected one of {', '.join(_FIELDS)}"
        )
    if unknown := rope.keys() - _FIELDS[kind] - _COMMON:
        raise ValueError(
            f"rope_scaling (or rope_parameters) has {', '.join(sorted(unknown))}, which its type {kind!r} "
            "does not use; take it out, or name the type that does"
        )

    if _number(rope, "partial_rotary_factor", 1.0) != 1:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; only 1 is supported")
    theta = _number(rope, "rope_theta")
    inverse = inverse_frequencies(width, theta)
    # "dynamic" begins beyond max_position_embeddings, which `context_length` keeps to.
    if kind == "linear":
        inverse = inverse / _number(rope, "factor")
    elif kind == "llama3":
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        slow = inverse / _number(rope, "factor")
        rotations = original_length(text) * inverse / (2 * math.pi)  # in the original context
        share = (rotations - low) / (high - low)
        between = (1 - share) * slow + share * inverse
        inverse = torch.where(rotations < low, slow, torch.where(rotations > high, inverse, between))
    elif kind == "yarn":
        return _yarn(text, width)
    elif kind == "longrope":
        factors = [_numbers(rope, name, width // 2) for name in ("short_factor", "long_factor")]
        inverse = 1.0 / (torch.tensor(factors) * theta ** (torch.arange(0, width, 2).float() / width))
        original = original_length(text)
        factor = _number(rope, "factor", text["max_position_embeddings"] / original)
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return inverse, _number(rope, "attention_factor", attention)
    return inverse[None], 1.0


def _yarn(text: Mapping[str, Any], width: int) -> tuple[Tensor, float]:
    """As `_scaled`: slow frequencies are stretched, fast ones are not (Peng et al. 2023, YaRN)."""
    rope, original = text["rope_parameters"], original_length(text)
    theta = _number(rope, "rope_theta")
    factor = _number(rope, "factor", text["max_position_embeddings"] / original)

    def index(rotations: float) -> float:
        """Of the frequency that turns so often in the original context."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(_number(rope, "beta_fast", 32.0)), index(_number(rope, "beta_slow", 1.0))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2).float() - low) / (high - low if high != low else 0.001)
    stretched = ramp.clamp(0, 1)
    inverse = inverse_frequencies(width, theta)
    inverse = inverse / factor * stretched + inverse * (1 - stretched)

    def attention(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = attention(1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        given = attention(_number(rope, "mscale")) / attention(_number(rope, "mscale_all_dim"))
    return inverse[None], _number(rope, "attention_factor", given)


def _number(rope: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value: Any = default if rope.get(name) is None else rope[name]
    if not _is_number(value) or value <= 0:
        raise ValueError(
            f"{name} of rope_scaling (or rope_parameters) is {value!r}; its type {rope['rope_type']!r} "
            "expects a positive number"
        )
    return float(value)


def _numbers(rope: Mapping[str, Any], name: str, count: int) -> list[float]:
    values = rope.get(name)
    if not isinstance(values, list) or len(values) != count or not all(map(_is_number, values)):
        raise ValueError(
            f"{name} of rope_scaling (or rope_parameters) is {values!r:.80}; its type {rope['rope_type']!r} "
            f"expects {count} numbers, half as many as a head has elements"
        )
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---- Positions on several axes: text counts up on all of them, media by time, row and column ---------


@dataclass(frozen=True, kw_only=True)
class PositionBlock:
    """Embeddings of a medium, or of a step of a video, that stand next to each other in a prompt.

    Attributes:
        start: index of the first of them.
        shape: steps, rows and columns, in embeddings.
        steps: position of each step on the axis of time, from 0, ascending; None: 0, 1, 2, ...
    """

    start: int
    shape: tuple[int, int, int]
    steps: Sequence[int] | None = None


def mrope_positions(
    num_tokens: int, blocks: Iterable[PositionBlock], *, switch_lengths: Sequence[int] = ()
) -> Positions:
    """Positions on the axes (time, height, width), int64 (3, L).

    A block begins one after the largest position so far; its tokens are at (start + step, start + row,
    start + column), and the text after it starts one after the largest of those (Wang et al. 2024, section
    2.1).

    Args:
        num_tokens: L, of the expanded prompt.
        blocks: in order of their start.
        switch_lengths: `opsin.layers.switch_lengths` of the language model. Positions, not tokens, decide
            which frequencies a long sequence has.
    """
    pieces = []
    done, following = 0, 0  # tokens covered; next free position
    for block in blocks:
        text = np.arange(block.start - done) + following
        pieces.append(np.broadcast_to(text, (3, len(text))))
        following += len(text)
        places = np.indices(block.shape).reshape(3, -1)
        if block.steps is not None:
            places[0] = np.asarray(block.steps, dtype=np.int64)[places[0]]
        pieces.append(places + following)
        following += int(places.max()) + 1
        done = block.start + places.shape[1]
    tail = np.arange(num_tokens - done) + following
    pieces.append(np.broadcast_to(tail, (3, len(tail))))
    delta = following + len(tail) - num_tokens
    return Positions(
        prompt=np.concatenate(pieces, axis=1).astype(np.int64),
        delta=delta,
        switch_lengths=tuple(length - delta for length in switch_lengths),
    )


def embed_runs(item: PlacedMedia) -> list[tuple[int, int]]:
    """(start, length) of each run of embeddings of an item; ids such as marks or times stand between them."""
    places = np.flatnonzero(np.asarray(item.is_embed, dtype=bool))
    ends = np.flatnonzero(np.diff(places) > 1) + 1
    return [(item.start + int(run[0]), len(run)) for run in np.split(places, ends) if len(run)]

"""What the trainer computes with: a batch of conversation trees, and one such tree under construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Conversations about pictures of the same shapes.

    Questions about one scene share its picture: they are branches of a tree that grows from a common trunk
    (branch 0). A token sees the trunk and its own branch, never a sister branch.
    """

    pixels: list[Tensor]
    """One per view of a picture or video of a conversation: uint8 (batch, frames, height, width, 3)."""
    shapes: list[Any]
    """For each of `pixels` what its family has to know of how the picture was cut."""
    places: list[Tensor]
    """Where the features of each go: (batch, times shown, tokens)."""
    ids: Tensor
    positions: Tensor
    branches: Tensor
    targets: Tensor
    """What a token predicts, -100 for nothing."""
    weights: Tensor
    kinds: list[list[str]]
    """The kind of every branch, from branch 1 on."""
    name: str = ""
    hints: list[Tensor] = field(default_factory=list)
    """For each of `pixels` what lies on every patch: (batch, steps, patches, 3)."""


def attention_bias(branches: Tensor) -> Tensor:
    """0 where a token sees another, minus infinity elsewhere: (batch, 1, length, length)."""
    length = branches.shape[1]
    own = branches[:, :, None] == branches[:, None, :]
    trunk = (branches == 0)[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(own.shape).masked_fill_(~((own | trunk) & causal), -math.inf)[:, None]


@dataclass
class Tokens:
    """The tokens of one conversation tree under construction."""

    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    branch: int = 0
    next: int = 0

    def text(self, ids: Sequence[int]) -> None:
        """Tokens that are read, not learned."""
        self.positions += [(self.next + i,) * 3 for i in range(len(ids))]
        self.next += len(ids)
        self._add(ids)

    def answer(self, ids: Sequence[int], end: int) -> None:
        """Tokens to be learned; the last one shall be followed by `end`, which is not written."""
        # The token before predicts the first one.
        weight = (len(ids) + 1) ** -0.5
        self.targets[-1], self.weights[-1] = ids[0], weight
        self.text(ids)
        self.targets[-len(ids) :] = [*ids[1:], end]
        self.weights[-len(ids) :] = [weight] * len(ids)

    def vision(self, pad: int, count: int) -> None:
        """Features that stand in a row like words."""
        self.places.append(list(range(len(self.ids), len(self.ids) + count)))
        self.text([pad] * count)

    def vision_cells(self, pad: int, cells: Sequence[tuple[int, int, int]]) -> None:
        """Features with three positions each, counted from here; what follows comes after all of them."""
        self.places.append(list(range(len(self.ids), len(self.ids) + len(cells))))
        self.positions += [(self.next + t, self.next + h, self.next + w) for t, h, w in cells]
        self.next += 1 + max(max(cell) for cell in cells)
        self._add([pad] * len(cells))

    def _add(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.branches += [self.branch] * len(ids)
        self.targets += [-100] * len(ids)
        self.weights += [0.0] * len(ids)


def collate(
    name: str, made: Sequence[Tokens], pixels: list[Tensor], shapes: list[Any], hints: list[Tensor]
) -> Batch:
    """Pads conversations to one length; padding is a branch of its own."""
    length = max(len(s.ids) for s in made)
    ids, branches = torch.zeros(len(made), length, dtype=torch.long), torch.full((len(made), length), -1)
    targets, weights = torch.full((len(made), length), -100), torch.zeros(len(made), length)
    positions = torch.zeros(3, len(made), length)
    for row, s in enumerate(made):
        n = len(s.ids)
        ids[row, :n] = torch.tensor(s.ids)
        branches[row, :n] = torch.tensor(s.branches)
        targets[row, :n] = torch.tensor(s.targets)
        weights[row, :n] = torch.tensor(s.weights)
        positions[:, row, :n] = torch.tensor(s.positions, dtype=torch.float32).t()
    # A conversation that shows its pictures once a branch has them one after the other, again and again.
    places = [torch.tensor([s.places[i :: len(pixels)] for s in made]) for i in range(len(pixels))]
    kinds = [s.kinds for s in made]
    return Batch(pixels, shapes, places, ids, positions, branches, targets, weights, kinds, name, hints)

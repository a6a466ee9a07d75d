"""Hints: what training knows about every patch, read off the features; left behind when training is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from drawing import COLOURS, SHAPES
from scenes import DIRECTIONS, STILL, plural
from tokenizers import Tokenizer
from torch import Tensor, nn

if TYPE_CHECKING:
    from network import Seen

THINGS = {name: i for i, name in enumerate((*SHAPES, *"0123456789"), start=1)}
TINTS = {name: i for i, name in enumerate(COLOURS, start=1)}
WAYS = {"": 0, **{name: i for i, name in enumerate((*DIRECTIONS, STILL), start=1)}}


def hint_words(tokenizer: Tokenizer) -> list[Tensor]:
    """For each kind of hint which tokens are words for it: tables of (hints, vocabulary)."""
    tables = []
    for names in (THINGS, TINTS, WAYS):
        table = torch.zeros(max(names.values()) + 1, tokenizer.get_vocab_size())
        for name, i in names.items():
            forms = (name,) if not name or name.isdigit() else (name, f" {name}")
            for word in (*forms, f" {plural(name)}") if name in SHAPES else forms:
                ids = tokenizer.encode(word, add_special_tokens=False).ids
                # A tokenizer that marks the beginning of a word writes a digit as mark and digit.
                ids = ids[-1:] if name.isdigit() else ids
                if ids:
                    table[i, ids[0]] = 1.0
        tables.append(table)
    return tables


class HintHeads(nn.Module):
    """Ask the features what they show.

    An answer says little about a picture. Asking every patch what is on it teaches the vision tower shapes,
    colours and motion within minutes. Asking the language model's cells for their row and column gives it a
    sense of place. And asking them for the words of what they show, through the embeddings that the questions
    are made of, lets a question find the cell that it is about.
    """

    SIZES = (len(THINGS) + 1, len(TINTS) + 1, len(WAYS))
    SIDE = 8

    def __init__(self, width: int, hidden: int, words: Sequence[Tensor], nothing: int) -> None:
        """`words`: for each sort of hint the (size, vocabulary) table of its words; `nothing`: a token."""
        super().__init__()
        self.words, self.nothing = words, nothing
        self.patch = nn.Linear(width, sum(self.SIZES))
        self.cell = nn.Linear(hidden, 2 * self.SIDE)
        self.loss = torch.zeros(())

    def _naming_loss(self, seen: Seen, states: Tensor, hints: Tensor, embeddings: Tensor) -> Tensor:
        """How far the cells are from saying what they show."""
        said = sum(table[hints[..., i]] for i, table in enumerate(self.words))
        named = seen.rows >= 0
        wanted = (seen.cells[named] @ said).flatten(0, 1)
        empty = wanted.sum(1) == 0
        wanted[empty, self.nothing] = 1.0
        wanted /= wanted.sum(1, keepdim=True)
        share = torch.where(empty, 0.1, 1.0)
        loss = torch.zeros(())
        for cell in (seen.features[:, named], states[:, named]):
            logits = F.rms_norm(cell, cell.shape[-1:]).flatten(0, -2) @ embeddings.t()
            loss = loss - ((wanted * logits.log_softmax(-1)).sum(1) * share).sum() / share.sum()
        return loss

    def forward(
        self, views: Sequence[Seen], states: Sequence[Tensor], hints: Sequence[Tensor], embeddings: Tensor
    ) -> None:
        """For each view what it became, the language model's states there, and the hints of its patches."""
        losses = [torch.zeros(())]
        for seen, state, hint in zip(views, states, hints, strict=True):
            hint = hint.flatten(1, 2)
            losses.append(self._naming_loss(seen, state, hint, embeddings))
            truth = hint.reshape(-1, 3)
            guesses = self.patch(seen.patches.reshape(len(truth), -1)).split(self.SIZES, dim=1)
            for i, guess in enumerate(guesses):
                share = torch.full((guess.shape[1],), 1.0)
                share[0] = 0.1  # nearly every patch is empty
                losses.append(F.cross_entropy(guess, truth[:, i], share))
            for guess, where in zip(self.cell(state).split(self.SIDE, dim=-1), (seen.rows, seen.columns)):
                truth = where.expand(len(state), -1)
                losses.append(F.cross_entropy(guess.flatten(0, 1), truth.flatten()))
        self.loss = torch.stack(losses).sum() / max(1, len(views))

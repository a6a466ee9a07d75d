"""Turns scenes into batches of conversations, through the same resizing as the real image processor."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Batch
from scenes import COLOURS, DIRECTIONS, SHAPES, SMALL_TALK, STILL, Mark, Scene, Size, make_scene, plural

CELL = 28
SYSTEM = "You are a helpful assistant."
GRIDS: dict[str, tuple[int, int, dict[int, float]]] = {
    "objects": (1, 64, {2: 3, 3: 4, 4: 4, 5: 2, 6: 1.5, 7: 1, 8: 1}),
    "count": (9, 64, {3: 5, 4: 5, 5: 4, 6: 3, 7: 1.2, 8: 1}),
    "number": (1, 49, {2: 4, 3: 4, 4: 4, 5: 2.5, 6: 1.5, 7: 0.5}),
    "compare": (9, 36, {3: 5, 4: 5, 5: 3, 6: 0.7}),
    "motion": (1, 25, {2: 4, 3: 4, 4: 2, 5: 0.7}),
}
"""Per scene: fewest and most cells, and how often a side has so many cells of 28 pixels."""


def draw_grid(name: str, rng: random.Random) -> tuple[int, int]:
    fewest, most, sides = GRIDS[name]
    while True:
        gh, gw = rng.choices(list(sides), list(sides.values()), k=2)
        if fewest <= gh * gw <= most:
            return gh, gw


def size_for(grid: tuple[int, int], name: str, rng: random.Random) -> Size:
    """A picture size that the processor brings to the grid: the exact one, or one that needs resizing."""
    smallest = CELL * min(GRIDS[name][2])
    gh, gw = grid
    if rng.random() < 0.5:
        return gw * CELL, gh * CELL
    return max(smallest, gw * CELL + rng.randint(-13, 13)), max(smallest, gh * CELL + rng.randint(-13, 13))


THINGS = {name: i for i, name in enumerate((*SHAPES, *"0123456789"), start=1)}
TINTS = {name: i for i, name in enumerate(COLOURS, start=1)}
WAYS = {"": 0, **{name: i for i, name in enumerate((*DIRECTIONS, STILL), start=1)}}


def hint_words(tokenizer: Tokenizer) -> list[torch.Tensor]:
    """For each kind of hint which tokens are words for it: tables of (hints, vocabulary)."""
    tables = []
    for names in (THINGS, TINTS, WAYS):
        table = torch.zeros(max(names.values()) + 1, tokenizer.get_vocab_size())
        for name, i in names.items():
            forms = (name,) if not name or name.isdigit() else (name, f" {name}")
            for word in (*forms, f" {plural(name)}") if name in SHAPES else forms:
                ids = tokenizer.encode(word).ids
                if ids:
                    table[i, ids[0]] = 1.0
        tables.append(table)
    return tables


def to_hints(marks: Sequence[Mark], size: Size, grid: tuple[int, int]) -> np.ndarray:
    """For every patch of 14 pixels the thing, colour and motion whose centre lies there: (patches, 3)."""
    gh, gw = grid
    hints = np.zeros((gh, gw, 2, 2, 3), dtype=np.int64)
    for mark in marks:
        row = min(2 * gh - 1, max(0, int(mark.y * gh * 2 / size[1])))
        column = min(2 * gw - 1, max(0, int(mark.x * gw * 2 / size[0])))
        hint = THINGS[mark.name], TINTS[mark.colour], WAYS[mark.way]
        hints[row // 2, column // 2, row % 2, column % 2] = hint
    return hints.reshape(-1, 3)


def to_pixels(picture: Image.Image, grid: tuple[int, int]) -> np.ndarray:
    target = grid[1] * CELL, grid[0] * CELL
    return np.asarray(picture if picture.size == target else picture.resize(target, Image.Resampling.BICUBIC))


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

    def text(self, ids: Sequence[int], learn: bool = False) -> None:
        if learn:
            # The token before predicts the first one.
            weight = len(ids) ** -0.5
            self.targets[-1], self.weights[-1] = ids[0], weight
            self.targets += [*ids[1:], -100]
            self.weights += [weight] * len(ids)
        else:
            self.targets += [-100] * len(ids)
            self.weights += [0.0] * len(ids)
        self.ids += ids
        self.branches += [self.branch] * len(ids)
        self.positions += [(self.next + i,) * 3 for i in range(len(ids))]
        self.next += len(ids)

    def vision(self, pad: int, steps: int, grid: tuple[int, int]) -> None:
        gh, gw = grid
        cells = [(t, h, w) for t in range(steps) for h in range(gh) for w in range(gw)]
        self.places.append(list(range(len(self.ids), len(self.ids) + len(cells))))
        self.positions += [(self.next + t, self.next + h, self.next + w) for t, h, w in cells]
        self.next += max(steps, gh, gw)
        self.ids += [pad] * len(cells)
        self.branches += [self.branch] * len(cells)
        self.targets += [-100] * len(cells)
        self.weights += [0.0] * len(cells)


class BatchMaker:
    """Draws batches; one batch holds one kind of scene at one picture size."""

    def __init__(self, tokenizer: Path, seeds: tuple[int, int], patches: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.seeds = seeds
        self.patches = patches
        self.encode = lru_cache(maxsize=50_000)(lambda text: self.tokenizer.encode(text).ids)
        self.image_pad = self.encode("<|image_pad|>")[0]
        self.video_pad = self.encode("<|video_pad|>")[0]

    def _see(
        self, s: Tokens, video: bool, steps: int, grids: Sequence[tuple[int, int]], numbered: bool
    ) -> None:
        for i, grid in enumerate(grids):
            name = "Video" if video else "Picture"
            s.text(self.encode((f"{name} {i + 1}: " if numbered else "") + "<|vision_start|>"))
            s.vision(self.video_pad if video else self.image_pad, steps, grid)
            s.text(self.encode("<|vision_end|>"))

    def _turn(self, s: Tokens, question: str, answer: str, opened: bool) -> None:
        start = "" if opened else "<|im_start|>user\n"
        s.text(self.encode(f"{start}{question}<|im_end|>\n<|im_start|>assistant\n"))
        s.text(self.encode(f"{answer}<|im_end|>"), learn=True)

    def conversation(
        self,
        scene: Scene,
        steps: int,
        grids: Sequence[tuple[int, int]],
        rng: random.Random,
        branches: int,
        plain: bool,
    ) -> Tokens:
        """One scene's conversation tree. `plain` leaves out the rarer forms."""
        s = Tokens()
        video = bool(scene.frames)
        form = "tree" if plain else rng.choices(("tree", "turns", "text first", "greeted"), (80, 10, 7, 3))[0]
        system = SYSTEM if plain or rng.random() < 0.97 else "Look at the picture and answer."
        s.text(self.encode(f"<|im_start|>system\n{system}<|im_end|>\n"))
        asked = rng.sample(scene.questions, min(branches, len(scene.questions)))
        if scene.questions[-1][0] == "describe" and not plain:
            asked[-1] = scene.questions[-1]  # the longest answer by far, and the most to learn from
            asked = list(dict.fromkeys(asked))
        numbered = not plain and rng.random() < 0.05
        if form == "text first":
            kind, question, answer = asked[0]
            s.kinds = [kind]
            s.text(self.encode(f"<|im_start|>user\n{question}"))
            self._see(s, video, steps, grids, numbered)
            self._turn(s, "", answer, opened=True)
            return s
        if form == "greeted":
            self._turn(s, *rng.choice(list(SMALL_TALK.items())), opened=False)
            s.text(self.encode("\n"))
        s.text(self.encode("<|im_start|>user\n"))
        self._see(s, video, steps, grids, numbered)
        s.kinds = [kind for kind, _, _ in asked]
        fork = s.next
        for i, (_, question, answer) in enumerate(asked):
            if form == "turns":
                if i:
                    s.text(self.encode("\n"))
                self._turn(s, question, answer, opened=i == 0)
            else:
                s.branch, s.next = i + 1, fork
                self._turn(s, question, answer, opened=True)
        return s

    def talk(self, rng: random.Random, count: int) -> Batch:
        """Conversations without a picture."""
        made = []
        for _ in range(count):
            s = Tokens()
            s.text(self.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"))
            for i in range(rng.choice((1, 1, 2))):
                if i:
                    s.text(self.encode("\n"))
                self._turn(s, *rng.choice(list(SMALL_TALK.items())), opened=False)
                s.kinds.append("talk")
            made.append(s)
        return self._collate("talk", made, [])

    def batch(self, name: str, rng: random.Random, count: int | None = None, plain: bool = False) -> Batch:
        if name == "talk":
            return self.talk(rng, count or 16)
        grids = [draw_grid(name, rng) for _ in range(2 if name == "compare" else 1)]
        steps = rng.choice((2, 3, 3, 4)) if name == "motion" else 1
        patches = 4 * steps * sum(gh * gw for gh, gw in grids)
        count = count or min(64, max(6, self.patches // (patches + 48)))
        branches = 8 if plain else {"motion": 4, "number": 2}.get(name, 5)
        made, pictures, hints = [], [], []
        for _ in range(count):
            seed = rng.randrange(*self.seeds)
            sizes = [size_for(grid, name, rng) for grid in grids]
            options: dict[str, object] = {}
            if name == "compare":
                options["second"] = sizes[1]
            elif name == "motion":
                options["frames"] = 2 * steps - (rng.random() < 0.3)
            scene = make_scene(name, seed, sizes[0], **options)
            frames = scene.frames + scene.frames[-1:] * (len(scene.frames) % 2)
            if frames:
                pictures.append([np.stack([to_pixels(frame, grids[0]) for frame in frames])])
                hints.append([np.stack([to_hints(m, sizes[0], grids[0]) for m in scene.marks[::2]])])
            else:
                hints.append(
                    [to_hints(m, *at)[None] for m, *at in zip(scene.marks, sizes, grids, strict=True)]
                )
                pictures.append(
                    [
                        to_pixels(picture, grid)[None]
                        for picture, grid in zip(scene.images, grids, strict=True)
                    ]
                )
            made.append(self.conversation(scene, steps, grids, rng, branches, plain))
        pixels = [torch.from_numpy(np.stack([p[i] for p in pictures])) for i in range(len(pictures[0]))]
        batch = self._collate(name, made, pixels)
        batch.hints = [torch.from_numpy(np.stack([h[i] for h in hints])) for i in range(len(hints[0]))]
        return batch

    def _collate(self, name: str, made: list[Tokens], pixels: list[torch.Tensor]) -> Batch:
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
        places = [torch.tensor([s.places[i] for s in made]) for i in range(len(pixels))]
        return Batch(
            pixels, places, ids, positions, branches, targets, weights, [s.kinds for s in made], name
        )

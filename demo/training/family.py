"""What training has to know of a model family."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batch import Tokens
from drawing import Mark, Size
from export import write
from hints import THINGS, TINTS, WAYS
from network import Network
from safetensors.torch import load_file
from scenes import Scene
from tokenizers import Tokenizer
from torch import Tensor

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
Encode = Callable[[str], list[int]]
DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Plan:
    """What all conversations of a batch share: how each picture is cut, and how many frames a film has."""

    shapes: tuple[Any, ...]
    frames: int = 0


@dataclass(frozen=True)
class View:
    """What the tower gets of a picture: uint8 (frames, height, width, 3), and its patches' hints."""

    pixels: np.ndarray
    hints: np.ndarray
    shape: Any = None


class Family(ABC):
    """How a family cuts pictures, writes conversations and stores weights."""

    name: ClassVar[str]
    scenes: ClassVar[Mapping[str, float]]
    """The scenes that it is trained on, and how often each comes at first."""
    forms: ClassVar[tuple[str, ...]] = ("tree", "turns", "text first", "greeted")
    """Forms that a conversation may have in its chat format."""
    end: ClassVar[str]
    """The token that ends an answer."""
    nothing: ClassVar[str]
    """A token that no answer has: an empty cell shall say it."""
    options: ClassVar[Mapping[str, Any]] = {}
    """What opsin has to be told (``mm_processor_kwargs``) to cut pictures as training does."""
    separator: ClassVar[str] = ""
    """Text between an answer and the next question."""
    dtype: ClassVar[torch.dtype] = torch.float16
    """What weights are stored in."""

    @property
    def folder(self) -> Path:
        return CHECKPOINTS / f"tiny_{self.name}/src/opsin_tiny_{self.name}/model"

    @abstractmethod
    def network(self, words: Tokenizer) -> Network: ...

    @abstractmethod
    def draw(self, scene: str, rng: random.Random) -> Plan: ...

    @abstractmethod
    def size_for(self, shape: Any, scene: str, rng: random.Random) -> Size:
        """A size of picture that is cut into this shape."""

    @abstractmethod
    def patches(self, plan: Plan) -> int:
        """How much work the pictures of one conversation are."""

    @abstractmethod
    def look(self, scene: Scene, plan: Plan, sizes: Sequence[Size]) -> list[View]: ...

    @abstractmethod
    def begin(self, s: Tokens, encode: Encode, system: str | None) -> None:
        """What stands before the first question; `system`: None for what the family has by itself."""

    @abstractmethod
    def show(self, s: Tokens, encode: Encode, plan: Plan, numbered: bool, only: int | None = None) -> None:
        """The pictures, in the order of `look`; `only`: that one, the others have their own messages."""

    @abstractmethod
    def ask(self, s: Tokens, encode: Encode, question: str, pictured: bool) -> None:
        """A question up to where the answer begins; `pictured`: pictures stand before it.

        An empty question was written before the pictures, by `open_turn`.
        """

    @abstractmethod
    def open_turn(self, s: Tokens, encode: Encode, question: str = "") -> None:
        """What begins a question that pictures will stand in; `question`: text before the pictures."""

    @abstractmethod
    def settings(self, network: Network, words: Tokenizer) -> dict[str, object]:
        """The JSON files that lie beside the weights, by name."""

    @abstractmethod
    def stored(self, network: Network) -> dict[str, Tensor]:
        """The weights under the names of the hub's files: the network's own, where nothing is rearranged."""

    def export(self, network: Network, words: Tokenizer, folder: Path) -> None:
        """Writes a checkpoint; the tokenizer's files must be there already."""
        write(folder, self.settings(network, words), self.stored(network), self.dtype)

    @torch.no_grad()
    def load(self, network: Network, folder: Path) -> None:
        """Takes over the weights of a checkpoint that `export` has written."""
        file = load_file(folder / "model.safetensors")
        for name, own in self.stored(network).items():
            own.copy_(file[name])


class ChatMLFamily(Family):
    """A family with Qwen2's chat format."""

    end = "<|im_end|>"
    separator = "<|im_end|>\n"
    after_pictures: ClassVar[str] = ""
    """Text between pictures and the question, whichever comes first."""

    def begin(self, s: Tokens, encode: Encode, system: str | None) -> None:
        s.text(encode(f"<|im_start|>system\n{system or DEFAULT_SYSTEM}<|im_end|>\n"))

    def open_turn(self, s: Tokens, encode: Encode, question: str = "") -> None:
        s.text(encode("<|im_start|>user\n" + (question + self.after_pictures if question else "")))

    def ask(self, s: Tokens, encode: Encode, question: str, pictured: bool) -> None:
        start = (self.after_pictures if question else "") if pictured else "<|im_start|>user\n"
        s.text(encode(f"{start}{question}<|im_end|>\n<|im_start|>assistant\n"))


Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the picture."""


def patch_hints(marks: Sequence[Mark], grid: tuple[int, int], window: Box) -> np.ndarray:
    """For every patch of a grid the thing, colour and motion whose centre lies there: (rows, columns, 3).

    `window`: the part of the picture that the grid covers; what lies outside is left out.
    """
    (rows, columns), (left, top, right, bottom) = grid, window
    hints = np.zeros((rows, columns, 3), dtype=np.int64)
    for mark in marks:
        x, y = (mark.x - left) / (right - left), (mark.y - top) / (bottom - top)
        if 0 <= x <= 1 and 0 <= y <= 1:
            hint = THINGS[mark.name], TINTS[mark.colour], WAYS[mark.way]
            hints[min(rows - 1, int(y * rows)), min(columns - 1, int(x * columns))] = hint
    return hints

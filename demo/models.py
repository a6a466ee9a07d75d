"""The demonstration models: what each can be asked, and about pictures of which sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from drawing import Size
from scenes import KINDS, Question, make_question

Sizes = Sequence[Size | None]
"""Widths and heights of pictures, taken in turn; None: drawn from the seed."""

OBJECTS = ("colour", "shape", "position", "describe")
"""Kinds of question that are asked about the same sort of scene."""

NUMBERS = ("number", "describe a number")
MOTIONS = ("motion", "describe a video", "describe frames")

SQUARES: Mapping[str, Sizes] = {
    **dict.fromkeys(OBJECTS, ((56, 56), (84, 84), (112, 112), (140, 140), (168, 168))),
    "count": ((84, 84), (100, 100), (112, 112), (128, 128), (150, 150)),
    **dict.fromkeys(NUMBERS, ((56, 56), (84, 84), (100, 100), (112, 112), (140, 140))),
    "nothing": ((56, 56), (84, 84), (112, 112), (140, 140), (168, 168)),
}
SMALL: Mapping[str, Sizes] = {
    **dict.fromkeys(OBJECTS, ((56, 56), (84, 112), (133, 100), (168, 168), (190, 90))),
    "count": ((84, 84), (84, 112), (133, 100), (140, 140), (168, 168)),
    **dict.fromkeys(NUMBERS, ((56, 56), (84, 84), (112, 84), (112, 112), (128, 96))),
    "compare": ((84, 84), (84, 112), (112, 100), (112, 112), (128, 96)),
    **dict.fromkeys(MOTIONS, ((56, 56), (84, 112), (100, 75), (112, 112), (126, 98))),
    "describe each": ((56, 56), (84, 112), (112, 84), (112, 112), (126, 98)),
    "nothing": ((56, 56), (84, 112), (133, 100), (168, 168), (190, 90)),
}
ALL: Mapping[str, Sizes] = {
    **dict.fromkeys(OBJECTS, ((56, 56), (84, 112), (133, 100), (168, 168), (224, 160), None)),
    "count": ((84, 84), (112, 140), (133, 100), (168, 168), (224, 160), None),
    **dict.fromkeys(NUMBERS, ((56, 56), (84, 84), (133, 100), (140, 112), (168, 140), None)),
    "compare": ((84, 84), (84, 112), (133, 100), (140, 112), (140, 140), None),
    **dict.fromkeys(MOTIONS, ((56, 56), (84, 112), (100, 75), (112, 112), (140, 98), None)),
    "describe each": ((56, 56), (84, 112), (112, 84), (140, 112), (168, 168)),
    "nothing": ((56, 56), (84, 112), (133, 100), (168, 168), (224, 160), None),
}


@dataclass(frozen=True)
class DemoModel:
    """A checkpoint of demo/checkpoints.

    Attributes:
        id: what `opsin.LLM` knows it by.
        title: the family's name.
        sizes: for each kind of question that it answers, the sizes of pictures that it is asked about.
    """

    id: str
    title: str
    sizes: Mapping[str, Sizes] = field(repr=False)

    @property
    def kinds(self) -> list[str]:
        """What it can be asked, in the order of `scenes.KINDS`."""
        return [kind for kind in KINDS if kind in self.sizes]

    def question(self, kind: str, seed: int) -> tuple[str, Question]:
        """A question of a kind, and the size of its pictures in words."""
        sizes = self.sizes[kind]
        size = sizes[seed % len(sizes)]
        return "mixed" if size is None else f"{size[0]}×{size[1]}", make_question(kind, seed, size)


def _without(sizes: Mapping[str, Sizes], *kinds: str) -> Mapping[str, Sizes]:
    return {kind: of_kind for kind, of_kind in sizes.items() if kind not in kinds}


MODELS: dict[str, DemoModel] = {
    # Of a picture that is not a square its tower sees the middle alone.
    "llava": DemoModel("opsin/tiny-llava", "LLaVA-1.5", SQUARES),
    "minicpmv": DemoModel("opsin/tiny-minicpmv", "MiniCPM-V 2.6", SMALL),
    "phi3v": DemoModel("opsin/tiny-phi3v", "Phi-3.5-vision", _without(SMALL, *MOTIONS)),
    "qwen2vl": DemoModel("opsin/tiny-qwen2vl", "Qwen2-VL", ALL),
}

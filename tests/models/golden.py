"""Reading recorded cases (tests/golden) and holding an `LLM` against them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from opsin import LLM
from tests.models.families import FAMILIES

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Case:
    """One recorded case of a family."""

    family: str
    name: str
    data: dict[str, Any]
    tensors: dict[str, Tensor]

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    def media(self) -> dict[str, Any]:
        """``multi_modal_data`` of the case."""
        media: dict[str, Any] = {}
        if self.data.get("images"):
            media["image"] = [picture(name) for name in self.data["images"]]
        if self.data.get("videos"):
            media["video"] = [[picture(name) for name in video] for video in self.data["videos"]]
        return media

    def prompt(self) -> dict[str, Any]:
        """The case as a prompt for `LLM.generate`."""
        return {
            "prompt": self.data["prompt"],
            "multi_modal_data": self.media(),
            "mm_processor_kwargs": self.options(),
        }

    def options(self) -> dict[str, Any]:
        """``mm_processor_kwargs`` of the case."""
        more = FAMILIES[self.family].case_options.get(self.name, {})
        return {**(self.data.get("mm_processor_kwargs") or {}), **more}

    def token_ids(self) -> list[int]:
        """The expanded prompt; where the recording marks pictures with negative ids, with the token's id."""
        ids: list[int] = self.data.get("prompt_token_ids_image_token") or self.data["prompt_token_ids"]
        return ids

    def differs(self, name: str, value: Tensor) -> float:
        """Largest absolute difference of a tensor from the recorded one (or its recorded sample)."""
        description = self.data["tensors"][name]
        assert list(value.shape) == description["shape"]
        if description["stored"] == "full":
            return float((value - self.tensors[name]).abs().max())
        sampled = value.flatten()[:: description["stride"]]
        return float((sampled - self.tensors[description["key"]]).abs().max())


def picture(name: str) -> Image.Image:
    """One of the recorded pictures, as it was recorded: the RGBA one without its alpha channel."""
    return Image.open(GOLDEN / "images" / name).convert("RGB")


def cases(family: str, *, runs_model: bool = True) -> list[Case]:
    """The cases of a family; ``runs_model`` False: those that only preprocess."""
    found = []
    for file in sorted((GOLDEN / family / "cases").glob("*/case.json")):
        data = json.loads(file.read_text())
        if (data["model_dir"] is not None) == runs_model:
            tensors = load_file(file.with_name("tensors.safetensors"))
            found.append(Case(family, data["case"], data, tensors))
    assert found
    return found


@contextmanager
def recorded_logits(llm: LLM) -> Iterator[list[Tensor]]:
    """The logits the model gives inside the block, one (rows, V) tensor per call."""
    model = llm.engine.executor.model
    original, seen = model.logits, []

    def logits(hidden: Tensor) -> Tensor:
        given = original(hidden)
        seen.append(given.clone())
        return given

    model.logits = logits  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        model.logits = original  # type: ignore[method-assign]


def largest_difference(left: Tensor, right: Tensor) -> float:
    """Over all elements."""
    return float((left - right).abs().max())


__all__ = ["GOLDEN", "Case", "cases", "largest_difference", "picture", "recorded_logits", "torch"]

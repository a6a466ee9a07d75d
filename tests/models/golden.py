"""Reading recorded cases (tests/golden) and holding an `LLM` against them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from opsin.testing.models import RecordedCase as Case
from opsin.testing.models import recorded_cases, recorded_logits
from tests.models.families import FAMILIES

GOLDEN = Path(__file__).parents[1] / "golden"


def picture(name: str) -> Image.Image:
    """One of the recorded pictures, as it was recorded: the RGBA one without its alpha channel."""
    return Image.open(GOLDEN / "images" / name).convert("RGB")


def cases(family: str, *, runs_model: bool = True) -> Sequence[Case]:
    """The cases of a family; ``runs_model`` False: those that only preprocess."""
    options = FAMILIES[family].case_options
    return recorded_cases(GOLDEN / family, GOLDEN / "images", runs_model=runs_model, more_options=options)


def largest_difference(left: Tensor, right: Tensor) -> float:
    """Over all elements."""
    return float((left - right).abs().max())


__all__ = ["GOLDEN", "Case", "cases", "largest_difference", "picture", "recorded_logits", "torch"]

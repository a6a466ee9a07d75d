"""Cases that were recorded of another implementation, for families that transformers does not have.

A case is a folder with ``case.json`` and ``tensors.safetensors``. What the former may have:

- ``case``: its name; ``prompt``: as a user writes it; ``prompt_token_ids``: expanded;
- ``images`` and ``videos``: names of picture files (a list of frames for each video), in the order of their
  placeholders; ``mm_processor_kwargs``: options of the request;
- ``greedy_token_ids``, and ``greedy_safe_len``: how many of them are clear enough to be compared;
- ``model_dir``: the checkpoint; null where only preprocessing was recorded, with the published settings;
- ``tensors``: name -> ``shape``, and how it is ``stored``: "full", or a sample of every ``stride``-th element
  of the flat tensor, under ``key``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class RecordedCase:
    """One recorded case.

    Attributes:
        family: name of the folder whose ``cases`` it is from.
        name: of the case.
        data: case.json.
        tensors: tensors.safetensors.
        picture: opens a picture by its name.
        more_options: ``mm_processor_kwargs`` besides the recorded ones.
    """

    family: str
    name: str
    data: dict[str, Any]
    tensors: dict[str, Tensor]
    picture: Callable[[str], Image.Image]
    more_options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    def media(self) -> dict[str, Any]:
        """``multi_modal_data`` of the case."""
        media: dict[str, Any] = {}
        if self.data.get("images"):
            media["image"] = [self.picture(name) for name in self.data["images"]]
        if self.data.get("videos"):
            media["video"] = [[self.picture(name) for name in video] for video in self.data["videos"]]
        return media

    def options(self) -> dict[str, Any]:
        """``mm_processor_kwargs`` of the case."""
        return {**(self.data.get("mm_processor_kwargs") or {}), **self.more_options}

    def prompt(self) -> dict[str, Any]:
        """The case as a prompt for `LLM.generate`."""
        return {
            "prompt": self.data["prompt"],
            "multi_modal_data": self.media(),
            "mm_processor_kwargs": self.options(),
        }

    def token_ids(self) -> list[int]:
        """The expanded prompt; where the recording marks pictures with negative ids, with the token's id."""
        ids: list[int] = self.data.get("prompt_token_ids_image_token") or self.data["prompt_token_ids"]
        return ids

    def differs(self, name: str, value: Tensor) -> float:
        """Largest absolute difference of a tensor from the recorded one, or from its recorded sample.

        Raises:
            AssertionError: it has another shape.
        """
        description = self.data["tensors"][name]
        got, expected = list(value.shape), description["shape"]
        assert got == expected, f"{self}: {name} has shape {got}, recorded {expected}"
        if description["stored"] == "full":
            return float((value - self.tensors[name]).abs().max())
        sampled = value.flatten()[:: description["stride"]]
        return float((sampled - self.tensors[description["key"]]).abs().max())


def recorded_cases(
    folder: str | Path,
    pictures: str | Path,
    *,
    runs_model: bool = True,
    more_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Sequence[RecordedCase]:
    """The cases under ``folder/cases``.

    Args:
        folder: of a family.
        pictures: folder of the pictures that cases name. They are opened as RGB, without alpha channel.
        runs_model: the cases with a checkpoint; False: those that only preprocess.
        more_options: case -> ``mm_processor_kwargs`` it needs besides the recorded ones.

    Raises:
        ValueError: there are none.
    """
    from safetensors.torch import load_file

    folder, pictures = Path(folder), Path(pictures)

    def picture(name: str) -> Image.Image:
        return Image.open(pictures / name).convert("RGB")

    found = []
    for file in sorted((folder / "cases").glob("*/case.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if (data["model_dir"] is not None) == runs_model:
            tensors = load_file(file.with_name("tensors.safetensors"))
            options = (more_options or {}).get(data["case"], {})
            found.append(RecordedCase(folder.name, data["case"], data, tensors, picture, options))
    if not found:
        raise ValueError(f"no recorded cases in {folder / 'cases'}")
    return found

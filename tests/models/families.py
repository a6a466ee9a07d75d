"""What the tests must know of each family to run the same checks over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opsin import LLM
from opsin.api import ProcessedPrompt


@dataclass(frozen=True)
class Family:
    """A family under test.

    Attributes:
        name: its folder in tests/golden.
        image_text: the placeholder a user writes for the n-th image.
        embeds_input: (embeddings of each item, their geometries) -> what ``multi_modal_data["image"]``
            takes instead of pictures.
        has_video: whether it takes videos.
        case_options: recorded case -> ``mm_processor_kwargs`` it needs beside the recorded ones, where it was
            recorded from another implementation than the rest.
    """

    name: str
    image_text: Callable[[int], str]
    embeds_input: Callable[[Sequence[Tensor], Sequence[Any]], Any]
    has_video: bool = False
    case_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FAMILIES = {
    family.name: family
    for family in [
        *(
            Family(
                name=name,
                image_text=lambda number: "<|vision_start|><|image_pad|><|vision_end|>",
                embeds_input=lambda embeds, grids: {
                    "image_embeds": torch.cat(list(embeds)),
                    "image_grid_thw": torch.tensor(list(grids)),
                },
                has_video=True,
            )
            for name in ("qwen2vl", "qwen25vl", "qwen3vl")
        ),
        Family(
            name="llava15",
            image_text=lambda number: "<image>",
            embeds_input=lambda embeds, geometries: torch.stack(list(embeds)),
        ),
        Family(
            name="llava_next",
            image_text=lambda number: "<image>",
            embeds_input=lambda embeds, geometries: list(embeds),
        ),
        Family(
            name="phi3v",
            image_text=lambda number: f"<|image_{number}|>",
            embeds_input=lambda embeds, geometries: list(embeds),
            case_options={"single_image_whole_prompt": {"tokenize_whole_prompt": True}},
        ),
        *(
            Family(
                name=name,
                image_text=lambda number: "(<image>./</image>)",
                embeds_input=lambda embeds, geometries: {
                    # The recorded checkpoints have 16 queries.
                    "image_embeds": torch.cat([part.unflatten(0, (-1, 16)) for part in embeds]),
                    "image_sizes": [size for geometry in geometries for size in geometry.sizes],
                },
                has_video=name == "minicpmv26",
            )
            for name in ("minicpmv20", "minicpmv25", "minicpmv26")
        ),
        Family(
            name="internvl",
            image_text=lambda number: "<IMG_CONTEXT>",
            embeds_input=lambda embeds, geometries: list(embeds),
            has_video=True,
        ),
        Family(
            name="smolvlm",
            image_text=lambda number: "<image>",
            embeds_input=lambda embeds, squares: {
                "image_embeds": list(embeds),
                "rows": [part.rows for part in squares],
                "cols": [part.columns for part in squares],
            },
            has_video=True,
        ),
    ]
}


def encoded(llm: LLM, prompt: ProcessedPrompt) -> list[Tensor]:
    """The embeddings of each medium of a processed prompt, by the model itself."""
    with torch.inference_mode():
        return [
            llm.engine.executor.model.encode(item.modality, [item.mapped])[0].clone() for item in prompt.media
        ]

"""The torch-free door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsin import hookimpl
from opsin.api import (
    BuildContext,
    Expansion,
    InputContext,
    InputMapper,
    InputMapperSpec,
    MappedMedia,
    MediaItem,
    Model,
    ModelSpec,
    Placeholder,
    PlaceholderSpec,
)

ARCHITECTURE = "AcmeToyForConditionalGeneration"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def _build(context: BuildContext) -> Model:
    from acme_toy_model.model import ToyModel

    return ToyModel(context)


class QuadrantMapper:
    """A picture -> the mean colours of its four quadrants."""

    option_names: frozenset[str] = frozenset()

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        import torch

        assert item.pixels is not None
        height, width, _ = item.pixels.shape
        if height < 2 or width < 2:
            raise ValueError(f"got a picture of {width}x{height} pixels, expected at least 2x2")
        pixels = torch.tensor(item.pixels, dtype=torch.float32) / 255
        rows = (pixels[: height // 2], pixels[height // 2 :])
        quadrants = [part for row in rows for part in (row[:, : width // 2], row[:, width // 2 :])]
        colours = torch.stack([quadrant.mean((0, 1)) for quadrant in quadrants])
        return MappedMedia(num_embeds=4, tensors={"colours": colours})

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Any]]:
        raise ValueError("this model takes pictures, not embeddings")


def _mapper(context: InputContext) -> InputMapper:
    return QuadrantMapper()


def _placeholder(context: InputContext) -> Placeholder:
    token_id = context.tokenizer.convert_tokens_to_ids("<image>")

    def expand(mapped: MappedMedia, number: int) -> Expansion:
        return Expansion(token_ids=[token_id] * mapped.num_embeds, is_embed=[True] * mapped.num_embeds)

    return Placeholder(text=lambda number: "<image>", token_id=token_id, expand=expand)


@hookimpl
def opsin_register_models() -> Sequence[ModelSpec]:
    return [
        ModelSpec(
            architecture=ARCHITECTURE,
            build=_build,
            default_chat_template=CHAT_TEMPLATE,
            content_format="openai",
        )
    ]


@hookimpl
def opsin_register_input_mappers() -> Sequence[InputMapperSpec]:
    return [InputMapperSpec(architecture=ARCHITECTURE, modality="image", build=_mapper)]


@hookimpl
def opsin_register_placeholders() -> Sequence[PlaceholderSpec]:
    return [PlaceholderSpec(architecture=ARCHITECTURE, modality="image", build=_placeholder)]

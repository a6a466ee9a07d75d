"""The torch-free door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsin import hookimpl
from opsin.api import (
    BuildContext,
    InputContext,
    InputMapper,
    InputMapperSpec,
    Model,
    ModelSpec,
    PlacedMedia,
    Placeholder,
    PlaceholderSpec,
    Positions,
)

ARCHITECTURE = "AcmeFamilyForConditionalGeneration"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def _build(context: BuildContext) -> Model:
    from acme_family_model.model import FamilyModel

    return FamilyModel(context)


def _mapper(context: InputContext) -> InputMapper:
    from acme_family_model.inputs import SquareMapper

    return SquareMapper(context)


def _placeholder(context: InputContext) -> Placeholder:
    from acme_family_model.inputs import placeholder

    return placeholder(context)


def _positions(
    config: Mapping[str, Any], token_ids: Sequence[int], media: Sequence[PlacedMedia]
) -> Positions:
    from acme_family_model.inputs import positions

    return positions(config, token_ids, media)


@hookimpl
def opsin_register_models() -> Sequence[ModelSpec]:
    return [
        ModelSpec(
            architecture=ARCHITECTURE,
            build=_build,
            positions=_positions,
            default_chat_template=lambda config: CHAT_TEMPLATE,
            tasks=("generate", "embed"),
            max_len=lambda config: config["max_position_embeddings"],
            stop_tokens=("<eos>",),
        )
    ]


@hookimpl
def opsin_register_input_mappers() -> Sequence[InputMapperSpec]:
    return [InputMapperSpec(architecture=ARCHITECTURE, modality="image", build=_mapper)]


@hookimpl
def opsin_register_placeholders() -> Sequence[PlaceholderSpec]:
    return [PlaceholderSpec(architecture=ARCHITECTURE, modality="image", build=_placeholder)]

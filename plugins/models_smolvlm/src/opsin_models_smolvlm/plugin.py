"""The torch-free door: what this plugin registers. Everything heavy is imported by the builders."""

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

IDEFICS3 = "Idefics3ForConditionalGeneration"
SMOLVLM = "SmolVLMForConditionalGeneration"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}: {{ message['content'] }}"
    "{% else %}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'video' %}<video>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<end_of_utterance>{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The family's chat format, for checkpoints that come without a template."""

STOP_TOKENS = ("<end_of_utterance>",)


def _build_model(context: BuildContext) -> Model:
    from opsin_models_smolvlm.model import SmolVLM

    return SmolVLM(context)


def _positions(config: Mapping[str, Any], ids: Sequence[int], media: Sequence[PlacedMedia]) -> Positions:
    from opsin.layers import sequential_positions
    from opsin_models_smolvlm.config import language_config

    return sequential_positions(language_config(config), len(ids))


def _max_len(config: Mapping[str, Any]) -> int:
    from opsin.layers import context_length
    from opsin_models_smolvlm.config import language_config

    return context_length(language_config(config))


def _image_mapper(context: InputContext) -> InputMapper:
    from opsin_models_smolvlm.inputs import ImageMapper

    return ImageMapper(context)


def _video_mapper(context: InputContext) -> InputMapper:
    from opsin_models_smolvlm.inputs import VideoMapper

    return VideoMapper(context)


def _image_placeholder(context: InputContext) -> Placeholder:
    from opsin_models_smolvlm.prompts import image_placeholder

    return image_placeholder(context)


def _video_placeholder(context: InputContext) -> Placeholder:
    from opsin_models_smolvlm.prompts import video_placeholder

    return video_placeholder(context)


@hookimpl
def opsin_register_models() -> Sequence[ModelSpec]:
    return [
        ModelSpec(
            architecture=architecture,
            build=_build_model,
            positions=_positions,
            default_chat_template=CHAT_TEMPLATE,
            content_format="openai",
            tasks=("generate", "embed"),
            max_len=_max_len,
            stop_tokens=STOP_TOKENS,
        )
        for architecture in (IDEFICS3, SMOLVLM)
    ]


@hookimpl
def opsin_register_input_mappers() -> Sequence[InputMapperSpec]:
    return [
        InputMapperSpec(architecture=IDEFICS3, modality="image", build=_image_mapper),
        InputMapperSpec(architecture=SMOLVLM, modality="image", build=_image_mapper),
        InputMapperSpec(architecture=SMOLVLM, modality="video", build=_video_mapper),
    ]


@hookimpl
def opsin_register_placeholders() -> Sequence[PlaceholderSpec]:
    return [
        PlaceholderSpec(architecture=IDEFICS3, modality="image", build=_image_placeholder),
        PlaceholderSpec(architecture=SMOLVLM, modality="image", build=_image_placeholder),
        PlaceholderSpec(architecture=SMOLVLM, modality="video", build=_video_placeholder),
    ]

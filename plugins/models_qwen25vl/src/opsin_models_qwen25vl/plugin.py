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
    ToolFormat,
)

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"


def _build_model(context: BuildContext) -> Model:
    from opsin_models_qwen25vl.model import Qwen25VL

    return Qwen25VL(context)


def _positions(config: Mapping[str, Any], ids: Sequence[int], media: Sequence[PlacedMedia]) -> Positions:
    from opsin_models_qwen25vl.positions import positions

    return positions(config, ids, media)


def _max_len(config: Mapping[str, Any]) -> int:
    from opsin_models_qwen25vl.config import max_len

    return max_len(config)


def _image_mapper(context: InputContext) -> InputMapper:
    from opsin_models_qwen25vl.inputs import ImageMapper

    return ImageMapper(context)


def _video_mapper(context: InputContext) -> InputMapper:
    from opsin_models_qwen25vl.inputs import VideoMapper

    return VideoMapper(context)


def _image_placeholder(context: InputContext) -> Placeholder:
    from opsin_models_qwen25vl.inputs import placeholder

    return placeholder(context, "<|image_pad|>", "image_token_id")


def _video_placeholder(context: InputContext) -> Placeholder:
    from opsin_models_qwen25vl.inputs import placeholder

    return placeholder(context, "<|video_pad|>", "video_token_id")


def _tool_format(config: Mapping[str, Any]) -> ToolFormat:
    from opsin.api.hermes import HermesTools

    return HermesTools()


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The family's chat format, for checkpoints that come without a template."""


@hookimpl
def opsin_register_models() -> Sequence[ModelSpec]:
    return [
        ModelSpec(
            architecture=ARCHITECTURE,
            build=_build_model,
            positions=_positions,
            default_chat_template=CHAT_TEMPLATE,
            content_format="openai",
            tasks=("generate", "embed"),
            max_len=_max_len,
            tool_format=_tool_format,
        )
    ]


@hookimpl
def opsin_register_input_mappers() -> Sequence[InputMapperSpec]:
    return [
        InputMapperSpec(architecture=ARCHITECTURE, modality="image", build=_image_mapper),
        InputMapperSpec(architecture=ARCHITECTURE, modality="video", build=_video_mapper),
    ]


@hookimpl
def opsin_register_placeholders() -> Sequence[PlaceholderSpec]:
    return [
        PlaceholderSpec(architecture=ARCHITECTURE, modality="image", build=_image_placeholder),
        PlaceholderSpec(architecture=ARCHITECTURE, modality="video", build=_video_placeholder),
    ]

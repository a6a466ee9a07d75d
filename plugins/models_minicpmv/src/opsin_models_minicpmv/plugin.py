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
from opsin_models_minicpmv.versions import default_chat_template, version_of

ARCHITECTURE = "MiniCPMV"


def _build_model(context: BuildContext) -> Model:
    from opsin_models_minicpmv.model import MiniCPMV

    return MiniCPMV(context)


def _max_len(config: Mapping[str, Any]) -> int:
    from opsin.layers import context_length
    from opsin_models_minicpmv.config import language_config

    return context_length(language_config(config))


def _positions(config: Mapping[str, Any], ids: Sequence[int], media: Sequence[PlacedMedia]) -> Positions:
    from opsin.layers import sequential_positions
    from opsin_models_minicpmv.config import language_config

    return sequential_positions(language_config(config), len(ids))


def _image_mapper(context: InputContext) -> InputMapper:
    from opsin_models_minicpmv.inputs import ImageMapper

    return ImageMapper(context)


def _video_mapper(context: InputContext) -> InputMapper | None:
    from opsin_models_minicpmv.inputs import VideoMapper

    return VideoMapper(context) if version_of(context.config) == "2.6" else None


def _image_placeholder(context: InputContext) -> Placeholder:
    from opsin_models_minicpmv.inputs import placeholder

    return placeholder(context, "(<image>./</image>)")


def _video_placeholder(context: InputContext) -> Placeholder | None:
    from opsin_models_minicpmv.inputs import placeholder

    return placeholder(context, "(<video>./</video>)") if version_of(context.config) == "2.6" else None


def _tool_format(config: Mapping[str, Any]) -> ToolFormat | None:
    """2.6 stands on a language model that was trained with this form."""
    from opsin.api.hermes import HermesTools

    return HermesTools() if version_of(config) == "2.6" else None


@hookimpl
def opsin_register_models() -> Sequence[ModelSpec]:
    return [
        ModelSpec(
            architecture=ARCHITECTURE,
            build=_build_model,
            positions=_positions,
            max_len=_max_len,
            default_chat_template=default_chat_template,
            tool_format=_tool_format,
            # The published generation_config of 2.5 leaves out the end of a turn.
            stop_tokens=("<|eot_id|>", "<|im_end|>", "<|endoftext|>"),
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

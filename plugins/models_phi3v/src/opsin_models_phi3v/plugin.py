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

ARCHITECTURE = "Phi3VForCausalLM"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}<|assistant|>\n{% endif %}"
)
"""The family's chat format, for checkpoints that come without a template."""

STOP_TOKENS = ("<|end|>", "<|assistant|>", "<|endoftext|>")
"""What ends an answer; the published configurations name only ``</s>``, which the model does not write."""


def _build_model(context: BuildContext) -> Model:
    from opsin_models_phi3v.model import Phi3V

    return Phi3V(context)


def _positions(config: Mapping[str, Any], ids: Sequence[int], media: Sequence[PlacedMedia]) -> Positions:
    from opsin.layers import sequential_positions
    from opsin_models_phi3v.config import language_config

    return sequential_positions(language_config(config), len(ids))


def _max_len(config: Mapping[str, Any]) -> int:
    from opsin.layers import context_length
    from opsin_models_phi3v.config import language_config

    return context_length(language_config(config))


def _image_mapper(context: InputContext) -> InputMapper:
    from opsin_models_phi3v.inputs import ImageMapper

    return ImageMapper(context)


def _image_placeholder(context: InputContext) -> Placeholder:
    from opsin_models_phi3v.inputs import image_placeholder

    return image_placeholder(context)


@hookimpl
def opsin_register_models() -> Sequence[ModelSpec]:
    return [
        ModelSpec(
            architecture=ARCHITECTURE,
            build=_build_model,
            positions=_positions,
            default_chat_template=CHAT_TEMPLATE,
            content_format="string",
            tasks=("generate", "embed"),
            max_len=_max_len,
            stop_tokens=STOP_TOKENS,
        )
    ]


@hookimpl
def opsin_register_input_mappers() -> Sequence[InputMapperSpec]:
    return [InputMapperSpec(architecture=ARCHITECTURE, modality="image", build=_image_mapper)]


@hookimpl
def opsin_register_placeholders() -> Sequence[PlaceholderSpec]:
    return [PlaceholderSpec(architecture=ARCHITECTURE, modality="image", build=_image_placeholder)]

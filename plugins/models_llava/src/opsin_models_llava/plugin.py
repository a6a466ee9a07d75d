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

LLAVA = "LlavaForConditionalGeneration"
LLAVA_NEXT = "LlavaNextForConditionalGeneration"


def _build_llava(context: BuildContext) -> Model:
    from opsin_models_llava.model import Llava

    return Llava(context)


def _build_llava_next(context: BuildContext) -> Model:
    from opsin_models_llava.model import LlavaNext

    return LlavaNext(context)


def _max_len(config: Mapping[str, Any]) -> int:
    from opsin_models_llava.text import max_len

    return max_len(config)


def _positions(config: Mapping[str, Any], ids: Sequence[int], media: Sequence[PlacedMedia]) -> Positions:
    from opsin.layers import sequential_positions
    from opsin_models_llava.text import language_config

    return sequential_positions(language_config(config), len(ids))


def _square_mapper(context: InputContext) -> InputMapper:
    from opsin_models_llava.inputs import SquareMapper

    return SquareMapper(context)


def _grid_mapper(context: InputContext) -> InputMapper:
    from opsin_models_llava.inputs import GridMapper

    return GridMapper(context)


def _placeholder(context: InputContext) -> Placeholder:
    from opsin_models_llava.inputs import placeholder

    return placeholder(context)


_PARTS = (
    "{% if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text')"
    " | join('SEPARATOR') %}{% endif %}"
)
"""Pictures first, as these models were trained; the message's texts are left in ``text``."""

VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    + _PARTS.replace("SEPARATOR", " ")
    + "{{ text }} "
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""``USER: <image>\\n... ASSISTANT:``, as the hub's checkpoints of LLaVA-1.5 and v1.6-vicuna have it."""

MISTRAL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<<SYS>>\n{% elif message['role'] == 'user' %}[INST] "
    "{% elif message['role'] == 'assistant' %} "
    "{% else %}{{ raise_exception('expected the roles system, user and assistant') }}{% endif %}"
    + _PARTS.replace("SEPARATOR", "")
    + "{{ text }}"
    # In an expression: Jinja drops a line break that follows a tag.
    "{% if message['role'] == 'system' %}{{ '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %} [/INST]"
    "{% else %}</s> {% endif %}"
    "{% endfor %}"
)
"""``[INST] <image>\\n... [/INST]``, as the hub's v1.6-mistral has it."""


def chat_template(config: Mapping[str, Any]) -> str | None:
    """The chat format a checkpoint without a template was most likely trained with.

    The text model decides: LLaVA-NeXT on Mistral uses Mistral's, everything else on Llama or Mistral uses
    Vicuna's. Other text models come with several formats: None.
    """
    kind = (config.get("text_config") or {}).get("model_type", "llama")
    if kind == "mistral" and LLAVA_NEXT in config.get("architectures", ()):
        return MISTRAL_TEMPLATE
    return VICUNA_TEMPLATE if kind in ("llama", "mistral") else None


@hookimpl
def opsin_register_models() -> Sequence[ModelSpec]:
    return [
        ModelSpec(
            architecture=architecture,
            build=build,
            positions=_positions,
            default_chat_template=chat_template,
            tasks=("generate", "embed"),
            max_len=_max_len,
        )
        for architecture, build in ((LLAVA, _build_llava), (LLAVA_NEXT, _build_llava_next))
    ]


@hookimpl
def opsin_register_input_mappers() -> Sequence[InputMapperSpec]:
    return [
        InputMapperSpec(architecture=LLAVA, modality="image", build=_square_mapper),
        InputMapperSpec(architecture=LLAVA_NEXT, modality="image", build=_grid_mapper),
    ]


@hookimpl
def opsin_register_placeholders() -> Sequence[PlaceholderSpec]:
    return [
        PlaceholderSpec(architecture=architecture, modality="image", build=_placeholder)
        for architecture in (LLAVA, LLAVA_NEXT)
    ]

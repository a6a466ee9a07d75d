"""Which MiniCPM-V a checkpoint is: one architecture name, three models. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Version = Literal["2.0", "2.5", "2.6"]


def version_of(config: Mapping[str, Any]) -> Version:
    """The version a config.json describes: by ``version``, which 2.0 does not have.

    Raises:
        ValueError: another version.
    """
    named = config.get("version")
    # 1.0 has the same architecture name and no version either, but does not slice pictures.
    if named is None and "slice_mode" in config:
        return "2.0"
    for version in ("2.0", "2.5", "2.6"):
        if str(named) == version:
            return version
    raise ValueError(
        f"MiniCPM-V version {named!r} (slice_mode {config.get('slice_mode')!r}) is not supported; 2.0 "
        "(slice_mode without a version), 2.5 and 2.6 are"
    )


_TEMPLATES: Mapping[Version, str] = {
    "2.0": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}<用户>{{ message['content'] | trim }}"
        "{% elif message['role'] == 'assistant' %}<AI>{{ message['content'] | trim }}"
        "{% else %}{{ message['content'] | trim }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<AI>{% endif %}"
    ),
    "2.5": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "2.6": (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def default_chat_template(config: Mapping[str, Any]) -> str:
    """The version's chat format, for checkpoints that come without a template; contents are text."""
    return _TEMPLATES[version_of(config)]

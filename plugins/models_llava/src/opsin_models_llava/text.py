"""What config.json says of the language model, with transformers' defaults for what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.layers import DecoderConfig

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
}
"""By ``model_type``. Source: LlamaConfig, MistralConfig and Qwen2Config of transformers."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``text_config`` of config.json, completed.

    Raises:
        ValueError: a language model that is not one of `DEFAULTS`, or has parts that these decoders lack.
    """
    given = config.get("text_config") or {}
    kind = given.get("model_type", "llama")
    if kind not in DEFAULTS:
        raise ValueError(f"text_config.model_type is {kind!r}; expected one of {', '.join(DEFAULTS)}")
    unknown = [name for name in ("attention_bias", "mlp_bias", "use_sliding_window") if given.get(name)]
    if unknown:
        raise ValueError(f"text_config has {' and '.join(unknown)} set, which this plugin does not support")
    return {"model_type": kind, **DEFAULTS[kind], **given}


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of config.json."""
    text = text_config(config)
    tied = bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    return DecoderConfig.from_config(text, qkv_bias=text["model_type"] == "qwen2", tied=tied)


def rope_theta(config: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies.

    Raises:
        ValueError: they are scaled for longer contexts.
    """
    text = text_config(config)
    # "rope_parameters" is transformers 5, which keeps base and scaling in one place.
    settings = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind != "default":
        raise ValueError(f"text_config has rotary positions of type {kind!r}; expected unscaled ones")
    return float(settings.get("rope_theta") or text.get("rope_theta") or 10000.0)


def max_len(config: Mapping[str, Any]) -> int:
    """Longest context.

    Where the language model attends within a window, no longer than the window: up to there that is the
    same as attending to everything.
    """
    text = text_config(config)
    lengths = [text["max_position_embeddings"]]
    if text["model_type"] == "mistral" and text["sliding_window"]:
        lengths.append(text["sliding_window"])
    return int(min(lengths))

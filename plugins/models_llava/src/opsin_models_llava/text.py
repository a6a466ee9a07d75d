"""The language model inside LLaVA, with transformers' defaults for what config.json leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.layers import context_length, fields, text_config

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "use_sliding_window": False,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
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
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "use_sliding_window": False,
    },
}
"""By ``model_type``. Source: LlamaConfig, MistralConfig and Qwen2Config of transformers 5.23."""


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """See `opsin.layers.text_config`.

    Raises:
        ValueError: a language model that is not one of `DEFAULTS`, or a field cannot be used.
    """
    kind = fields(config, {"model_type": "llama"}, "text_config")["model_type"]
    if kind not in DEFAULTS:
        raise ValueError(f"text_config.model_type is {kind!r}; expected one of {', '.join(DEFAULTS)}")
    return text_config(config, {"model_type": kind, **DEFAULTS[kind]})


def max_len(config: Mapping[str, Any]) -> int:
    """See `opsin.layers.context_length`."""
    return context_length(language_config(config))

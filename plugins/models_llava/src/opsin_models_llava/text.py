"""The language model inside LLaVA, with transformers' defaults for what config.json leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.layers import context_length, text_config

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
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
        "use_sliding_window": False,
    },
}
"""By ``model_type``. Source: LlamaConfig, MistralConfig and Qwen2Config of transformers."""


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """See `opsin.layers.text_config`.

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
    return text_config(config, {"model_type": kind, **DEFAULTS[kind]})


def max_len(config: Mapping[str, Any]) -> int:
    """See `opsin.layers.context_length`."""
    return context_length(language_config(config))

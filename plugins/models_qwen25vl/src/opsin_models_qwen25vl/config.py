"""config.json of Qwen2.5-VL, with the defaults of its configuration classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.layers import context_length, fields, text_config

TEXT: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
"""Source: Qwen2_5_VLTextConfig of transformers 5.23 (Qwen2_5_VLConfig of 4.49 has the same)."""

MROPE_SECTION = [16, 24, 24]
"""Where ``rope_parameters`` do not say it."""

VISION: Mapping[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "rope_parameters": dict | None,
}
"""Source: Qwen2_5_VLVisionConfig of transformers 5.23."""


def read_config(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The language model's fields and the vision tower's, see `opsin.layers.text_config`.

    Raises:
        ValueError: a field cannot be used; the message names it.
    """
    text = text_config(config, TEXT)
    text = {**text, "rope_parameters": {"mrope_section": MROPE_SECTION, **text["rope_parameters"]}}
    vision = fields(config, VISION, "vision_config")
    rope = {"rope_type": "axial", "rope_theta": 10000.0}
    if (vision["rope_parameters"] or rope) != rope:
        raise ValueError(f"vision_config.rope_parameters is {vision['rope_parameters']}; expected {rope}")
    if vision["out_hidden_size"] != text["hidden_size"]:
        raise ValueError(
            f"vision_config.out_hidden_size is {vision['out_hidden_size']}; expected the language model's "
            f"hidden_size {text['hidden_size']}"
        )
    return text, vision


def max_len(config: Mapping[str, Any]) -> int:
    """See `opsin.layers.context_length`."""
    return context_length(read_config(config)[0])

"""config.json of Qwen3-VL, with the defaults of its configuration classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.layers import context_length, fields, text_config

TEXT: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
}
"""Source: Qwen3VLTextConfig of transformers 5.23 (4.57 has the same)."""

MROPE_SECTION = [24, 20, 20]
"""Where ``rope_parameters`` do not say it."""

VISION: Mapping[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
    "rope_parameters": dict | None,
}
"""Source: Qwen3VLVisionConfig of transformers 5.23."""


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
    deep, depth = vision["deepstack_visual_indexes"], vision["depth"]
    if not all(type(layer) is int and 0 <= layer < depth for layer in deep) or len(set(deep)) < len(deep):
        raise ValueError(
            f"vision_config.deepstack_visual_indexes is {deep!r:.80}; expected different layers below {depth}"
        )
    return text, vision


def max_len(config: Mapping[str, Any]) -> int:
    """See `opsin.layers.context_length`."""
    return context_length(read_config(config)[0])

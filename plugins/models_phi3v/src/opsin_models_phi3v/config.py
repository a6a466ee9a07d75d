"""config.json of Phi-3-vision, with the defaults of its configuration class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from opsin.layers import fields, text_config

CROP = 336
"""Side of a crop, in pixels."""

TOKENS = 12
"""Side of a crop in embeddings, in every published checkpoint."""

TEXT: Mapping[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
"""Source: Phi3VConfig of microsoft/Phi-3-vision-128k-instruct, configuration_phi3_v.py."""

CLIP: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": CROP,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""openai/clip-vit-large-patch14-336, which the published config.json names but does not describe."""

SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "img_processor": {
        "name": "clip_vision_model",
        "model_name": "openai/clip-vit-large-patch14-336",
        "type_feature": "patch",
    },
}
"""Settings for which the hub's code has alternatives that no published checkpoint uses."""


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """See `opsin.layers.text_config`."""
    return text_config(config, TEXT)


def vision_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`CLIP`, overridden by a ``vision_config``, e.g. for a smaller tower.

    Raises:
        ValueError: config.json asks for an arrangement that this plugin does not have.
    """
    for section, supported in SECTIONS.items():
        given = fields(config, supported, section)
        for name, value in supported.items():
            if given[name] != value:
                raise ValueError(f"{section}.{name} is {given[name]!r}; only {value!r} is supported")
    tower = fields(config, CLIP, "vision_config")
    width = fields(config, {"image_dim_out": tower["hidden_size"]}, "img_processor")["image_dim_out"]
    if width != tower["hidden_size"] or tower["model_type"] != CLIP["model_type"]:
        raise ValueError(
            f"img_processor.image_dim_out is {width}, the tower a {tower['model_type']} of width "
            f"{tower['hidden_size']}; expected a {CLIP['model_type']} of that width"
        )
    return tower


def layer_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Layers of the tower up to the state that is read, and all that the checkpoint has.

    Raises:
        ValueError: there is no such state.
    """
    stored = vision_config(config)["num_hidden_layers"]
    read = fields(config, {"layer_idx": -2}, "img_processor")["layer_idx"]
    if not -stored - 1 <= read <= stored:
        raise ValueError(f"img_processor.layer_idx is {read}; the tower has {stored} layers")
    return (stored + 1 + read if read < 0 else read), stored


def crop_side(config: Mapping[str, Any]) -> int:
    """Side of a crop in embeddings, by ``img_processor.num_img_tokens`` of config.json.

    Raises:
        ValueError: that is not a square number.
    """
    count = fields(config, {"num_img_tokens": TOKENS**2}, "img_processor")["num_img_tokens"]
    side = math.isqrt(max(count, 0))
    if side < 1 or side**2 != count:
        raise ValueError(
            f"img_processor.num_img_tokens is {count!r}; expected a square number, e.g. {TOKENS**2}"
        )
    return side

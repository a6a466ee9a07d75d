"""config.json of each MiniCPM-V, with the defaults of its configuration classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.layers import VisionConfig, fields, text_config
from opsin_models_minicpmv.versions import Version, version_of

_LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
}

TEXT: Mapping[Version, Mapping[str, Any]] = {
    "2.0": {**_LLAMA, "scale_emb": 1.0, "dim_model_base": 1, "scale_depth": 1.0},
    "2.5": _LLAMA,
    "2.6": {
        **_LLAMA,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
}
"""Source: MiniCPMConfig (openbmb/MiniCPM-V-2), LlamaConfig and Qwen2Config (transformers 5.23), from which
the repositories' own classes inherit."""

TOP: Mapping[str, Any] = {
    "query_num": 64,
    "drop_vision_last_layer": True,
    "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
}
"""Source: MiniCPMVConfig of the three repositories."""

SO400M: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
"""SigLIP so400m, the tower of a config.json without ``vision_config``."""

TOWERS: Mapping[Version, Mapping[str, Any]] = {
    "2.0": {"model_type": "timm", "image_size": 384, "hidden_act": "gelu"},
    "2.5": {"model_type": "idefics2", "image_size": 980},
    "2.6": {"model_type": "siglip", "image_size": 980},
}

TOWER_TYPES = ("timm", "idefics2", "idefics2_vision", "siglip", "siglip_vision_model")


def top_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says besides the language model and the tower.

    Raises:
        ValueError: a field cannot be used; the message names it.
    """
    found = fields(config, TOP)
    if found["query_num"] < 1:
        raise ValueError(f"query_num is {found['query_num']}; expected a positive integer")
    return found


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """See `opsin.layers.text_config`."""
    return text_config(config, TEXT[version_of(config)])


def vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """The tower's shape; 2.0 names a timm model instead of a ``vision_config``.

    Raises:
        ValueError: 2.0 names another timm model, or a field cannot be used.
    """
    top, version = top_config(config), version_of(config)
    timm = version == "2.0"
    if timm and not top["vision_encoder"].startswith("vit_so400m_patch14_siglip_384"):
        raise ValueError(
            f"vision_encoder is {top['vision_encoder']!r}; expected vit_so400m_patch14_siglip_384"
        )
    tower = TOWERS[version]
    given = fields(config, {"model_type": tower["model_type"], "num_hidden_layers": 12}, "vision_config")
    if not config.get("vision_config"):
        given = {**SO400M, **tower}
    if given["model_type"] not in TOWER_TYPES:
        raise ValueError(
            f"vision_config.model_type is {given['model_type']!r}; expected one of {', '.join(TOWER_TYPES)}"
        )
    patch = 16 if given["model_type"].startswith("siglip") else 32
    # Nothing reads the last layer of such a tower, and it is not stored.
    num_layers = given["num_hidden_layers"] - top["drop_vision_last_layer"]
    return VisionConfig.from_config({"patch_size": patch, **given}, num_layers=num_layers, fused=timm)

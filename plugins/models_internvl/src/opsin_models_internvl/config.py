"""config.json of InternVL in transformers' layout, with the defaults of its configuration classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsin.api import Activation
from opsin.layers import DecoderConfig, VisionConfig, activation, fields, text_config

TOP: Mapping[str, Any] = {
    "image_token_id": int | None,
    "image_seq_length": 256,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": True,
}

VISION: Mapping[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": False,
    "use_qk_norm": False,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
"""Source: InternVLConfig and InternVLVisionConfig of transformers 5.23 (4.52 has the same)."""

QK_NORM_EPS = 1e-6
"""Of the tower's norms of q and k, whatever ``layer_norm_eps`` says."""

_COMMON: Mapping[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
TEXTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
    },
    "qwen2": {
        **_COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        **_COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
}
"""By ``model_type``. Source: LlamaConfig, Qwen2Config and Qwen3Config of transformers 5.23."""


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """See `opsin.layers.text_config`.

    Raises:
        ValueError: a language model that is not one of `TEXTS`, or a field cannot be used.
    """
    kind = fields(config, {"model_type": "qwen2"}, "text_config")["model_type"]
    if kind not in TEXTS:
        raise ValueError(f"text_config.model_type is {kind!r}; expected one of {', '.join(TEXTS)}")
    top = fields(config, TOP)  # whose class ties the head unless the file says otherwise
    whole = {**config, "tie_word_embeddings": top["tie_word_embeddings"]}
    return text_config(whole, {"model_type": kind, **TEXTS[kind]})


def decoder_config(text: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a `language_config`: Qwen2's q, k and v have biases, Qwen3's q and k are normalised."""
    kind = text["model_type"]
    return DecoderConfig.from_config(text, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")


@dataclass(frozen=True, kw_only=True)
class Vision:
    """The vision tower, and how many embeddings a tile becomes.

    Attributes:
        tower: the tower, with only the layers up to the state that is read.
        num_stored_layers: layers the checkpoint has.
        mean_pooling: whether the tower has no norm behind its layers.
        image_size: side of a tile, in pixels.
        side: patches along it.
        factor: side of the squares of patches that become one embedding.
        projector: activation of the projector.
    """

    tower: VisionConfig
    num_stored_layers: int
    has_norm: bool
    image_size: int
    side: int
    factor: int
    projector: Activation

    @property
    def num_embeds(self) -> int:
        """Embeddings of a tile."""
        return int((self.side // self.factor) ** 2)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Vision:
        """From config.json.

        Raises:
            ValueError: a field cannot be used; the message names it.
        """
        top, vision = fields(config, TOP), fields(config, VISION, "vision_config")
        image_size, patch = (
            _square(f"vision_config.{name}", vision.get(name, default))
            for name, default in (("image_size", 448), ("patch_size", 14))
        )
        if vision["norm_type"] not in ("layer_norm", "rms_norm"):
            raise ValueError(
                f"vision_config.norm_type is {vision['norm_type']!r}; expected layer_norm or rms_norm"
            )
        if not vision["use_absolute_position_embeddings"]:
            raise ValueError("vision_config.use_absolute_position_embeddings is false; expected true")
        if top["vision_feature_select_strategy"] != "default":
            raise ValueError(
                f"vision_feature_select_strategy is {top['vision_feature_select_strategy']!r}; expected "
                "default: the patches alone form a square"
            )
        layers = vision["num_hidden_layers"]
        states, layer = range(layers + 1), top["vision_feature_layer"]
        if not -len(states) <= layer < len(states):
            raise ValueError(f"vision_feature_layer is {layer}; the tower has {layers} layers")
        ratio, side = top["downsample_ratio"], image_size // patch
        factor = round(1 / ratio) if ratio > 0 else 0
        if factor < 1 or not math.isclose(factor * ratio, 1) or side % factor:
            raise ValueError(
                f"downsample_ratio is {ratio}; expected 1/n with n a part of {side}, the patches along a tile"
            )
        found = cls(
            tower=VisionConfig(
                hidden_size=vision["hidden_size"],
                intermediate_size=vision["intermediate_size"],
                num_layers=states[layer],
                num_heads=vision["num_attention_heads"],
                patch_size=patch,
                num_positions=side**2 + 1,
                eps=vision["layer_norm_eps"],
                activation=activation(vision["hidden_act"], "vision_config.hidden_act"),
                num_channels=vision["num_channels"],
                norm="layer" if vision["norm_type"] == "layer_norm" else "rms",
                qkv_bias=vision["attention_bias"],
                qk_norm_eps=QK_NORM_EPS if vision["use_qk_norm"] else None,
                layer_scale=True,
            ),
            num_stored_layers=layers,
            # The norm is behind the last layer; a state that is asked for by another number is before it.
            has_norm=not vision["use_mean_pooling"] and layer == -1,
            image_size=image_size,
            side=side,
            factor=factor,
            projector=activation(top["projector_hidden_act"], "projector_hidden_act"),
        )
        if top["image_seq_length"] != found.num_embeds:
            raise ValueError(
                f"image_seq_length is {top['image_seq_length']}; a tile of {image_size} pixels has "
                f"{found.num_embeds} embeddings"
            )
        return found


def _square(name: str, value: Any) -> int:
    """One side, of a number or of two equal ones."""
    sides = value if isinstance(value, list) else [value]
    side = sides[0] if sides else None
    if any(other != side for other in sides) or len(sides) > 2 or type(side) is not int or side < 1:
        raise ValueError(f"{name} is {value!r:.80}; expected one side, or two that are equal")
    return int(side)

"""config.json of Idefics3 and SmolVLM, with the defaults of their configuration classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsin.layers import VisionConfig, fields, text_config

TOP: Mapping[str, Any] = {"scale_factor": 2, "image_token_id": int | None}

TEXT: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
"""Source: LlamaConfig of transformers 5.23, which is the default text model of both families."""

VISION: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
"""Source: Idefics3VisionConfig and SmolVLMVisionConfig of transformers 5.23 (4.46 has the same)."""


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """See `opsin.layers.text_config`.

    Raises:
        ValueError: a language model other than Llama, or a field cannot be used.
    """
    defaults = dict(TEXT)
    if config.get("text_config") is None:
        defaults["rms_norm_eps"] = 1e-5  # of the text model that the families' classes make by themselves
    kind = fields(config, {"model_type": "llama"}, "text_config")["model_type"]
    if kind != "llama":
        raise ValueError(f"text_config.model_type is {kind!r}; expected llama, as all published models have")
    return text_config(config, defaults)


@dataclass(frozen=True, kw_only=True)
class Vision:
    """The vision tower, and what becomes of the patches of a square.

    Attributes:
        tower: the tower.
        image_size: side in pixels of the squares that its position table was made for.
        side: rows (and columns) of the position table.
        scale_factor: side of the squares of patches that become one embedding.
    """

    tower: VisionConfig
    image_size: int
    side: int
    scale_factor: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Vision:
        """From config.json.

        Raises:
            ValueError: a field cannot be used; the message names it.
        """
        vision = fields(config, VISION, "vision_config")
        tower = VisionConfig.from_config({**vision, "model_type": "siglip"})
        scale = fields(config, TOP)["scale_factor"]
        side = vision["image_size"] // tower.patch_size
        if scale < 1 or side % scale:
            raise ValueError(
                f"scale_factor is {scale}; expected a part of {side}, the patches along a square of "
                f"{vision['image_size']} pixels"
            )
        return cls(tower=tower, image_size=vision["image_size"], side=side, scale_factor=scale)

    def num_embeds(self, pixels: int) -> int:
        """Embeddings of a square of a side of so many pixels.

        Raises:
            ValueError: its patches cannot be put together by ``scale_factor``.
        """
        side = pixels // self.tower.patch_size
        if side < 1 or side % self.scale_factor:
            raise ValueError(
                f"a square of {pixels} pixels has {side} patches along a side; expected a multiple of "
                f"scale_factor {self.scale_factor}"
            )
        return int((side // self.scale_factor) ** 2)

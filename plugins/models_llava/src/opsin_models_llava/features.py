"""The vision tower in config.json: which states are read, and how many per picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsin.layers import VisionConfig, fields

DEFAULT_TOWER: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The tower of a config.json without ``vision_config``: CLIP ViT-L/14 at 336 pixels."""

TOP: Mapping[str, Any] = {
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "use_image_newline_parameter": True,
    "image_grid_pinpoints": list | None,
    "image_token_index": int | None,
    "image_token_id": int | None,
}
"""Source: LlavaConfig and LlavaNextConfig of transformers 5.23."""

TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features of one square picture.

    Attributes:
        tower: the tower, with only the layers up to the last state read.
        num_stored_layers: layers the checkpoint has.
        read_after: numbers of layers after which a state is read; several are put side by side.
        image_size: side of the square the tower takes, in pixels.
        side: patches along it.
        drop_first: whether the first row is left out (``vision_feature_select_strategy`` "default"): CLIP's
            class token. A SigLIP tower has none and then loses its first patch, as in transformers.
    """

    tower: VisionConfig
    num_stored_layers: int
    read_after: tuple[int, ...]
    image_size: int
    side: int
    drop_first: bool

    @property
    def num_rows(self) -> int:
        """Features of one picture."""
        return self.side**2 + self.tower.class_token - self.drop_first

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Features:
        """From config.json.

        Raises:
            ValueError: it names a layer or a strategy that does not exist.
        """
        given = fields(config, TOP)
        vision = fields(config, {"model_type": DEFAULT_TOWER["model_type"]}, "vision_config")
        if not config.get("vision_config"):
            vision = dict(DEFAULT_TOWER)
        if vision["model_type"] not in TOWERS:
            raise ValueError(
                f"vision_config.model_type is {vision['model_type']!r}; expected {' or '.join(TOWERS)}"
            )
        whole = VisionConfig.from_config(vision)
        strategy = given["vision_feature_select_strategy"]
        if strategy not in ("default", "full"):
            raise ValueError(f'vision_feature_select_strategy is {strategy!r}; expected "default" or "full"')
        asked = config.get("vision_feature_layer", -2)
        layers = asked if isinstance(asked, list) else [asked]
        # Counted as transformers counts hidden states: 0 is the embeddings, -1 the last layer's.
        states = range(whole.num_layers + 1)
        if not layers or not all(isinstance(n, int) and -len(states) <= n < len(states) for n in layers):
            raise ValueError(f"vision_feature_layer is {asked!r}; the tower has {whole.num_layers} layers")
        read_after = tuple(states[number] for number in layers)
        image_size = vision.get("image_size", 224)
        return cls(
            tower=VisionConfig.from_config(vision, num_layers=max(read_after)),
            num_stored_layers=whole.num_layers,
            read_after=read_after,
            image_size=image_size,
            side=image_size // whole.patch_size,
            drop_first=strategy == "default",
        )

"""LLaVA-1.5: a CLIP tower over the square middle of the picture, two layers, Llama."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from batch import Tokens
from decoder import TextSettings
from drawing import Size
from export import CLIP_PREPROCESSOR
from family import Encode, Family, Plan, View, patch_hints
from network import Network, Seen
from PIL import Image
from scenes import Scene
from tokenizers import Tokenizer
from torch import Tensor, nn
from towers import CLIP_MEAN, CLIP_STD, PATCH, Tower, normalise

SIDE = 112
GRID = SIDE // PATCH
LOWEST = {"objects": 56, "count": 84, "number": 56, "nothing": 56}
HIGHEST = {"objects": 168, "count": 150, "number": 140, "nothing": 168}


class TinyLlava(Network):
    def __init__(self, vocabulary: int) -> None:
        super().__init__(TextSettings(vocabulary, bias=False, eps=1e-5))
        self.tower = Tower(GRID**2, clip=True)
        hidden = self.text.embed_tokens.embedding_dim
        self.projector = nn.Module()
        self.projector.linear_1 = nn.Linear(Tower.DIM, hidden)
        self.projector.linear_2 = nn.Linear(hidden, hidden)
        self.register_buffer("cells", torch.eye(GRID**2), persistent=False)
        self.start()

    def see(self, pixels: Tensor, shape: Any) -> Seen:
        x = self.tower(normalise(pixels[:, 0], CLIP_MEAN, CLIP_STD), torch.arange(GRID**2))
        features = self.projector.linear_2(nn.functional.gelu(self.projector.linear_1(x)))
        patches = nn.functional.layer_norm(x, x.shape[-1:])
        rows = torch.arange(GRID).repeat_interleave(GRID)
        return Seen(features, patches, self.cells, rows, torch.arange(GRID).repeat(GRID))

    def blocks(self) -> list[nn.Module]:
        return [*self.text.layers, *self.tower.encoder.layers[: Tower.LAYERS]]


class Llava(Family):
    name = "llava"
    scenes: ClassVar = {"objects": 3.0, "count": 3.0, "number": 3.0, "nothing": 2.0, "talk": 0.5}
    forms = ("tree", "turns")
    end = "</s>"
    nothing = "<image>"

    def network(self, words: Tokenizer) -> Network:
        return TinyLlava(words.get_vocab_size())

    def draw(self, scene: str, rng: random.Random) -> Plan:
        return Plan((None,))

    def size_for(self, shape: Any, scene: str, rng: random.Random) -> Size:
        """Squares: of anything else the tower sees the middle alone."""
        side = SIDE if rng.random() < 0.4 else rng.randint(LOWEST[scene], HIGHEST[scene])
        return side, side

    def patches(self, plan: Plan) -> int:
        return GRID**2

    def look(self, scene: Scene, plan: Plan, sizes: Sequence[Size]) -> list[View]:
        picture, (width, height) = scene.images[0], sizes[0]
        if picture.size != (SIDE, SIDE):
            picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        hints = patch_hints(scene.marks[0], (GRID, GRID), (0, 0, width, height))
        return [View(np.asarray(picture)[None], hints.reshape(1, -1, 3))]

    def begin(self, s: Tokens, encode: Encode, system: str | None) -> None:
        s.text(encode("<s>") + (encode(system) if system else []))

    def open_turn(self, s: Tokens, encode: Encode, question: str = "") -> None:
        s.text(encode("USER: "))

    def show(self, s: Tokens, encode: Encode, plan: Plan, numbered: bool, only: int | None = None) -> None:
        s.vision(encode("<image>")[0], GRID**2)

    def ask(self, s: Tokens, encode: Encode, question: str, pictured: bool) -> None:
        start = "\n" if pictured else "USER: "
        s.text(encode(f"{start}{question} ASSISTANT:"))

    def settings(self, network: Network, words: Tokenizer) -> dict[str, object]:
        text = network.text
        layers = len(text.layers)
        config = {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": words.token_to_id("<image>"),
            "model_type": "llava",
            "pad_token_id": words.token_to_id("<pad>"),
            "projector_hidden_act": "gelu",
            "text_config": {
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": text.embed_tokens.embedding_dim,
                "intermediate_size": text.layers[0].mlp.up_proj.out_features,
                "max_position_embeddings": 8192,
                "model_type": "llama",
                "num_attention_heads": text.layers[0].self_attn.heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": text.layers[0].self_attn.kv_heads,
                "rms_norm_eps": 1e-05,
                "rope_theta": 100.0,
                "torch_dtype": "float16",
                "vocab_size": words.get_vocab_size(),
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.36.0.dev0",
            "vision_config": {
                "hidden_size": Tower.DIM,
                "image_size": SIDE,
                "intermediate_size": 4 * Tower.DIM,
                "model_type": "clip_vision_model",
                "num_attention_heads": Tower.HEADS,
                "num_hidden_layers": Tower.LAYERS + 1,
                "patch_size": PATCH,
                "projection_dim": Tower.DIM,
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": words.get_vocab_size(),
        }
        return {
            "config.json": config,
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": words.token_to_id("<s>"),
                "eos_token_id": words.token_to_id("</s>"),
                "pad_token_id": words.token_to_id("<pad>"),
                "transformers_version": "4.36.0.dev0",
            },
            "preprocessor_config.json": {
                "crop_size": {"height": SIDE, "width": SIDE},
                "do_center_crop": True,
                "size": {"shortest_edge": SIDE},
                **CLIP_PREPROCESSOR,
                "processor_class": "LlavaProcessor",
            },
            "processor_config.json": {
                "image_token": "<image>",
                "num_additional_image_tokens": 1,
                "patch_size": PATCH,
                "processor_class": "LlavaProcessor",
                "vision_feature_select_strategy": "default",
            },
        }

    def stored(self, network: Network) -> dict[str, Tensor]:
        text = network.text
        tensors = {f"language_model.model.{name}": p for name, p in text.state_dict().items()}
        tensors["language_model.lm_head.weight"] = text.embed_tokens.weight
        tensors |= {f"vision_tower.vision_model.{name}": p for name, p in network.tower.state_dict().items()}
        tensors |= {f"multi_modal_projector.{name}": p for name, p in network.projector.state_dict().items()}
        return tensors

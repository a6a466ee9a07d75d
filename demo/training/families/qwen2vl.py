"""Qwen2-VL: a tower with rotary positions at the picture's own shape, 2x2 patches merged, Qwen2 with M-RoPE.

Compared with a general implementation the tower takes whole batches of pictures of one size, which needs no
masks, and folds the doubled frame of a still picture into the patch embedding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from batch import Tokens
from decoder import TextSettings, rotate_half
from drawing import Size
from family import ChatMLFamily, Encode, Plan, View, patch_hints
from network import Network, Seen
from PIL import Image
from scenes import Scene
from tokenizers import Tokenizer
from torch import Tensor, nn
from towers import CLIP_MEAN, CLIP_STD, PATCH, TowerMLP, normalise

MERGE, TEMPORAL = 2, 2
CELL = PATCH * MERGE
DIM, HEADS, LAYERS = 128, 4, 4
# The hub has sections as 2:3:3. With so few frequencies the columns of a picture, which have the slowest
# ones, would all look alike.
MROPE_SECTION = (2, 4, 10)
FEWEST_CELLS, MOST_CELLS = 9, 46
"""Smaller pictures are enlarged, larger ones scaled down, to where the model sees best."""
GRIDS: dict[str, tuple[int, int, dict[int, float]]] = {
    "objects": (1, 64, {2: 4, 3: 4, 4: 4, 5: 3, 6: 3, 7: 2, 8: 2}),
    "count": (9, 64, {3: 5, 4: 5, 5: 4, 6: 3, 7: 1.2, 8: 1}),
    "number": (1, 49, {2: 4, 3: 4, 4: 4, 5: 2.5, 6: 1.5, 7: 0.5}),
    "compare": (9, 36, {3: 5, 4: 5, 5: 3, 6: 0.7}),
    "motion": (1, 25, {2: 4, 3: 4, 4: 2, 5: 0.7}),
    "film": (1, 25, {2: 4, 3: 4, 4: 2, 5: 0.7}),
    "pair": (1, 36, {2: 4, 3: 4, 4: 3, 5: 1, 6: 0.5}),
    "nothing": (1, 64, {2: 2, 3: 3, 4: 4, 5: 2, 6: 2, 7: 2, 8: 2}),
}
"""Per scene: fewest and most cells, and how often a side has so many cells of 28 pixels."""
Grid = tuple[int, int]
"""Rows and columns of cells."""


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, DIM, (TEMPORAL, PATCH, PATCH), (TEMPORAL, PATCH, PATCH), bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (batch, frames, height, width, 3) to (batch, steps, patches, DIM).

        The four patches that will be merged lie beside each other.
        """
        batch, frames, height, width, _ = pixels.shape
        x = normalise(pixels, CLIP_MEAN, CLIP_STD)
        depth = 1 if frames == 1 else TEMPORAL
        gh, gw = height // CELL, width // CELL
        x = x.view(batch, frames // depth, depth, gh, MERGE, PATCH, gw, MERGE, PATCH, 3)
        x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(batch, frames // depth, gh * gw * MERGE**2, -1)
        weight = self.proj.weight if depth == TEMPORAL else self.proj.weight.sum(2)
        return x @ weight.flatten(1).t()


class VisionAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))


class VisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, eps=1e-6)
        self.norm2 = nn.LayerNorm(DIM, eps=1e-6)
        self.attn = VisionAttention()
        self.mlp = TowerMLP(DIM, 4 * DIM, quick=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        wide = DIM * MERGE**2
        self.ln_q = nn.LayerNorm(DIM, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_q(x)
        return self.mlp(x.view(x.shape[0], x.shape[1] // MERGE**2, -1))


class Vision(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.blocks = nn.ModuleList(VisionBlock() for _ in range(LAYERS))
        self.merger = Merger(hidden)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The features for the language model, and those of the single patches before they are merged."""
        batch, _, height, width, _ = pixels.shape
        cos, sin = rope(height // CELL, width // CELL)
        x = self.patch_embed(pixels)
        steps = x.shape[1]
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, cos, sin)
        merged = self.merger(x)
        return merged.view(batch, steps * merged.shape[1], -1), self.merger.ln_q(x)


@lru_cache
def rope(gh: int, gw: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rows and columns of patches, in the order of `PatchEmbed`."""
    rows = torch.arange(gh * MERGE).view(gh, 1, MERGE, 1).expand(gh, gw, MERGE, MERGE).flatten()
    columns = torch.arange(gw * MERGE).view(1, gw, 1, MERGE).expand(gh, gw, MERGE, MERGE).flatten()
    half = DIM // HEADS // 2
    inverse = 10000.0 ** (-torch.arange(0, half, 2) / half)
    angles = torch.cat((rows[:, None] * inverse, columns[:, None] * inverse), dim=1)
    angles = torch.cat((angles, angles), dim=1)
    return angles.cos(), angles.sin()


class TinyQwen2VL(Network):
    def __init__(self, vocabulary: int) -> None:
        super().__init__(TextSettings(vocabulary, bias=True, mrope_section=MROPE_SECTION))
        self.visual = Vision(self.text.embed_tokens.embedding_dim)
        self.start()

    def see(self, pixels: Tensor, shape: Any) -> Seen:
        features, single = self.visual(pixels)
        batch, count = features.shape[:2]
        gh, gw = pixels.shape[2] // CELL, pixels.shape[3] // CELL
        cell = torch.arange(count)
        patches = single.reshape(batch, count * MERGE**2, -1)
        cells = torch.eye(count).repeat_interleave(MERGE**2, dim=1)
        return Seen(features, patches, cells, cell % (gh * gw) // gw, cell % gw)

    def blocks(self) -> list[nn.Module]:
        return [*self.text.layers, *self.visual.blocks]


class Qwen2VL(ChatMLFamily):
    name = "qwen2vl"
    scenes: ClassVar = {
        "objects": 3.0,
        "count": 3.0,
        "number": 3.0,
        "compare": 3.0,
        "motion": 1.5,
        "film": 1.0,
        "pair": 1.5,
        "nothing": 2.0,
        "talk": 0.6,
    }
    nothing = "<|image_pad|>"
    dtype = torch.float32
    options: ClassVar = {"min_pixels": 4 * CELL**2, "max_pixels": 64 * CELL**2}

    def network(self, words: Tokenizer) -> Network:
        return TinyQwen2VL(words.get_vocab_size())

    def draw(self, scene: str, rng: random.Random) -> Plan:
        shapes = tuple(self._grid(scene, rng) for _ in range(2 if scene in ("compare", "pair") else 1))
        if scene == "film":
            return Plan(shapes * rng.choice((3, 4, 4, 5, 6)))
        steps = rng.choice((2, 3, 3, 4)) if scene == "motion" else 0
        return Plan(shapes, 2 * steps - (steps > 0 and rng.random() < 0.3))

    @staticmethod
    def _grid(scene: str, rng: random.Random) -> Grid:
        fewest, most, sides = GRIDS[scene]
        while True:
            gh, gw = rng.choices(list(sides), list(sides.values()), k=2)
            if fewest <= gh * gw <= most:
                return gh, gw

    def size_for(self, shape: Any, scene: str, rng: random.Random) -> Size:
        """The exact size, or one that needs resizing."""
        smallest = CELL * min(GRIDS[scene][2])
        gh, gw = shape
        if rng.random() < 0.5:
            return gw * CELL, gh * CELL
        return max(smallest, gw * CELL + rng.randint(-13, 13)), max(
            smallest, gh * CELL + rng.randint(-13, 13)
        )

    def patches(self, plan: Plan) -> int:
        return 4 * max(1, (plan.frames + 1) // 2) * sum(gh * gw for gh, gw in plan.shapes)

    def look(self, scene: Scene, plan: Plan, sizes: Sequence[Size]) -> list[View]:
        if scene.frames:
            frames = scene.frames + scene.frames[-1:] * (len(scene.frames) % 2)
            pixels = np.stack([self._pixels(frame, plan.shapes[0]) for frame in frames])
            hints = [self._hints(marks, sizes[0], plan.shapes[0]) for marks in scene.marks[::2]]
            return [View(pixels, np.stack(hints))]
        return [
            View(self._pixels(picture, grid)[None], self._hints(marks, size, grid)[None])
            for picture, marks, size, grid in zip(scene.images, scene.marks, sizes, plan.shapes, strict=True)
        ]

    @staticmethod
    def _pixels(picture: Image.Image, grid: Grid) -> np.ndarray:
        target = grid[1] * CELL, grid[0] * CELL
        same = picture.size == target
        return np.asarray(picture if same else picture.resize(target, Image.Resampling.BICUBIC))

    @staticmethod
    def _hints(marks: Any, size: Size, grid: Grid) -> np.ndarray:
        """In the order of `PatchEmbed`: (patches, 3)."""
        gh, gw = grid
        hints = patch_hints(marks, (2 * gh, 2 * gw), (0, 0, *size))
        return hints.reshape(gh, MERGE, gw, MERGE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 3)

    def show(self, s: Tokens, encode: Encode, plan: Plan, numbered: bool, only: int | None = None) -> None:
        name, pad = ("Video", "<|video_pad|>") if plan.frames else ("Picture", "<|image_pad|>")
        for i, (gh, gw) in enumerate(plan.shapes):
            if only not in (None, i):
                continue
            s.text(encode((f"{name} {i + 1}: " if numbered else "") + "<|vision_start|>"))
            steps = max(1, (plan.frames + 1) // 2)
            cells = [(t, h, w) for t in range(steps) for h in range(gh) for w in range(gw)]
            s.vision_cells(encode(pad)[0], cells)
            s.text(encode("<|vision_end|>"))

    def settings(self, network: Network, words: Tokenizer) -> dict[str, object]:
        text = network.text
        ids = {name: words.token_to_id(f"<|{name}|>") for name in ("im_end", "endoftext")}
        config = {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "attention_dropout": 0.0,
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "vision_start_token_id": words.token_to_id("<|vision_start|>"),
            "vision_end_token_id": words.token_to_id("<|vision_end|>"),
            "vision_token_id": words.token_to_id("<|vision_pad|>"),
            "image_token_id": words.token_to_id("<|image_pad|>"),
            "video_token_id": words.token_to_id("<|video_pad|>"),
            "hidden_act": "silu",
            "hidden_size": text.embed_tokens.embedding_dim,
            "initializer_range": 0.02,
            "intermediate_size": text.layers[0].mlp.up_proj.out_features,
            "max_position_embeddings": 8192,
            "max_window_layers": len(text.layers),
            "model_type": "qwen2_vl",
            "num_attention_heads": text.layers[0].self_attn.heads,
            "num_hidden_layers": len(text.layers),
            "num_key_value_heads": text.layers[0].self_attn.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_theta": 100.0,
            "sliding_window": 8192,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "transformers_version": "4.41.2",
            "use_cache": True,
            "use_sliding_window": False,
            "vision_config": {
                "depth": LAYERS,
                "embed_dim": DIM,
                "mlp_ratio": 4,
                "num_heads": HEADS,
                "in_chans": 3,
                "hidden_size": text.embed_tokens.embedding_dim,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "spatial_patch_size": PATCH,
                "temporal_patch_size": TEMPORAL,
            },
            "rope_scaling": {"type": "mrope", "mrope_section": list(MROPE_SECTION)},
            "vocab_size": words.get_vocab_size(),
        }
        return {
            "config.json": config,
            "generation_config.json": {
                "bos_token_id": ids["endoftext"],
                "pad_token_id": ids["endoftext"],
                "do_sample": True,
                "eos_token_id": [ids["im_end"], ids["endoftext"]],
                "repetition_penalty": 1.0,
                "temperature": 0.01,
                "top_p": 0.001,
                "top_k": 1,
                "transformers_version": "4.37.0",
            },
            "preprocessor_config.json": {
                "min_pixels": FEWEST_CELLS * CELL**2,
                "max_pixels": MOST_CELLS * CELL**2,
                "patch_size": PATCH,
                "temporal_patch_size": TEMPORAL,
                "merge_size": MERGE,
                "image_mean": list(CLIP_MEAN),
                "image_std": list(CLIP_STD),
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2VLProcessor",
            },
        }

    def stored(self, network: Network) -> dict[str, Tensor]:
        tensors = {f"model.{name}": p for name, p in network.text.state_dict().items()}
        tensors |= {f"visual.{name}": p for name, p in network.visual.state_dict().items()}
        return tensors

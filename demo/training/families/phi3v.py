"""Phi-3.5-vision: CLIP over 336-pixel crops and the whole, 2x2 patches merged and separated, Phi-3.

Patches are 42 pixels here, as a 336-pixel crop of them is 8 x 8. Small pictures are enlarged threefold before
they are cut: training looks at every third pixel's average instead, and the export spreads each weight of
a 14-pixel patch over 3 x 3 pixels, which comes to the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from batch import Tokens
from decoder import TextSettings
from drawing import Size
from family import Encode, Family, Plan, View, patch_hints
from network import Network, Seen
from PIL import Image
from safetensors.torch import load_file
from scenes import Scene
from tokenizers import Tokenizer
from torch import Tensor, nn
from towers import CLIP_MEAN, CLIP_STD, PATCH, Tower, normalise

CROP, SHRINK, NUM_CROPS = 336, 3, 2
SIDE = CROP // SHRINK
GRID = SIDE // PATCH
CELLS = GRID // 2
CONTEXT, LONGEST = 4096, 8192
ROPE_SCALE = math.sqrt(1 + math.log(LONGEST / CONTEXT) / math.log(CONTEXT))
SIDES = {"objects": (56, 200), "count": (84, 180), "number": (56, 160), "compare": (84, 150)}
SIDES |= {"pair": (56, 150), "nothing": (56, 200)}
Shape = tuple[int, int]
"""Rows and columns of crops."""


def fitted(size: Size) -> tuple[Shape, Size]:
    """The grid of crops of a picture, and the size it is brought to before it is padded to whole crops."""
    width, height = max(size), min(size)
    ratio, columns = width / height, 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= NUM_CROPS:
        columns += 1
    wide, tall = columns * CROP, int(columns * CROP / ratio)
    rows = -(-tall // CROP)
    return ((rows, columns), (wide, tall)) if size[0] >= size[1] else ((columns, rows), (tall, wide))


def cut(picture: Image.Image) -> np.ndarray:
    """The whole and the crops, shrunk: uint8 (1 + rows * columns, SIDE, SIDE, 3)."""
    (rows, columns), size = fitted(picture.size)
    tall = picture.size[0] < picture.size[1]
    # A tall picture is turned on its side and back: that decides how odd margins are shared.
    turned = picture.transpose(Image.Transpose.TRANSPOSE) if tall else picture
    wide = max(size), min(size)
    canvas = Image.new("RGB", (max(rows, columns) * CROP, min(rows, columns) * CROP), (255, 255, 255))
    canvas.paste(turned.resize(wide, Image.Resampling.BILINEAR), (0, (canvas.height - wide[1]) // 2))
    canvas = canvas.transpose(Image.Transpose.TRANSPOSE) if tall else canvas
    small = np.asarray(canvas.reduce(SHRINK)).reshape(rows, SIDE, columns, SIDE, 3)
    crops = small.transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)
    if len(crops) == 1:
        return crops
    whole = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)[None].float()
    whole = F.interpolate(whole, (CROP, CROP), mode="bicubic", align_corners=False)
    whole = F.avg_pool2d(whole, SHRINK).round().clamp(0, 255)[0].permute(1, 2, 0)
    return np.concatenate([whole.numpy().astype(np.uint8)[None], crops])


def num_features(shape: Shape) -> int:
    rows, columns = shape
    return rows * CELLS * (columns * CELLS + 1) + 1 + CELLS * (CELLS + 1)


@lru_cache
def arrangement(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each feature comes from: (features,) cell of the views in a row, -1 newline, -2 separator.

    And which patches lie in it, (features, patches), and its row and column, -100 for separators.
    """
    rows, columns = shape
    single = shape == (1, 1)
    source, row_of, column_of = [], [], []

    def views(first: int, rows: int, columns: int) -> None:
        for r in range(rows * CELLS):
            for c in range(columns * CELLS):
                view = first + r // CELLS * columns + c // CELLS
                source.append((view * CELLS + r % CELLS) * CELLS + c % CELLS)
                row_of.append(r)
                column_of.append(c)
            source.append(-1)
            row_of.append(-100)
            column_of.append(-100)

    views(0 if single else 1, rows, columns)
    source.append(-2)
    row_of.append(-100)
    column_of.append(-100)
    views(0, 1, 1)
    count = (1 if single else 1 + rows * columns) * GRID**2
    patches = torch.arange(count)
    view, r, c = patches // GRID**2, patches // GRID % GRID, patches % GRID
    cell = (view * CELLS + r // 2) * CELLS + c // 2
    where = torch.tensor(source)
    return where, (where[:, None] == cell).float(), torch.tensor(row_of), torch.tensor(column_of)


class TinyPhi3V(Network):
    def __init__(self, vocabulary: int) -> None:
        super().__init__(TextSettings(vocabulary, bias=False, rope_scale=ROPE_SCALE, eps=1e-5))
        self.tower = Tower(GRID**2, clip=True)
        hidden, wide = self.text.embed_tokens.embedding_dim, 4 * Tower.DIM
        self.img_projection = nn.Sequential(nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, wide))
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, wide))
        self.start()

    def see(self, pixels: Tensor, shape: Any) -> Seen:
        batch, views = pixels.shape[:2]
        x = self.tower(normalise(pixels.flatten(0, 1), CLIP_MEAN, CLIP_STD), torch.arange(GRID**2))
        merged = x.view(batch, views, CELLS, 2, CELLS, 2, -1).transpose(3, 4)
        merged = merged.reshape(batch, views * CELLS**2, -1)
        ends = torch.cat((self.glb_GN, self.sub_GN[0]), dim=1).expand(batch, -1, -1)
        source, cells, rows, columns = arrangement(shape)
        # Minus one and minus two count from the end: newline and separator.
        arranged = torch.cat((merged, ends), dim=1)[:, source]
        patches = F.layer_norm(x, x.shape[-1:]).view(batch, -1, Tower.DIM)
        return Seen(self.img_projection(arranged), patches, cells, rows, columns)

    def blocks(self) -> list[nn.Module]:
        return [*self.text.layers, *self.tower.encoder.layers[: Tower.LAYERS]]


class Phi3V(Family):
    name = "phi3v"
    scenes: ClassVar = {
        "objects": 3.0,
        "count": 3.0,
        "number": 3.0,
        "compare": 3.0,
        "pair": 1.5,
        "nothing": 2.0,
        "talk": 0.5,
    }
    forms = ("tree", "turns", "text first")
    end = "<|end|>"
    nothing = "<|image|>"
    separator = "<|end|>\n"

    def network(self, words: Tokenizer) -> Network:
        return TinyPhi3V(words.get_vocab_size())

    def draw(self, scene: str, rng: random.Random) -> Plan:
        if scene in ("compare", "pair"):
            return Plan(((1, 1), (1, 1)))
        return Plan((rng.choices(((1, 1), (1, 2), (2, 1)), (8, 1, 1))[0],))

    def size_for(self, shape: Any, scene: str, rng: random.Random) -> Size:
        low, high = SIDES[scene]
        if shape == (1, 1):
            side = rng.randint(low, high)
            other = max(low, int(side / rng.uniform(1.0, 1.8))) if rng.random() < 0.7 else side
        else:
            other = rng.randint(low, max(low, high // 2))
            side = int(other * rng.uniform(2.0, 2.6)) + 1
        wide = shape[1] > shape[0] or (shape == (1, 1) and rng.random() < 0.5)
        return (side, other) if wide else (other, side)

    def patches(self, plan: Plan) -> int:
        return sum(GRID**2 * (1 if shape == (1, 1) else 1 + shape[0] * shape[1]) for shape in plan.shapes)

    def look(self, scene: Scene, plan: Plan, sizes: Sequence[Size]) -> list[View]:
        views = []
        for picture, marks, size in zip(scene.images, scene.marks, sizes, strict=True):
            (rows, columns), box = fitted(size)
            # Width and height of a crop, and the margins, in pixels of the picture.
            wide, tall = CROP * size[0] / box[0], CROP * size[1] / box[1]
            left, top = (columns * wide - size[0]) / 2, (rows * tall - size[1]) / 2
            pixels = cut(picture)
            windows = [(-left, -top, columns * wide - left, rows * tall - top)]
            if len(pixels) > 1:
                edges = [(c * wide - left, r * tall - top) for r in range(rows) for c in range(columns)]
                windows += [(x, y, x + wide, y + tall) for x, y in edges]
            hints = [patch_hints(marks, (GRID, GRID), window).reshape(-1, 3) for window in windows]
            views.append(View(pixels, np.stack(hints), (rows, columns)))
        return views

    def begin(self, s: Tokens, encode: Encode, system: str | None) -> None:
        s.text(encode("<s>" + (f"<|system|>\n{system}<|end|>\n" if system else "")))

    def open_turn(self, s: Tokens, encode: Encode, question: str = "") -> None:
        s.text(encode("<|user|>\n" + (f"{question}\n" if question else "")))

    def show(self, s: Tokens, encode: Encode, plan: Plan, numbered: bool, only: int | None = None) -> None:
        for i, shape in enumerate(plan.shapes):
            if only not in (None, i):
                continue
            if i and only is None:
                # The hub's processor tokenizes the text between two pictures on its own.
                s.text(encode("<s>\n"))
            s.vision(encode("<|image|>")[0], num_features(shape))
        s.text(encode("<s>"))

    def ask(self, s: Tokens, encode: Encode, question: str, pictured: bool) -> None:
        start = ("\n" if question else "") if pictured else "<|user|>\n"
        s.text(encode(f"{start}{question}<|end|>\n<|assistant|>\n"))

    def settings(self, network: Network, words: Tokenizer) -> dict[str, object]:
        text, layers = network.text, range(len(network.text.layers))
        heads, half = text.layers[0].self_attn.heads, len(text.inverse)
        config = {
            "architectures": ["Phi3VForCausalLM"],
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_phi3_v.Phi3VConfig",
                "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
            },
            "bos_token_id": words.token_to_id("<s>"),
            "embd_layer": {
                "embedding_cls": "image",
                "hd_transform_order": "sub_glb",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            },
            "embd_pdrop": 0.0,
            "eos_token_id": words.token_to_id("</s>"),
            "hidden_act": "silu",
            "hidden_size": text.embed_tokens.embedding_dim,
            "img_processor": {
                "image_dim_out": Tower.DIM,
                "model_name": "openai/clip-vit-large-patch14-336",
                "name": "clip_vision_model",
                "num_img_tokens": CELLS**2,
            },
            "initializer_range": 0.02,
            "intermediate_size": text.layers[0].mlp.up_proj.out_features,
            "max_position_embeddings": LONGEST,
            "model_type": "phi3_v",
            "num_attention_heads": heads,
            "num_hidden_layers": len(layers),
            "num_key_value_heads": text.layers[0].self_attn.kv_heads,
            "original_max_position_embeddings": CONTEXT,
            "pad_token_id": words.token_to_id("<|endoftext|>"),
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"long_factor": [1.0] * half, "short_factor": [1.0] * half, "type": "su"},
            "rope_theta": 100.0,
            "sliding_window": 262144,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.38.1",
            "use_cache": True,
            "vocab_size": words.get_vocab_size(),
            "vision_config": {
                "hidden_size": Tower.DIM,
                "intermediate_size": 4 * Tower.DIM,
                "num_hidden_layers": Tower.LAYERS + 1,
                "num_attention_heads": Tower.HEADS,
                "image_size": CROP,
                "patch_size": PATCH * SHRINK,
                "projection_dim": Tower.DIM,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-05,
            },
        }
        ends = [words.token_to_id(token) for token in ("<|end|>", "<|assistant|>", "<|endoftext|>")]
        return {
            "config.json": config,
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": words.token_to_id("<s>"),
                "eos_token_id": [words.token_to_id("</s>"), *ends],
                "pad_token_id": words.token_to_id("<|endoftext|>"),
                "transformers_version": "4.38.1",
            },
            "preprocessor_config.json": {
                "auto_map": {
                    "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
                    "AutoImageProcessor": "image_processing_phi3_v.Phi3VImageProcessor",
                },
                "num_crops": NUM_CROPS,
                "image_mean": list(CLIP_MEAN),
                "image_processor_type": "Phi3VImageProcessor",
                "image_std": list(CLIP_STD),
                "processor_class": "Phi3VProcessor",
                "num_img_tokens": CELLS**2,
            },
        }

    def stored(self, network: Network) -> dict[str, Tensor]:
        text, layers = network.text, range(len(network.text.layers))
        stored = text.state_dict()
        tensors = {}
        for i in layers:
            for to, part, names in (
                ("qkv_proj", "self_attn", ("q_proj", "k_proj", "v_proj")),
                ("gate_up_proj", "mlp", ("gate_proj", "up_proj")),
            ):
                fused = [stored.pop(f"layers.{i}.{part}.{name}.weight") for name in names]
                tensors[f"model.layers.{i}.{part}.{to}.weight"] = torch.cat(fused)
        tensors |= {f"model.{name}": p for name, p in stored.items()}
        tensors["lm_head.weight"] = text.embed_tokens.weight
        vision = "model.vision_embed_tokens."
        for name, p in network.tower.state_dict().items():
            if name.endswith("patch_embedding.weight"):
                p = p.repeat_interleave(SHRINK, 2).repeat_interleave(SHRINK, 3) / SHRINK**2
            tensors[f"{vision}img_processor.vision_model.{name}"] = p
        for name, p in network.img_projection.state_dict().items():
            tensors[f"{vision}img_projection.{name}"] = p
        tensors[f"{vision}sub_GN"], tensors[f"{vision}glb_GN"] = network.sub_GN, network.glb_GN
        return tensors

    @torch.no_grad()
    def load(self, network: Network, folder: Path) -> None:
        super().load(network, folder)
        file = load_file(folder / "model.safetensors")
        for i, layer in enumerate(network.text.layers):
            for name, module, parts in (
                ("self_attn.qkv_proj", layer.self_attn, ("q_proj", "k_proj", "v_proj")),
                ("mlp.gate_up_proj", layer.mlp, ("gate_proj", "up_proj")),
            ):
                own = [getattr(module, part).weight for part in parts]
                fused = file[f"model.layers.{i}.{name}.weight"]
                for weight, given in zip(own, fused.split([len(w) for w in own]), strict=True):
                    weight.copy_(given)
        name = "embeddings.patch_embedding.weight"
        wide = file[f"model.vision_embed_tokens.img_processor.vision_model.{name}"]
        network.tower.state_dict()[name].copy_(wide[:, :, ::SHRINK, ::SHRINK] * SHRINK**2)

"""The published models, built on the meta device: every tensor of the hub's files has its place."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from opsin.api import BuildContext, KVGeometry, Model
from opsin.checkpoint.weights import LoadReport, load_weights, model_slots
from opsin.kernels import Kernels
from opsin.layers import Linear
from opsin.plugins import load_plugins
from tests.models.full_size.hub_layout import CONFIGS, Shapes, check_names, hub_shapes, published_config

DOCS = Path(__file__).parents[3] / "docs"


@dataclass(frozen=True)
class Published:
    """What is known of a published checkpoint.

    Attributes:
        recorded: its layout in tests/golden.
        parameters: in its files, as the hub counts them (half of ``total_size`` in a 16-bit index).
        unread: keys in them that no computation needs.
        max_len: longest context.
        kv: layers, heads and head size of its KV cache.
        beside: keys that the recorded checkpoint, a smaller size of the family, has not.
        without: keys that only the recorded one has, layers written as N.
    """

    recorded: str
    parameters: int
    unread: int
    max_len: int
    kv: tuple[int, int, int]
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


_HEAD = "language_model.lm_head.weight"
_BIASES = tuple(f"language_model.model.layers.N.self_attn.{name}_proj.bias" for name in "qkv")
_QK_NORMS = tuple(f"language_model.model.layers.N.self_attn.{name}_norm.weight" for name in "qk")
_TOWER = "vision_tower.encoder.layer.N"
_TOWER_BIASES = tuple(f"{_TOWER}.attention.{name}_proj.bias" for name in "qkv")
_RMS_BIASES = tuple(f"{_TOWER}.layernorm_{where}.bias" for where in ("before", "after"))
_TOWER_NORMS = tuple(f"{_TOWER}.attention.{name}_norm.weight" for name in "qk")

PUBLISHED = {
    "llava-1.5-7b-hf": Published("llava15", 7_063_427_072, 18, 4096, (32, 32, 128)),
    "llava-v1.6-vicuna-7b-hf": Published("llava_next", 7_063_431_168, 18, 4096, (32, 32, 128)),
    "llava-v1.6-mistral-7b-hf": Published("llava_next", 7_566_747_648, 18, 32768, (32, 8, 128)),
    "Phi-3-vision-128k-instruct": Published("phi3v", 4_146_621_440, 18, 131072, (32, 32, 96)),
    "Phi-3.5-vision-instruct": Published("phi3v", 4_146_621_440, 18, 131072, (32, 32, 96)),
    "Qwen2-VL-2B-Instruct": Published("qwen2vl", 2_208_985_600, 0, 32768, (28, 2, 128)),
    "Qwen2-VL-7B-Instruct": Published(
        "qwen2vl", 8_291_375_616, 0, 32768, (28, 4, 128), beside=("lm_head.weight",)
    ),
    "Qwen2.5-VL-3B-Instruct": Published("qwen25vl", 3_754_622_976, 0, 128000, (36, 2, 128)),
    "Qwen2.5-VL-7B-Instruct": Published(
        "qwen25vl", 8_292_166_656, 0, 128000, (28, 4, 128), beside=("lm_head.weight",)
    ),
    "Qwen2.5-VL-32B-Instruct": Published(
        "qwen25vl", 33_452_718_336, 0, 128000, (64, 8, 128), beside=("lm_head.weight",)
    ),
    "Qwen2.5-VL-72B-Instruct": Published(
        "qwen25vl", 73_410_777_344, 0, 128000, (80, 8, 128), beside=("lm_head.weight",)
    ),
    "Qwen3-VL-2B-Instruct": Published("qwen3vl", 2_127_532_032, 0, 262144, (28, 8, 128)),
    "Qwen3-VL-4B-Instruct": Published("qwen3vl", 4_437_815_808, 0, 262144, (36, 8, 128)),
    "Qwen3-VL-8B-Instruct": Published(
        "qwen3vl", 8_767_123_696, 0, 262144, (36, 8, 128), beside=("lm_head.weight",)
    ),
    "Qwen3-VL-32B-Instruct": Published(
        "qwen3vl", 33_357_390_064, 0, 262144, (64, 8, 128), beside=("lm_head.weight",)
    ),
    "InternVL2_5-8B-MPO-hf": Published(
        "internvl", 8_075_365_376, 0, 32768, (32, 8, 128), beside=(_HEAD,), without=_BIASES
    ),
    "InternVL3-1B-hf": Published("internvl", 938_193_024, 0, 32768, (24, 2, 64), beside=(_HEAD,)),
    "InternVL3-2B-hf": Published("internvl", 2_088_957_440, 0, 32768, (28, 2, 128), beside=(_HEAD,)),
    "InternVL3-8B-hf": Published("internvl", 7_944_373_760, 0, 32768, (28, 4, 128), beside=(_HEAD,)),
    "InternVL3-38B-hf": Published(
        "internvl",
        38_388_164_992,
        0,
        32768,
        (64, 8, 128),
        beside=(_HEAD, *_TOWER_NORMS),
        without=(*_TOWER_BIASES, *_RMS_BIASES),
    ),
    "InternVL3_5-8B-HF": Published(
        "internvl", 8_528_318_464, 0, 40960, (36, 8, 128), beside=(_HEAD, *_QK_NORMS), without=_BIASES
    ),
    "Idefics3-8B-Llama3": Published("smolvlm", 8_462_086_384, 0, 131072, (32, 8, 128)),
    "SmolVLM-256M-Instruct": Published("smolvlm", 256_484_928, 0, 8192, (30, 3, 64)),
    "SmolVLM-500M-Instruct": Published("smolvlm", 507_482_304, 0, 8192, (32, 5, 64)),
    "SmolVLM-Instruct": Published("smolvlm", 2_246_272_880, 0, 16384, (24, 32, 64)),
    "SmolVLM2-256M-Video-Instruct": Published("smolvlm", 256_484_928, 0, 8192, (30, 3, 64)),
    "SmolVLM2-500M-Video-Instruct": Published("smolvlm", 507_482_304, 0, 8192, (32, 5, 64)),
    "SmolVLM2-2.2B-Instruct": Published("smolvlm", 2_246_784_880, 0, 8192, (24, 32, 64)),
    "MiniCPM-V-2": Published("minicpmv20", 3_434_965_792, 0, 4096, (40, 36, 64)),
    "MiniCPM-Llama3-V-2_5": Published("minicpmv25", 8_537_092_336, 0, 8192, (32, 8, 128)),
    "MiniCPM-V-2_6": Published("minicpmv26", 8_099_175_152, 0, 32768, (28, 4, 128)),
}


def load(name: str, shapes: Shapes) -> tuple[Model, LoadReport]:
    """The model of a published config.json, filled with tensors that have shapes and no memory."""
    config = published_config(name)
    spec = load_plugins().model(config["architectures"][0])
    context = BuildContext(config=config, kernels=Kernels(), dtype=torch.bfloat16, device="meta")
    model = spec.build(context)
    tensors = (
        (key, torch.empty(shape, dtype=torch.bfloat16, device="meta")) for key, shape in shapes.items()
    )
    return model, load_weights(model, tensors)


def test_every_config_is_checked() -> None:
    assert sorted(PUBLISHED) == sorted(file.stem for file in CONFIGS.iterdir())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_hubs_tensors_are_the_models(name: str) -> None:
    known, config = PUBLISHED[name], published_config(name)
    shapes = hub_shapes(config)
    check_names(shapes, known.recorded, known.beside, known.without)
    assert sum(map(prod, shapes.values())) == known.parameters

    model, report = load(name, shapes)
    report.check()
    assert sorted([*report.loaded, *report.ignored]) == sorted(shapes)
    # Read after the last layer but one: that layer and the norm behind it are not.
    assert len(report.ignored) == known.unread
    assert all(".layers.23." in key or ".post_layernorm." in key for key in report.ignored)

    assert isinstance(model, nn.Module)
    taken = sum(prod(slot.shape) for slot in model_slots(model).values() if not slot.optional)
    assert taken == known.parameters - sum(prod(shapes[key]) for key in report.ignored)
    for path, module in model.named_modules():  # each of them got all its parts, and multiplies
        if isinstance(module, Linear):
            x = torch.empty((1, module.in_features), dtype=torch.bfloat16, device="meta")
            assert module(x).shape == (1, module.out_features), path
    tokens = torch.zeros(3, dtype=torch.int64, device="meta")
    vocab_size = {**config, **config.get("text_config", {})}["vocab_size"]
    assert model.logits(model.embed(tokens)).shape == (3, vocab_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_pages_say_how_large_it_is(name: str) -> None:
    known = PUBLISHED[name]
    layers, kv_heads, head_size = known.kv
    kv_megabytes = round(2 * layers * kv_heads * head_size * 2 * 1000 / 1e6)
    gigabytes = 2 * known.parameters / 1e9
    sizes = f"| {known.parameters:,} | {gigabytes:.1f} GB | {kv_megabytes} MB | {known.max_len:,} |"
    lines = [line for page in DOCS.rglob("*.md") for line in page.read_text().splitlines()]
    assert [line for line in lines if f"{name}`" in line and sizes in line], sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_engine_asks_of_the_model(name: str) -> None:
    known, config = PUBLISHED[name], published_config(name)
    spec = load_plugins().model(config["architectures"][0])
    model = spec.build(BuildContext(config=config, kernels=Kernels(), dtype=torch.bfloat16, device="meta"))
    layers, kv_heads, head_size = known.kv
    assert model.kv_geometry == KVGeometry(num_layers=layers, num_kv_heads=kv_heads, head_size=head_size)
    longest = spec.max_len(config) if spec.max_len else config["max_position_embeddings"]
    assert longest == known.max_len


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_key_less_or_a_key_more_is_reported(name: str) -> None:
    shapes = hub_shapes(published_config(name))
    _, whole = load(name, shapes)
    key = next(key for key in sorted(whole.loaded, reverse=True) if ".layers.1" in key)
    less = {other: shape for other, shape in shapes.items() if other != key}
    report = load(name, less | {"language_model.model.layers.99.mlp.up_proj.weight": (1, 1)})[1]
    assert len(report.missing) == 1
    assert report.unexpected == ["language_model.model.layers.99.mlp.up_proj.weight"]

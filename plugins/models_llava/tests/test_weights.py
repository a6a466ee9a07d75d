"""Every tensor of a checkpoint has its place: recorded key lists, and the published full-size models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.testing.models import build_unloaded, fill, weight_shapes
from opsin_models_llava.model import Llava, LlavaNext
from opsin_models_llava.text import max_len

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"

CLIP_L_336 = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
COMMON = {
    "ignore_index": -100,
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_config": CLIP_L_336,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
VICUNA = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
MISTRAL = {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
PUBLISHED: dict[str, tuple[type[Llava], dict[str, Any], int, int, int]] = {
    "llava-1.5-7b": (Llava, {**COMMON, "text_config": VICUNA}, 686, 7_063_427_072, 4096),
    "llava-v1.6-vicuna-7b": (LlavaNext, {**COMMON, "text_config": VICUNA}, 687, 7_063_431_168, 4096),
    "llava-v1.6-mistral-7b": (LlavaNext, {**COMMON, "text_config": MISTRAL}, 687, 7_566_747_648, 32768),
}
"""Model, config.json, tensors and parameters of its checkpoint, longest context."""


def build(kind: type[Llava], config: dict[str, Any]) -> Llava:
    return build_unloaded(kind, config)


def hub_tensors(config: dict[str, Any], *, newline: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of a hub checkpoint with a CLIP tower, written down from its layout."""
    vision, text = config["vision_config"], config["text_config"]
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    hidden, wide, vocab = 4096, text.get("intermediate_size", 11008), text["vocab_size"]
    key_width = text.get("num_key_value_heads", 32) * 128
    tower = "vision_tower.vision_model"
    yield f"{tower}.embeddings.class_embedding", (width,)
    yield f"{tower}.embeddings.patch_embedding.weight", (width, 3, 14, 14)
    yield f"{tower}.embeddings.position_embedding.weight", (577, width)
    for name in ("pre_layrnorm", "post_layernorm"):
        yield f"{tower}.{name}.weight", (width,)
        yield f"{tower}.{name}.bias", (width,)
    for layer in (f"{tower}.encoder.layers.{number}" for number in range(24)):
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{layer}.{name}.weight", (width,)
            yield f"{layer}.{name}.bias", (width,)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{layer}.self_attn.{name}.weight", (width, width)
            yield f"{layer}.self_attn.{name}.bias", (width,)
        yield f"{layer}.mlp.fc1.weight", (inner, width)
        yield f"{layer}.mlp.fc1.bias", (inner,)
        yield f"{layer}.mlp.fc2.weight", (width, inner)
        yield f"{layer}.mlp.fc2.bias", (width,)
    for number, columns in ((1, width), (2, hidden)):
        yield f"multi_modal_projector.linear_{number}.weight", (hidden, columns)
        yield f"multi_modal_projector.linear_{number}.bias", (hidden,)
    if newline:
        yield "image_newline", (hidden,)
    yield "language_model.lm_head.weight", (vocab, hidden)
    yield "language_model.model.embed_tokens.weight", (vocab, hidden)
    yield "language_model.model.norm.weight", (hidden,)
    for layer in (f"language_model.model.layers.{number}" for number in range(32)):
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for name, rows in (
            ("q_proj", hidden),
            ("k_proj", key_width),
            ("v_proj", key_width),
            ("o_proj", hidden),
        ):
            yield f"{layer}.self_attn.{name}.weight", (rows, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{layer}.mlp.up_proj.weight", (wide, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, wide)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_have_the_published_tensors(name: str) -> None:
    kind, config, num_tensors, num_parameters, context = PUBLISHED[name]
    stored = dict(hub_tensors(config, newline=kind is LlavaNext))
    assert len(stored) == num_tensors
    assert sum(map(prod, stored.values())) == num_parameters
    model = build(kind, config)
    slots = weight_shapes(model)
    names = {key: model.weight_name(key) for key in stored}
    taken = {key: name for key, name in names.items() if name is not None}
    assert sorted(taken.values()) == sorted(slots)
    assert all(stored[key] == slots[name] for key, name in taken.items())
    tower = "vision_tower.vision_model"
    dropped = {key for key, name in names.items() if name is None}
    assert len(dropped) == 18
    assert all(key.startswith((f"{tower}.encoder.layers.23.", f"{tower}.post_layernorm.")) for key in dropped)
    assert max_len(config) == context


@pytest.mark.parametrize(("family", "kind"), [("llava15", Llava), ("llava_next", LlavaNext)])
def test_recorded_keys_are_all_of_the_model(family: str, kind: type[Llava]) -> None:
    keys = json.loads((GOLDEN / family / "weight_keys.json").read_text())
    model = build(kind, json.loads((GOLDEN / family / "model" / "config.json").read_text()))
    names = {key: model.weight_name(key) for key in keys}
    assert sorted(filter(None, names.values())) == sorted(weight_shapes(model))
    dropped = [key for key, name in names.items() if name is None]
    assert len(dropped) == 18, "one layer of the tower, and the norm after the last"


@pytest.mark.parametrize(
    ("stored", "here"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.vision_tower.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("vision_tower.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("model.image_newline", "image_newline"),
        ("vision_tower.vision_model.head.probe", None),
        ("vision_tower.vision_model.encoder.layers.23.mlp.fc1.bias", None),
        (
            "vision_tower.vision_model.encoder.layers.22.mlp.fc1.bias",
            "vision_tower.encoder.layers.22.mlp.fc1.bias",
        ),
        (
            "vision_tower.vision_model.encoder.layers.24.mlp.fc1.bias",
            "vision_tower.encoder.layers.24.mlp.fc1.bias",
        ),
        (
            "vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias",
            "vision_tower.encoder.layers.2.mlp.fc1.bias",
        ),
    ],
)
def test_names_of_the_hub_and_of_transformers(stored: str, here: str | None) -> None:
    model = build(LlavaNext, {**COMMON, "text_config": VICUNA})
    assert model.weight_name(stored) == here


@pytest.mark.parametrize("layers", [([-2], 23), ([-1], 24), ([1, -2], 23), ([3], 3), ([24], 24)])
def test_the_tower_is_as_deep_as_it_is_read(layers: tuple[list[int], int]) -> None:
    asked, depth = layers
    model = build(Llava, {**COMMON, "text_config": VICUNA, "vision_feature_layer": asked})
    slots = weight_shapes(model)
    numbers = {int(name.split(".")[3]) for name in slots if name.startswith("vision_tower.encoder.layers.")}
    assert numbers == set(range(depth))
    assert slots["multi_modal_projector.linear_1.weight"] == (4096, 1024 * len(asked))


def test_weights_that_do_not_belong_are_reported() -> None:
    model = build(Llava, {**COMMON, "text_config": VICUNA})
    stray = ["vision_tower.vision_model.encoder.layers.24.mlp.fc1.bias", "image_newline", "model.vision.proj"]
    report = fill(model, [(key, torch.ones(1)) for key in stray])
    assert report.unexpected == stray


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_layer": -26}, "24 layers"),
        ({"vision_feature_layer": 25}, "24 layers"),
        ({"vision_feature_layer": []}, "24 layers"),
        ({"vision_feature_select_strategy": "patch"}, '"default" or "full"'),
        ({"text_config": {"model_type": "gemma"}}, "llama, mistral, qwen2"),
        ({"text_config": {**VICUNA, "attention_bias": True}}, "attention_bias"),
        ({"text_config": {**VICUNA, "rope_scaling": {"type": "ntk", "factor": 2.0}}}, "'ntk'"),
        (
            {"text_config": {**VICUNA, "hidden_size": "4096"}},
            r"text_config\.hidden_size is '4096'; .* integer",
        ),
        (
            {"text_config": {**VICUNA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}},
            "low_freq_factor",
        ),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    ],
)
def test_configurations_that_cannot_be_followed_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(Llava, {**COMMON, "text_config": VICUNA, **changes})


def test_a_grid_needs_features_of_the_patches_alone() -> None:
    config = {**COMMON, "text_config": VICUNA, "vision_feature_select_strategy": "full"}
    with pytest.raises(ValueError, match="577 features"):
        build(LlavaNext, config)
    assert build(Llava, config).features.num_rows == 577


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ({}, 2048),
        (VICUNA, 4096),
        ({**MISTRAL, "sliding_window": 4096}, 4096),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "qwen2", "sliding_window": 4096}, 32768),
    ],
)
def test_context_is_no_longer_than_the_window(text: dict[str, Any], length: int) -> None:
    assert max_len({**COMMON, "text_config": text}) == length

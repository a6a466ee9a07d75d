"""What the published checkpoints hold: keys and shapes, made without any of our model code.

Shapes come from transformers' (or torch's) own classes, built on the meta device from the published
config.json (`CONFIGS`). Names are theirs, with the prefixes of the hub's files. `check_names` holds them
against the key lists that were recorded from the hub's layout (tests/golden/*/weight_keys.json).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIGS = Path(__file__).parent / "configs"
"""config.json of published checkpoints: their values, for the parts that say something about the weights."""

Shapes = dict[str, tuple[int, ...]]


def published_config(name: str) -> dict[str, Any]:
    """A published config.json."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def hub_shapes(config: Mapping[str, Any]) -> Shapes:
    """Key -> shape of every tensor in the checkpoint that belongs to a config.json."""
    shapes: Shapes = _LAYOUTS[config["architectures"][0]](config)
    return shapes


def check_names(
    shapes: Shapes, recorded: str, beside: Sequence[str] = (), without: Sequence[str] = ()
) -> None:
    """Assert that the keys are those recorded in tests/golden/``recorded``, layers counted as one.

    ``beside``: keys that the recorded checkpoint has not, being another size or text model of its family;
    ``without``: keys that only the recorded one has, layers written as N.
    """
    listed = [*json.loads((GOLDEN / recorded / "weight_keys.json").read_text()), *beside]
    here, there = ({_without_numbers(key) for key in keys} for keys in (shapes, listed))
    assert not set(without) & here
    assert here == there - set(without), here ^ there


def _without_numbers(key: str) -> str:
    return re.sub(r"(layers?|blocks)\.\d+\.", r"\1.N.", key)


def _llava(config: Mapping[str, Any]) -> Shapes:
    return _renamed(_shapes(lambda: LlavaForConditionalGeneration(LlavaConfig(**config))), _LLAVA_PREFIXES)


def _llava_next(config: Mapping[str, Any]) -> Shapes:
    return _renamed(
        _shapes(lambda: LlavaNextForConditionalGeneration(LlavaNextConfig(**config))), _LLAVA_PREFIXES
    )


_LLAVA_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}
"""As transformers 5 has it in memory -> as the hub's files have it."""


def _qwen2_vl(config: Mapping[str, Any]) -> Shapes:
    shapes = _shapes(lambda: Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config)))
    return _headless(config, _renamed(shapes, _QWEN_PREFIXES))


def _qwen25_vl(config: Mapping[str, Any]) -> Shapes:
    shapes = _shapes(lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)))
    return _headless(config, _renamed(shapes, _QWEN_PREFIXES))


def _qwen3_vl(config: Mapping[str, Any]) -> Shapes:
    return _headless(config, _shapes(lambda: Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))))


_QWEN_PREFIXES = {"model.language_model.": "model.", "model.visual.": "visual."}


def _headless(config: Mapping[str, Any], shapes: Shapes) -> Shapes:
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]  # the files hold a shared table once
    return shapes


def _internvl(config: Mapping[str, Any]) -> Shapes:
    shapes = _renamed(
        _shapes(lambda: InternVLForConditionalGeneration(InternVLConfig(**config))), _INTERNVL_PREFIXES
    )
    if config["tie_word_embeddings"]:
        del shapes["language_model.lm_head.weight"]
    return shapes


_INTERNVL_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.": "",
}


def _idefics3(config: Mapping[str, Any]) -> Shapes:
    return _shapes(lambda: Idefics3ForConditionalGeneration(Idefics3Config(**config)))


def _smolvlm(config: Mapping[str, Any]) -> Shapes:
    return _shapes(lambda: SmolVLMForConditionalGeneration(SmolVLMConfig(**config)))


def _phi3_v(config: Mapping[str, Any]) -> Shapes:
    decoder = _shapes(lambda: Phi3ForCausalLM(_text_config(Phi3Config, config, pad_token_id=None)))
    clip = CLIPVisionConfig(  # openai/clip-vit-large-patch14-336: the config names it, the code describes it
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    hidden, merged = config["hidden_size"], 4 * config["img_processor"]["image_dim_out"]
    parts: dict[str, Shapes] = {
        "img_processor.vision_model.": _shapes(lambda: CLIPVisionModel(clip)),
        "img_projection.": _shapes(
            lambda: nn.Sequential(nn.Linear(merged, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        ),
        "": {"glb_GN": (1, 1, merged), "sub_GN": (1, 1, 1, merged)},
    }
    return decoder | _below("model.vision_embed_tokens.", parts)


def _minicpm_v(config: Mapping[str, Any]) -> Shapes:
    text: Callable[[], nn.Module]
    if config.get("version") == 2.6:
        text = lambda: Qwen2ForCausalLM(_text_config(Qwen2Config, config))  # noqa: E731
    else:  # MiniCPM's own differs from Llama in scalars only
        text = lambda: LlamaForCausalLM(_text_config(LlamaConfig, config))  # noqa: E731
    if "version" not in config:
        tower = _timm_tower()
    elif config["vision_config"]["model_type"] == "idefics2":
        vision = Idefics2VisionConfig(**config["vision_config"])
        tower = _shapes(lambda: Idefics2VisionTransformer(vision))
    else:
        siglip = SiglipVisionConfig(**config["vision_config"], vision_use_head=False)
        tower = _shapes(lambda: SiglipVisionModel(siglip))
    return _below("", {"llm.": _shapes(text), "vpm.": tower, "resampler.": _resampler(config)})


def _timm_tower() -> Shapes:
    """timm's vit_so400m_patch14_siglip_384 without its last block and its pooling head."""
    width, wide = 1152, 4304

    def block() -> nn.Module:
        linear = nn.Linear
        return nn.ModuleDict(
            {
                "norm1": nn.LayerNorm(width),
                "attn": nn.ModuleDict({"qkv": linear(width, 3 * width), "proj": linear(width, width)}),
                "norm2": nn.LayerNorm(width),
                "mlp": nn.ModuleDict({"fc1": linear(width, wide), "fc2": linear(wide, width)}),
            }
        )

    parts: dict[str, Shapes] = {
        "blocks.": _shapes(lambda: nn.ModuleList(block() for _ in range(26))),
        "patch_embed.proj.": _shapes(lambda: nn.Conv2d(3, width, 14, 14)),
        "norm.": _shapes(lambda: nn.LayerNorm(width)),
        "": {"pos_embed": (1, 27 * 27, width)},
    }
    return _below("", parts)


def _resampler(config: Mapping[str, Any]) -> Shapes:
    width, queries = config["hidden_size"], (config["query_num"], config["hidden_size"])
    parts: dict[str, Shapes] = {
        "attn.": _shapes(lambda: nn.MultiheadAttention(width, width // 128)),
        "kv_proj.": _shapes(lambda: nn.Linear(1152, width, bias=False)),
        "": {"query": queries, "proj": (width, width)},
    }
    parts |= {f"{name}.": _shapes(lambda: nn.LayerNorm(width)) for name in ("ln_q", "ln_kv", "ln_post")}
    if "version" not in config:
        parts[""]["pos_embed"] = queries
    return _below("", parts)


_LAYOUTS: Mapping[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava_next,
    "Idefics3ForConditionalGeneration": _idefics3,
    "InternVLForConditionalGeneration": _internvl,
    "Qwen2VLForConditionalGeneration": _qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": _qwen25_vl,
    "Qwen3VLForConditionalGeneration": _qwen3_vl,
    "SmolVLMForConditionalGeneration": _smolvlm,
    "Phi3VForCausalLM": _phi3_v,
    "MiniCPMV": _minicpm_v,
}


def _text_config(kind: Any, config: Mapping[str, Any], **changes: Any) -> Any:
    """A language model's config out of a flat one."""
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "tie_word_embeddings"),
    )
    return kind(**{name: config[name] for name in names}, **changes)


def _shapes(build: Callable[[], nn.Module]) -> Shapes:
    """State dict of a module that is never really made."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}


def _renamed(shapes: Shapes, prefixes: Mapping[str, str]) -> Shapes:
    found = {}
    for key, shape in shapes.items():
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        found[prefixes.get(old, "") + key.removeprefix(old)] = shape
    return found


def _below(prefix: str, parts: Mapping[str, Shapes]) -> Shapes:
    return {f"{prefix}{part}{key}": shape for part, shapes in parts.items() for key, shape in shapes.items()}

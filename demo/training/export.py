"""Writes a trained network as a hub repository of the Qwen2-VL family is laid out."""

from __future__ import annotations

import json
from pathlib import Path

from model import MERGE, PATCH, TEMPORAL, Settings, TinyQwen2VL
from safetensors.torch import save_file
from tokenizers import Tokenizer


def config(s: Settings, tokenizer: Tokenizer) -> dict[str, object]:
    """config.json, flat, as the family's repositories have it."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": s.hidden,
        "initializer_range": 0.02,
        "intermediate_size": s.inner,
        "max_position_embeddings": 4096,
        "max_window_layers": s.layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": s.rope_theta,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": s.vision_layers,
            "embed_dim": s.vision_hidden,
            "mlp_ratio": s.vision_ratio,
            "num_heads": s.vision_heads,
            "in_chans": 3,
            "hidden_size": s.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": TEMPORAL,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(s.mrope_section)},
        "vocab_size": s.vocabulary,
    }


def export(model: TinyQwen2VL, s: Settings, folder: Path) -> None:
    """Writes weights and settings beside the tokenizer's files, which must be there already."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    generation = {
        "bos_token_id": eos[1],
        "pad_token_id": eos[1],
        "do_sample": True,
        "eos_token_id": eos,
        "repetition_penalty": 1.0,
        "temperature": 0.01,
        "top_p": 0.001,
        "top_k": 1,
        "transformers_version": "4.37.0",
    }
    preprocessor = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    files = {
        "config.json": config(s, tokenizer),
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    # Written aside and moved, so that a reader never meets half a file.
    partial = folder / "model.safetensors.partial"
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, partial, {"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")

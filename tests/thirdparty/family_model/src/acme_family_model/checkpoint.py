"""Two tiny checkpoints with random weights: the output head is tied to the embeddings in one of them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

ARCHITECTURE = "AcmeFamilyForConditionalGeneration"
SPECIAL = ["<unk>", "<eos>", "<image>", "<start>", "<end>"]
VOCABULARY = [*SPECIAL, *(f"w{number}" for number in range(27))]
HIDDEN, WIDE, LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 32, 48, 2, 4, 2, 8
VISION, VISION_WIDE, IMAGE, PATCH = 16, 24, 8, 4


def tied() -> Path:
    """A new folder: what the entry point of ``acme/family-tied`` returns."""
    return write(Path(tempfile.mkdtemp(prefix="acme-family-")), tied=True)


def untied() -> Path:
    """A new folder: what the entry point of ``acme/family-untied`` returns."""
    return write(Path(tempfile.mkdtemp(prefix="acme-family-")), tied=False)


def write(folder: Path, *, tied: bool) -> Path:
    """Write config, tokenizer and weights."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}

    def draw(key: str, *shape: int, scale: float = 1.0) -> None:
        tensors[key] = torch.randn(shape, generator=random) * scale / shape[-1] ** 0.5

    def linear(name: str, outputs: int, inputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs)
        draw(f"{name}.bias", outputs)

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = torch.ones(size)

    def layer_norm(name: str, size: int) -> None:
        norm(name, size)
        draw(f"{name}.bias", size)

    tower = "vision_tower"
    draw(f"{tower}.embeddings.patch_embedding.weight", VISION, 3, PATCH, PATCH)
    draw(f"{tower}.embeddings.patch_embedding.bias", VISION)
    draw(f"{tower}.embeddings.position_embedding.weight", (IMAGE // PATCH) ** 2, VISION)
    layer = f"{tower}.encoder.layers.0"
    for name in ("layer_norm1", "layer_norm2"):
        layer_norm(f"{layer}.{name}", VISION)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        linear(f"{layer}.self_attn.{name}", VISION, VISION)
    linear(f"{layer}.mlp.fc1", VISION_WIDE, VISION)
    linear(f"{layer}.mlp.fc2", VISION, VISION_WIDE)
    layer_norm(f"{tower}.post_layernorm", VISION)
    linear("projector", HIDDEN, VISION)
    draw("image_end", HIDDEN)

    decoder = "model.language_model"
    draw(f"{decoder}.embed_tokens.weight", len(VOCABULARY), HIDDEN, scale=4.0)
    norm(f"{decoder}.norm", HIDDEN)
    for number in range(LAYERS):
        layer = f"{decoder}.layers.{number}"
        norm(f"{layer}.input_layernorm", HIDDEN)
        norm(f"{layer}.post_attention_layernorm", HIDDEN)
        linear(f"{layer}.self_attn.q_proj", HEADS * HEAD_SIZE, HIDDEN)
        linear(f"{layer}.self_attn.k_proj", KV_HEADS * HEAD_SIZE, HIDDEN)
        linear(f"{layer}.self_attn.v_proj", KV_HEADS * HEAD_SIZE, HIDDEN)
        draw(f"{layer}.self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_SIZE, scale=4.0)
        draw(f"{layer}.mlp.gate_proj.weight", WIDE, HIDDEN, scale=2.0)
        draw(f"{layer}.mlp.up_proj.weight", WIDE, HIDDEN, scale=2.0)
        draw(f"{layer}.mlp.down_proj.weight", HIDDEN, WIDE, scale=2.0)
    if tied:  # exporters store it all the same
        tensors["lm_head.weight"] = tensors[f"{decoder}.embed_tokens.weight"].clone()
    else:
        draw("lm_head.weight", len(VOCABULARY), HIDDEN, scale=4.0)
    save_file(tensors, folder / "model.safetensors")

    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "acme_family",
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "tie_word_embeddings": tied,
        "image_token_id": VOCABULARY.index("<image>"),
        "eos_token_id": VOCABULARY.index("<eos>"),
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": VISION,
            "intermediate_size": VISION_WIDE,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": IMAGE,
            "patch_size": PATCH,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def _tokenizer() -> dict[str, object]:
    """One token for a word."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": VOCABULARY.index(t), "content": t, **flags} for t in SPECIAL],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(VOCABULARY)},
            "unk_token": "<unk>",
        },
    }

"""A Qwen2-VL checkpoint as two GGUF files; runs in llama.cpp's environment.

llama.cpp's own converter knows a tokenizer by a hash of what it makes of a text, and refuses one with made-up
words. Keys and tensor names are those of its ``conversion/qwenvl.py`` and ``tools/mtmd/clip.cpp``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

from peers.engines.gguf_names import TEXT, VISION, gguf_names

FORMS = {
    "f16": (GGMLQuantizationType.F16, GGMLQuantizationType.F16),
    "Q8_0": (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0),
    "Q4_0": (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0),
}
"""Form -> types of the decoder's matrices, and of the others: embedding (also the head) and vision tower."""


def main() -> None:
    """``python -m peers.engines.gguf_export MODEL FORM FOLDER``."""
    model, form, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    config = json.loads((model / "config.json").read_text())
    folder.mkdir(parents=True)
    layers, others = FORMS[form]
    text = GGUFWriter(folder / TEXT, "qwen2vl")
    _describe_text(text, config)
    _add_tokenizer(text, model, config)
    vision = GGUFWriter(folder / VISION, "clip")
    _describe_vision(vision, config, json.loads((model / "preprocessor_config.json").read_text()))
    for name, tensor in tensors(model):
        of_vision = name.startswith("visual.")
        for new, part in zip(gguf_names(name), _parts(name, tensor)):
            if of_vision:
                _add(vision, new, part, others)
            else:
                _add(text, new, part, others if new == "token_embd.weight" else layers)
    for writer in (text, vision):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def tensors(model: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Name and float32 values of every tensor of bfloat16 safetensors files, read without torch."""
    for file in sorted(model.glob("*.safetensors")):
        raw = np.memmap(file, dtype=np.uint8, mode="r")
        size = int(raw[:8].view(np.uint64)[0])
        header = json.loads(raw[8 : 8 + size].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{file}: {name} is stored as {entry['dtype']}; expected BF16")
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            halves = np.frombuffer(raw[begin:end].tobytes(), dtype=np.uint16)
            yield name, (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def _parts(name: str, tensor: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """The tensors that one becomes, in the order of `gguf_names`."""
    if name == "visual.patch_embed.proj.weight":  # one convolution for each of the two frames
        return [tensor[:, :, 0], tensor[:, :, 1]]
    return np.split(tensor, 3) if ".attn.qkv." in name else [tensor]


def _add(writer: GGUFWriter, name: str, tensor: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> None:
    """Vectors and the patch embedding stay float32; so do rows that are no multiple of a block of 32."""
    if tensor.ndim != 2 or (kind is not GGMLQuantizationType.F16 and tensor.shape[-1] % 32):
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    elif kind is GGMLQuantizationType.F16:
        writer.add_tensor(name, tensor.astype(np.float16))
    else:
        writer.add_tensor(name, quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)


def _describe_text(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_sections([*config["rope_scaling"]["mrope_section"], 0])


def _describe_vision(writer: GGUFWriter, config: Mapping[str, Any], processor: Mapping[str, Any]) -> None:
    vision = config["vision_config"]
    writer.add_string("clip.projector_type", "qwen2vl_merger")
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(config["hidden_size"])
    writer.add_vision_image_size(560)
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["embed_dim"])
    writer.add_vision_feed_forward_length(vision["embed_dim"] * vision["mlp_ratio"])
    writer.add_vision_block_count(vision["depth"])
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean(processor["image_mean"])
    writer.add_vision_image_std(processor["image_std"])


def _add_tokenizer(writer: GGUFWriter, model: Path, config: Mapping[str, Any]) -> None:
    stored = json.loads((model / "tokenizer.json").read_text())
    special = {entry["id"]: entry["content"] for entry in stored["added_tokens"]}
    known = {**{number: text for text, number in stored["model"]["vocab"].items()}, **special}
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([known.get(number, f"[PAD{number}]") for number in range(size)])
    kinds = [TokenType.UNUSED, TokenType.NORMAL, TokenType.CONTROL]
    writer.add_token_types([kinds[(number in known) + (number in special)] for number in range(size)])
    merges = stored["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    main()

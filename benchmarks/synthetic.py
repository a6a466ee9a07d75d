"""A synthetic Qwen2-VL checkpoint of realistic size: Qwen2-0.5B's text model under a 12-layer vision tower.

Laid out as a hub repository is (flat config.json, sharded safetensors with hub key names, tokenizer and
processor files), so that any engine that loads the real family loads this one. The weights are random,
from a fixed seed; the vocabulary has the real size and the real ids of the special tokens, but its words
are made up. Built once, into a folder named after a hash of everything it is built from.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

StoredAs = Literal["float32", "bfloat16"]

CACHE = Path(__file__).parent / ".cache"
SEED = 20240918
FORMAT = 1
"""Raise when the way of building changes in a way that the constants below do not show."""

SHARD_BYTES = 10**9
MAX_PIECE_CHARS = 6

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2_vl",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 12,
        "embed_dim": 640,
        "mlp_ratio": 4,
        "num_heads": 8,
        "in_chans": 3,
        "hidden_size": 896,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vocab_size": 151936,
}

PREPROCESSOR: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}

GENERATION: dict[str, Any] = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.0,
    "temperature": 0.01,
    "top_p": 0.001,
    "top_k": 1,
}

FIRST_SPECIAL_ID = 151643
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = tuple(
    """
    are a helpful assistant what which where how many is the of in on near left right above below
    picture image colour shape number circle square line point shadow light corner centre edge texture
    pattern object person animal plant building water sky road table window door sign letter word
    describe count compare name find read tell between behind before after largest smallest brightest
    darkest first second third and or not
    """.split()  # noqa: SIM905
)
"""Words the tokenizer knows whole after a space; the workloads' questions are made of them."""

BARE_WORDS = ("system", "user", "assistant", "You")
"""Words it knows whole without one: what the chat template puts at the start of a line."""

# Qwen2's pre-tokenization pattern, as its tokenizer.json has it.
PRE_TOKENIZATION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def checkpoint(stored: StoredAs = "float32") -> Path:
    """Folder of the synthetic checkpoint; builds it first if it is not there (2.3 GB, or half of it).

    Args:
        stored: type of the tensors in the file. Their values are the same bfloat16 numbers either way; on the
            hub such models are bfloat16.
    """
    config = {**CONFIG, "torch_dtype": stored}
    recipe = json.dumps(
        [FORMAT, SEED, config, PREPROCESSOR, GENERATION, SPECIAL_TOKENS, CHAT_TEMPLATE, WORDS, BARE_WORDS]
    )
    folder = CACHE / f"qwen2vl-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not folder.exists():
        # Built aside and renamed when complete: an interrupted build is never mistaken for a checkpoint.
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_tokenizer(partial)
        _write_json(partial / "config.json", config)
        _write_json(partial / "preprocessor_config.json", PREPROCESSOR)
        _write_json(partial / "generation_config.json", GENERATION)
        _write_json(partial / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
        _write_weights(partial, stored)
        partial.rename(folder)
    return folder


def weight_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a Qwen2-VL checkpoint, hub names, tied embeddings."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, out in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{layer}.self_attn.{name}_proj.weight", (out, hidden)
            yield f"{layer}.self_attn.{name}_proj.bias", (out,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (inter, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inter, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inter)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    vision = config["vision_config"]
    width, patch = vision["embed_dim"], vision["patch_size"]
    wide, merged = width * vision["mlp_ratio"], width * vision["spatial_merge_size"] ** 2
    yield (
        "visual.patch_embed.proj.weight",
        (width, vision["in_chans"], vision["temporal_patch_size"], patch, patch),
    )
    for i in range(vision["depth"]):
        block = f"visual.blocks.{i}"
        for name, shape in (
            ("attn.qkv", (3 * width, width)),
            ("attn.proj", (width, width)),
            ("mlp.fc1", (wide, width)),
            ("mlp.fc2", (width, wide)),
        ):
            yield f"{block}.{name}.weight", shape
            yield f"{block}.{name}.bias", shape[:1]
        for name in ("norm1", "norm2"):
            yield f"{block}.{name}.weight", (width,)
            yield f"{block}.{name}.bias", (width,)
    yield "visual.merger.ln_q.weight", (width,)
    yield "visual.merger.ln_q.bias", (width,)
    yield "visual.merger.mlp.0.weight", (merged, merged)
    yield "visual.merger.mlp.0.bias", (merged,)
    yield "visual.merger.mlp.2.weight", (vision["hidden_size"], merged)
    yield "visual.merger.mlp.2.bias", (vision["hidden_size"],)


def random_weight(name: str, shape: Sequence[int]) -> Tensor:
    """One float32 tensor, the same on every call. Its values are bfloat16 numbers, as in real checkpoints.

    The standard deviations keep greedy decoding alive: the layers outweigh the input embedding in the
    residual stream, and the feed-forward layers outweigh attention, whose average over the context is much
    the same at every position (else one token repeats for ever); queries and keys are wide enough for
    attention to pick positions, so that a wrong position, mask or picture changes the tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED ^ zlib.crc32(name.encode()))
    if "norm" in name or "ln_q" in name:
        centre, deviation = (1.0, 0.1) if name.endswith("weight") else (0.0, 0.02)
    elif "q_proj" in name or "k_proj" in name or "attn.qkv" in name:
        centre, deviation = 0.0, 0.05
    elif "gate_proj" in name or "up_proj" in name:
        centre, deviation = 0.0, 0.04
    elif "merger.mlp.2" in name:
        centre, deviation = 0.0, 0.005
    else:
        centre, deviation = 0.0, 0.02
    tensor = torch.empty(tuple(shape)).normal_(centre, deviation, generator=generator)
    if name == "model.embed_tokens.weight":
        # Small rows have small logits: no special token, and no id without a token, is ever generated.
        tensor[FIRST_SPECIAL_ID:] *= 0.1
    return tensor.bfloat16().float()


def synthetic_tokenizer() -> Tokenizer:
    """Byte-level BPE with Qwen2's vocabulary size, pattern and special tokens; its words are made up."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> bool:
        if left + right in vocabulary:
            return False
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
        return True

    # Merged from the left, so that no other merge cuts in: every left part starts with Ġ, byte-level BPE's
    # spelling of a leading space.
    for word in (*("Ġ" + word for word in WORDS), *BARE_WORDS):
        for end in range(1, len(word)):
            merge(word[:end], word[end])
    source = random.Random(SEED)
    pieces = list("abcdefghijklmnopqrstuvwxyz")
    starts = ["Ġ", *pieces]
    while len(vocabulary) < FIRST_SPECIAL_ID:
        left, right = source.choice(starts), source.choice(pieces)
        if merge(left, right) and len(left + right) <= MAX_PIECE_CHARS:
            starts.append(left + right)
            if not left.startswith("Ġ"):
                pieces.append(left + right)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZATION), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _write_tokenizer(folder: Path) -> None:
    tokenizer = synthetic_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    shape = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(FIRST_SPECIAL_ID + i): {"content": token, **shape} for i, token in enumerate(SPECIAL_TOKENS)}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def _write_weights(folder: Path, stored: StoredAs) -> None:
    import torch
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    size = total = 0
    shapes = dict(weight_shapes(CONFIG))
    for name, shape in shapes.items():
        num_bytes = getattr(torch, stored).itemsize
        for extent in shape:
            num_bytes *= extent
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
        total += num_bytes
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="synthetic checkpoint") as bar:
        for i, names in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = random_weight(name, shapes[name]).to(getattr(torch, stored))
                weight_map[name] = file
                bar.update(tensors[name].nbytes)
            save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(checkpoint())

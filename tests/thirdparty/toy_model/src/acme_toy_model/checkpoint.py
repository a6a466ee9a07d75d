"""The checkpoint, written by hand.

The hidden vector has named places. A picture's tokens carry their colour; the only layer averages the
colours over everything before (its queries and keys are zero, so attention is uniform); the head reads the
average and names the strongest. A colour's word raises a flag, and the flag makes the text end.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

ARCHITECTURE = "AcmeToyForConditionalGeneration"
VOCABULARY = ["<unk>", "<eos>", "<image>", "red", "green", "blue", "which", "colour", "?"]
HIDDEN = 16
HEAD_SIZE = 8
COLOUR, AVERAGE, ANSWERED, ONE = 0, 3, 6, 7


def path() -> Path:
    """A new folder with the checkpoint: what the entry point of ``acme/toy`` returns."""
    return write(Path(tempfile.mkdtemp(prefix="acme-toy-")))


def write(folder: Path) -> Path:
    """Write config, tokenizer and weights."""
    import torch
    from safetensors.torch import save_file

    words = len(VOCABULARY)
    embeddings = torch.zeros(words, HIDDEN)
    embeddings[:, ONE] = 1
    head = torch.zeros(words, HIDDEN)
    picture = torch.zeros(HIDDEN, 3)
    values = torch.zeros(HIDDEN, HIDDEN)
    output = torch.zeros(HIDDEN, HIDDEN)
    for i, word in enumerate(("red", "green", "blue")):
        picture[COLOUR + i, i] = 1
        values[i, COLOUR + i] = 1
        output[AVERAGE + i, i] = 100
        head[VOCABULARY.index(word), AVERAGE + i] = 1
        embeddings[VOCABULARY.index(word), ANSWERED] = 10000
    head[VOCABULARY.index("<eos>"), ANSWERED] = 1
    layer = "model.layers.0"
    tensors = {
        "picture.weight": picture,
        "lm_head.weight": head,
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": torch.ones(HIDDEN),
        f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
        f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
        f"{layer}.self_attn.q_proj.weight": torch.zeros(HIDDEN, HIDDEN),
        f"{layer}.self_attn.k_proj.weight": torch.zeros(HIDDEN, HIDDEN),
        f"{layer}.self_attn.v_proj.weight": values,
        f"{layer}.self_attn.o_proj.weight": output,
        f"{layer}.mlp.gate_proj.weight": torch.zeros(HIDDEN, HIDDEN),
        f"{layer}.mlp.up_proj.weight": torch.zeros(HIDDEN, HIDDEN),
        f"{layer}.mlp.down_proj.weight": torch.zeros(HIDDEN, HIDDEN),
    }
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "acme_toy",
        "vocab_size": words,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": HIDDEN // HEAD_SIZE,
        "max_position_embeddings": 256,
        "torch_dtype": "float32",
        "eos_token_id": VOCABULARY.index("<eos>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def _tokenizer() -> dict[str, object]:
    """One token for a word."""
    special = [
        {
            "id": VOCABULARY.index(token),
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in ("<unk>", "<eos>", "<image>")
    ]
    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    return {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }

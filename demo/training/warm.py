"""Starts a network from what another family's demonstration model has learned.

The language models are alike but for Qwen2's biases, so all of it is taken over, token by token of the
vocabulary. Towers differ in how they know where a patch is; patches, attention and MLPs are taken over.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from network import Network
from tokenizers import Tokenizer
from torch import Tensor


def plain_form(token: str) -> tuple[str, bool]:
    """A token without its tokenizer's mark of a space, and whether it had one."""
    for mark in ("▁", "Ġ"):
        if token.startswith(mark):
            return token[len(mark) :], True
    return {"Ċ": "<0x0A>"}.get(token, token), False


ALIKE = {"</s>": "<|im_end|>", "<|end|>": "<|im_end|>", "<|user|>": "user", "<|assistant|>": "assistant"}


def word_rows(old: Tokenizer, new: Tokenizer, rows: Tensor, start: Tensor) -> Tensor:
    """Embeddings of the new vocabulary: a word's own, or the mean of its forms with and without a space."""
    by_form: dict[str, list[int]] = {}
    for token, i in old.get_vocab().items():
        by_form.setdefault(plain_form(token)[0], []).append(i)
    result = start.clone()
    same_kind = "Ġ" in "".join(new.get_vocab())
    for token, i in new.get_vocab().items():
        exact = old.token_to_id(ALIKE.get(token, token))
        if exact is not None and (same_kind or not token.isalpha()):
            result[i] = rows[exact]
        elif found := by_form.get(plain_form(token)[0]):
            result[i] = rows[found].mean(0) * (1.2 if len(found) > 1 else 1.0)
    return result


def tower_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Qwen2-VL's tower under the names of CLIP's and SigLIP's."""
    taken: dict[str, Tensor] = {}
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp": "mlp", "attn.proj": "self_attn.out_proj"}
    for name, p in state.items():
        if name == "visual.patch_embed.proj.weight":
            taken["embeddings.patch_embedding.weight"] = p.sum(2)
        elif name.startswith("visual.blocks."):
            _, _, layer, rest = name.split(".", 3)
            into = f"encoder.layers.{layer}."
            if rest.startswith("attn.qkv."):
                for part, piece in zip("qkv", p.chunk(3)):
                    taken[f"{into}self_attn.{part}_proj.{rest.removeprefix('attn.qkv.')}"] = piece
            else:
                for old, new in names.items():
                    if rest.startswith(f"{old}."):
                        taken[into + new + rest.removeprefix(old)] = p
    return taken


@torch.no_grad()
def warm_start(network: Network, words: Tokenizer, state: Mapping[str, Tensor], old: Tokenizer) -> list[str]:
    """Takes over what fits of a training state or a Qwen2-VL checkpoint; returns the names of the rest."""
    own = network.state_dict()
    given = {name.replace("model.", "text.", 1): p for name, p in state.items()}
    embeddings = "text.embed_tokens.weight"
    given[embeddings] = word_rows(old, words, given[embeddings], own[embeddings])
    given |= {f"tower.{name}": p for name, p in tower_state(state).items()}
    positions = "tower.embeddings.position_embedding.weight"
    if positions in given:
        given[positions] = given[positions][-len(own[positions]) :]  # without the class token's
    fitting = {name: p for name, p in given.items() if name in own and own[name].shape == p.shape}
    network.load_state_dict(fitting, strict=False)
    return sorted(own.keys() - fitting.keys())

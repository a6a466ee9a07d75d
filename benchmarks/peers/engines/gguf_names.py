"""How llama.cpp names the files and the tensors of a Qwen2-VL model."""

from __future__ import annotations

TEXT = "model.gguf"
VISION = "mmproj.gguf"

_TEXT = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_BLOCK = {
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "norm1": "ln1",
    "norm2": "ln2",
}
_MERGER = {"ln_q": "v.post_ln", "mlp.0": "mm.0", "mlp.2": "mm.2"}


def gguf_names(name: str) -> list[str]:
    """Names of the tensors that a tensor of the checkpoint becomes; several where it is split.

    Raises:
        KeyError: Qwen2-VL has no such tensor.
    """
    if name == "model.embed_tokens.weight":
        return ["token_embd.weight"]
    if name == "model.norm.weight":
        return ["output_norm.weight"]
    if name == "visual.patch_embed.proj.weight":
        return ["v.patch_embd.weight", "v.patch_embd.weight.1"]
    if name.startswith("visual.merger."):
        part, _, kind = name.removeprefix("visual.merger.").rpartition(".")
        return [f"{_MERGER[part]}.{kind}"]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    if not name.startswith("visual."):
        return [f"blk.{layer}.{_TEXT[part]}.{kind}"]
    if part == "attn.qkv":
        return [f"v.blk.{layer}.attn_{letter}.{kind}" for letter in "qkv"]
    return [f"v.blk.{layer}.{_BLOCK[part]}.{kind}"]

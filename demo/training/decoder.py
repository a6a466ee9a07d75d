"""The language model of every demonstration model: a small Llama, or Qwen2 with its biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextSettings:
    """The shape of the language model."""

    vocabulary: int
    bias: bool
    """Whether queries, keys and values have biases, as Qwen2's do."""
    mrope_section: tuple[int, int, int] | None = None
    rope_scale: float = 1.0
    """What the sines and cosines are multiplied by."""
    hidden: int = 128
    inner: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    rope_theta: float = 100.0
    """The hub's models have ten thousand to a million. Small pictures would all look alike then."""
    eps: float = 1e-6


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Attention(nn.Module):
    def __init__(self, s: TextSettings) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = s.heads, s.kv_heads, s.hidden // s.heads
        self.q_proj = nn.Linear(s.hidden, s.hidden, bias=s.bias)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * self.head_dim, bias=s.bias)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * self.head_dim, bias=s.bias)
        self.o_proj = nn.Linear(s.hidden, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, s: TextSettings) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.down_proj = nn.Linear(s.inner, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: TextSettings) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.mlp = MLP(s)
        self.input_layernorm = nn.RMSNorm(s.hidden, eps=s.eps)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden, eps=s.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Text(nn.Module):
    """Token embeddings, layers and last norm; the output matrix is that of the embeddings."""

    def __init__(self, s: TextSettings) -> None:
        super().__init__()
        self.scale = s.rope_scale
        self.embed_tokens = nn.Embedding(s.vocabulary, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=s.eps)
        half = s.hidden // s.heads // 2
        inverse = s.rope_theta ** (-torch.arange(half) / half)
        sections = s.mrope_section or (half, 0, 0)
        axis = torch.tensor([a for a, n in enumerate(sections) for _ in range(n)])
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("axis", axis, persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The last states, and those after the second layer.

        `positions` is (3, batch, length), `mask` a bias on the attention, (batch, 1, length, length).
        """
        angles = positions[self.axis].permute(1, 2, 0) * self.inverse
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask)
            if i == 1:
                early = x
        return self.norm(x), early

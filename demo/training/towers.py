"""CLIP and SigLIP towers, small, for pictures of one size at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH = 14


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (..., 3) to what towers expect."""
    return (pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(std)


def patches_of(pixels: Tensor) -> Tensor:
    """(batch, height, width, 3) to (batch, patches, 3 * PATCH**2) in row-major order, channels first."""
    batch, height, width, _ = pixels.shape
    x = pixels.view(batch, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, 3 * PATCH**2)


class TowerAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TowerMLP(nn.Module):
    def __init__(self, dim: int, inner: int, quick: bool) -> None:
        super().__init__()
        self.quick = quick
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x, approximate="tanh")
        return self.fc2(x)


class TowerLayer(nn.Module):
    def __init__(self, dim: int, heads: int, quick: bool, eps: float) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.self_attn = TowerAttention(dim, heads)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = TowerMLP(dim, 4 * dim, quick)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Patches and their learned positions; CLIP has a class token in front of them."""

    def __init__(self, dim: int, positions: int, clip: bool) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, dim, PATCH, PATCH, bias=not clip)
        self.position_embedding = nn.Embedding(positions + clip, dim)
        if clip:
            self.class_embedding = nn.Parameter(torch.randn(dim) * 0.02)

    def start(self) -> None:
        """Positions begin as sines and cosines of row and column, so that neighbours are alike."""
        table = self.position_embedding.weight
        side = math.isqrt(len(table))
        quarter = table.shape[1] // 4
        angles = torch.arange(side)[:, None] * 2.0 ** -torch.linspace(0, 5, quarter)
        line = torch.cat((angles.sin(), angles.cos()), dim=1)
        rows, columns = line.repeat_interleave(side, 0), line.repeat(side, 1)
        with torch.no_grad():
            table[-(side**2) :] = torch.cat((rows, columns), dim=1)

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        x = patches_of(pixels) @ self.patch_embedding.weight.flatten(1).t()
        if self.patch_embedding.bias is not None:
            return x + self.patch_embedding.bias + self.position_embedding.weight[positions]
        x = x + self.position_embedding.weight[positions + 1]
        first = self.class_embedding + self.position_embedding.weight[0]
        return torch.cat((first.expand(len(x), 1, -1), x), dim=1)


class Encoder(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int, quick: bool, eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(dim, heads, quick, eps) for _ in range(layers))


class Tower(nn.Module):
    """CLIP, or SigLIP. CLIP's last layer and last norm are there, as in the hub's files, and not read."""

    DIM, HEADS, LAYERS = 128, 4, 4

    def __init__(self, positions: int, clip: bool) -> None:
        super().__init__()
        self.clip = clip
        eps = 1e-5 if clip else 1e-6
        self.embeddings = Embeddings(self.DIM, positions, clip)
        if clip:
            self.pre_layrnorm = nn.LayerNorm(self.DIM, eps=eps)  # sic
        self.encoder = Encoder(self.DIM, self.HEADS, self.LAYERS + clip, clip, eps)
        self.post_layernorm = nn.LayerNorm(self.DIM, eps=eps)

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """Normalised (batch, height, width, 3) to (batch, patches, DIM)."""
        x = self.embeddings(pixels, positions)
        if self.clip:
            x = self.pre_layrnorm(x)
        for layer in self.encoder.layers[: self.LAYERS]:
            x = layer(x)
        return x[:, 1:] if self.clip else self.post_layernorm(x)

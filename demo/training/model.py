"""A compact Qwen2-VL for training on a processor without a graphics card.

Parameters carry the hub's names, so a state dict is a checkpoint. Compared with a general implementation it
takes whole batches of pictures of one size, which needs no masks in the vision tower, folds the doubled frame
of a still picture into the patch embedding, and computes logits only where there is something to learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, MERGE, TEMPORAL = 14, 2, 2
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Settings:
    """The shape of the network."""

    vocabulary: int
    hidden: int = 128
    inner: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    rope_theta: float = 100.0
    # The hub has a million, and sections as 2:3:3. With so few frequencies the columns of a picture,
    # which have the slowest ones, would all look alike.
    mrope_section: tuple[int, int, int] = (2, 4, 10)
    vision_hidden: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_ratio: int = 4


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (TEMPORAL, PATCH, PATCH), (TEMPORAL, PATCH, PATCH), bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (batch, frames, height, width, 3) to (batch, steps, patches, dim).

        The four patches that will be merged lie beside each other.
        """
        batch, frames, height, width, _ = pixels.shape
        mean, std = pixels.new_tensor(MEAN, dtype=torch.float32), pixels.new_tensor(STD, dtype=torch.float32)
        x = (pixels.float() / 255 - mean) / std
        depth = 1 if frames == 1 else TEMPORAL
        gh, gw = height // (PATCH * MERGE), width // (PATCH * MERGE)
        x = x.view(batch, frames // depth, depth, gh, MERGE, PATCH, gw, MERGE, PATCH, 3)
        x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(batch, frames // depth, gh * gw * MERGE**2, -1)
        weight = self.proj.weight if depth == TEMPORAL else self.proj.weight.sum(2)
        return x @ weight.flatten(1).t()


class VisionAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))


class VisionMLP(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionBlock(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(s.vision_hidden, eps=1e-6)
        self.norm2 = nn.LayerNorm(s.vision_hidden, eps=1e-6)
        self.attn = VisionAttention(s.vision_hidden, s.vision_heads)
        self.mlp = VisionMLP(s.vision_hidden, s.vision_hidden * s.vision_ratio)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        wide = s.vision_hidden * MERGE**2
        self.ln_q = nn.LayerNorm(s.vision_hidden, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, s.hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_q(x)
        return self.mlp(x.view(x.shape[0], x.shape[1] // MERGE**2, -1))


class Vision(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.head_dim = s.vision_hidden // s.vision_heads
        self.patch_embed = PatchEmbed(s.vision_hidden)
        self.blocks = nn.ModuleList(VisionBlock(s) for _ in range(s.vision_layers))
        self.merger = Merger(s)
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _rope(self, gh: int, gw: int) -> tuple[Tensor, Tensor]:
        if (gh, gw) not in self._tables:
            rows = torch.arange(gh * MERGE).view(gh, 1, MERGE, 1).expand(gh, gw, MERGE, MERGE).flatten()
            columns = torch.arange(gw * MERGE).view(1, gw, 1, MERGE).expand(gh, gw, MERGE, MERGE).flatten()
            half = self.head_dim // 2
            inverse = 10000.0 ** (-torch.arange(0, half, 2) / half)
            angles = torch.cat((rows[:, None] * inverse, columns[:, None] * inverse), dim=1)
            angles = torch.cat((angles, angles), dim=1)
            self._tables[gh, gw] = angles.cos(), angles.sin()
        return self._tables[gh, gw]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The features for the language model, and those of the single patches before they are merged."""
        batch, _, height, width, _ = pixels.shape
        cos, sin = self._rope(height // (PATCH * MERGE), width // (PATCH * MERGE))
        x = self.patch_embed(pixels)
        steps = x.shape[1]
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, cos, sin)
        merged = self.merger(x)
        return merged.view(batch, steps * merged.shape[1], -1), self.merger.ln_q(x)


class Attention(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = s.heads, s.kv_heads, s.hidden // s.heads
        self.q_proj = nn.Linear(s.hidden, s.hidden)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * self.head_dim)
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
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.down_proj = nn.Linear(s.inner, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.mlp = MLP(s)
        self.input_layernorm = nn.RMSNorm(s.hidden, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden, eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Text(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocabulary, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=1e-6)
        half = s.hidden // s.heads // 2
        inverse = s.rope_theta ** (-torch.arange(half) / half)
        axis = torch.tensor([a for a, n in enumerate(s.mrope_section) for _ in range(n)])
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("axis", axis, persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The last states, and those after the second layer.

        `positions` is (3, batch, length), `mask` a bias on the attention, (batch, 1, length, length).
        """
        angles = positions[self.axis].permute(1, 2, 0) * self.inverse
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask)
            if i == 1:
                early = x
        return self.norm(x), early


@dataclass
class Batch:
    """Conversations about pictures of the same sizes.

    Questions about one scene share its picture: they are branches of a tree that grows from a common trunk
    (branch 0). A token sees the trunk and its own branch, never a sister branch.
    """

    pixels: list[Tensor]
    """One per picture or video of a conversation: uint8 (batch, frames, height, width, 3)."""
    places: list[Tensor]
    """Where the features of each go: (batch, tokens)."""
    ids: Tensor
    positions: Tensor
    branches: Tensor
    targets: Tensor
    """What a token predicts, -100 for nothing."""
    weights: Tensor
    kinds: list[list[str]]
    """The kind of every branch, from branch 1 on."""
    name: str = ""
    hints: list[Tensor] = field(default_factory=list)
    """For each of `pixels` what lies on every patch: (batch, steps, patches, 3)."""


def attention_bias(branches: Tensor) -> Tensor:
    length = branches.shape[1]
    own = branches[:, :, None] == branches[:, None, :]
    trunk = (branches == 0)[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(own.shape).masked_fill_(~((own | trunk) & causal), -math.inf)[:, None]


class HintHeads(nn.Module):
    """Read what training knows about every patch off the features; left behind when training is done.

    An answer says little about a picture. Asking every patch what is on it teaches the vision tower shapes,
    colours and motion within minutes. Asking the language model's cells for their row and column gives it a
    sense of place. And asking them for the words of what they show, through the embeddings that the questions
    are made of, lets a question find the cell that it is about.
    """

    SIZES = (17, 9, 6)
    SIDE = 8

    def __init__(self, s: Settings, words: Sequence[Tensor], nothing: int) -> None:
        """`words`: for each sort of hint the (size, vocabulary) table of its words; `nothing`: a token."""
        super().__init__()
        self.words, self.nothing = words, nothing
        self.patch = nn.Linear(s.vision_hidden, sum(self.SIZES))
        self.cell = nn.Linear(s.hidden, 2 * self.SIDE)
        self.loss = torch.zeros(())

    def _naming_loss(self, cells: Sequence[Tensor], hints: Tensor, embeddings: Tensor) -> Tensor:
        """How far the cells are from saying what they show."""
        said = sum(table[hints[..., i]] for i, table in enumerate(self.words))
        wanted = said.view(-1, MERGE**2, said.shape[-1]).sum(1)
        empty = wanted.sum(1) == 0
        wanted[empty, self.nothing] = 1.0
        wanted /= wanted.sum(1, keepdim=True)
        share = torch.where(empty, 0.1, 1.0)
        loss = torch.zeros(())
        for cell in cells:
            logits = F.rms_norm(cell, cell.shape[-1:]).flatten(0, -2) @ embeddings.t()
            loss = loss - ((wanted * logits.log_softmax(-1)).sum(1) * share).sum() / share.sum()
        return loss

    def forward(
        self, patches: list[Tensor], cells: list[tuple[Tensor, Tensor]], batch: Batch, embeddings: Tensor
    ) -> None:
        losses = [torch.zeros(())]
        for single, (merged, cell), places, hints in zip(
            patches, cells, batch.places, batch.hints, strict=True
        ):
            losses.append(self._naming_loss((merged, cell), hints, embeddings))
            truth = hints.reshape(-1, 3)
            guesses = self.patch(single.reshape(len(truth), -1)).split(self.SIZES, dim=1)
            for i, guess in enumerate(guesses):
                share = torch.full((guess.shape[1],), 1.0)
                share[0] = 0.1  # nearly every patch is empty
                losses.append(F.cross_entropy(guess, truth[:, i], share))
            rows = torch.arange(len(places))[:, None]
            corner = batch.positions[1:, rows, places]
            where = (corner - corner[:, :, :1]).long()
            down, across = self.cell(cell).split(self.SIDE, dim=-1)
            losses.append(F.cross_entropy(down.flatten(0, 1), where[0].flatten()))
            losses.append(F.cross_entropy(across.flatten(0, 1), where[1].flatten()))
        self.loss = torch.stack(losses).sum() / max(1, len(patches))


class TinyQwen2VL(nn.Module):
    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.visual = Vision(s)
        self.model = Text(s)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "embed" in name:
                nn.init.normal_(p, std=0.1 if "tokens" in name else 0.02)
            elif p.ndim == 2:
                depth = 2 * (s.vision_layers if name.startswith("visual") else s.layers)
                last = name.endswith(("o_proj.weight", "attn.proj.weight", "fc2.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.7 / math.sqrt(p.shape[1]) / (math.sqrt(depth) if last else 1))

    def forward(self, batch: Batch, hinted: HintHeads | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, targets and weights at the tokens that predict something.

        With `hinted`, the loss of the hints is left there as `hinted.loss`.
        """
        x = self.model.embed_tokens(batch.ids)
        rows = torch.arange(len(x))[:, None]
        patches, merged = [], []
        for pixels, places in zip(batch.pixels, batch.places, strict=True):
            features, single = self.visual(pixels)
            x = x.index_put((rows, places), features)
            patches.append(single)
            merged.append(features)
        x, early = self.model(x, batch.positions, attention_bias(batch.branches))
        if hinted is not None:
            cells = [(m, early[rows, places]) for m, places in zip(merged, batch.places, strict=True)]
            hinted(patches, cells, batch, self.model.embed_tokens.weight)
        chosen = batch.targets >= 0
        return x[chosen] @ self.model.embed_tokens.weight.t(), batch.targets[chosen], batch.weights[chosen]

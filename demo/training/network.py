"""What the networks of all families have in common: pictures become features among the words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from batch import Batch, attention_bias
from decoder import Text, TextSettings
from hints import HintHeads
from torch import Tensor, nn
from towers import Embeddings


@dataclass
class Seen:
    """What a picture became."""

    features: Tensor
    """For the language model: (batch, features, hidden)."""
    patches: Tensor
    """The tower's states, normalised: (batch, patches, width)."""
    cells: Tensor
    """1 where a patch lies in what a feature stands for, else 0: (features, patches)."""
    rows: Tensor
    """The row that each feature stands for, -100 for a separator: (features,)."""
    columns: Tensor


class Network(nn.Module):
    """A language model, and a tower that each family brings."""

    def __init__(self, text: TextSettings) -> None:
        super().__init__()
        self.text = Text(text)

    def see(self, pixels: Tensor, shape: Any) -> Seen:
        """One view of every conversation's picture: uint8 (batch, frames, height, width, 3)."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Layers that are worth compiling."""
        raise NotImplementedError

    def start(self) -> None:
        """Random weights; layers that add to what they are given start small."""
        depths = {"text": len(self.text.layers)}
        last = ("o_proj.weight", "out_proj.weight", "attn.proj.weight", "fc2.weight", "down_proj.weight")
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "embed" in name or name.endswith(("sub_GN", "glb_GN")):
                nn.init.normal_(p, std=0.1 if "tokens" in name else 0.02)
            elif p.ndim == 2:
                depth = 2 * depths.get(name.split(".")[0], 4)
                small = math.sqrt(depth) if name.endswith(last) else 1
                nn.init.normal_(p, std=0.7 / math.sqrt(p.shape[1]) / small)
        for module in self.modules():
            if isinstance(module, Embeddings):
                module.start()

    def forward(self, batch: Batch, hinted: HintHeads | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, targets and weights at the tokens that predict something.

        With `hinted`, the loss of the hints is left there as `hinted.loss`.
        """
        words = self.text.embed_tokens
        x = words(batch.ids)
        rows = torch.arange(len(x))[:, None, None]
        views = [self.see(pixels, shape) for pixels, shape in zip(batch.pixels, batch.shapes, strict=True)]
        for seen, places in zip(views, batch.places, strict=True):
            x = x.index_put((rows, places), seen.features[:, None].expand(-1, places.shape[1], -1, -1))
        x, early = self.text(x, batch.positions, attention_bias(batch.branches))
        if hinted is not None:
            states = [early[rows[:, 0], places[:, -1]] for places in batch.places]
            hinted(views, states, batch.hints, words.weight)
        chosen = batch.targets >= 0
        return x[chosen] @ words.weight.t(), batch.targets[chosen], batch.weights[chosen]

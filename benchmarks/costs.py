"""What the work costs in floating-point operations and bytes, counted from config.json.

Only what must be done is counted: matrix products (2 operations per multiply-add) and attention; norms,
activations, rotary embeddings, softmax and the sampler are left out. The last layer's rows count in full;
the output head counts once per sequence, since only the last position's logits are needed.

Notation: H hidden, N and K query and key/value heads, D head size, I feed-forward width, L layers,
V vocabulary, W vision width, P patches of a picture, T tokens of a prompt (the picture's P/4 included).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """A matrix product (rows, depth) x (depth, columns), ``count`` times."""

    name: str
    rows: int
    depth: int
    columns: int
    count: int

    @property
    def flops(self) -> int:
        """Of all ``count`` products."""
        return 2 * self.rows * self.depth * self.columns * self.count


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Q K^T and P V over ``pairs`` visible (query, key) pairs of width ``width`` = N * D, ``count`` times."""

    name: str
    pairs: int
    width: int
    count: int

    @property
    def flops(self) -> int:
        """Two products of ``2 * pairs * width`` operations each."""
        return 4 * self.pairs * self.width * self.count


@dataclass(frozen=True)
class Costs:
    """Counts of one model. ``config`` is a Qwen2-VL config.json with tied embeddings."""

    config: Mapping[str, Any]

    @property
    def head_size(self) -> int:
        """D."""
        return int(self.config["hidden_size"] // self.config["num_attention_heads"])

    def vision(self, patches: int) -> list[Gemm | Attention]:
        """One picture through the vision tower, P patches in, P/4 embeddings out.

        2P(3 * 2 * 14 * 14)W for the patches, per block 2P(3W² + W² + 2 * mlp_ratio * W²) and 4P²W (every
        patch sees every patch), 2(P/4)((4W)² + 4W * H) for the merger.
        """
        vision = self.config["vision_config"]
        width, depth = vision["embed_dim"], vision["depth"]
        wide, merge = width * vision["mlp_ratio"], vision["spatial_merge_size"] ** 2
        pixels = vision["in_chans"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        return [
            Gemm(name="patch embedding", rows=patches, depth=pixels, columns=width, count=1),
            Gemm(name="vision qkv", rows=patches, depth=width, columns=3 * width, count=depth),
            Attention(name="vision attention", pairs=patches**2, width=width, count=depth),
            Gemm(name="vision proj", rows=patches, depth=width, columns=width, count=depth),
            Gemm(name="vision fc1", rows=patches, depth=width, columns=wide, count=depth),
            Gemm(name="vision fc2", rows=patches, depth=wide, columns=width, count=depth),
            Gemm(name="merger 0", rows=patches // merge, depth=width * merge, columns=width * merge, count=1),
            Gemm(name="merger 2", rows=patches // merge, depth=width * merge, columns=self._hidden, count=1),
        ]

    def text(self, tokens: int, pairs: int, sequences: int) -> list[Gemm | Attention]:
        """``tokens`` rows through the decoder, ``pairs`` visible (query, key) pairs, ``sequences`` logits.

        Per layer 2T(H(N + 2K)D + NDH + 3HI) and 4 * pairs * ND; 2VH per sequence.
        """
        hidden, inter, layers = self._hidden, self.config["intermediate_size"], self._layers
        queries, keys = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        width = queries * self.head_size
        return [
            Gemm(
                name="qkv", rows=tokens, depth=hidden, columns=width + 2 * keys * self.head_size, count=layers
            ),
            Attention(name="attention", pairs=pairs, width=width, count=layers),
            Gemm(name="o", rows=tokens, depth=width, columns=hidden, count=layers),
            Gemm(name="gate and up", rows=tokens, depth=hidden, columns=2 * inter, count=layers),
            Gemm(name="down", rows=tokens, depth=inter, columns=hidden, count=layers),
            Gemm(name="head", rows=sequences, depth=hidden, columns=self.config["vocab_size"], count=1),
        ]

    def prefill(self, tokens: int, patches: int) -> list[Gemm | Attention]:
        """One prompt of ``tokens`` with one picture of ``patches``: T(T + 1) / 2 visible pairs."""
        return self.vision(patches) + self.text(tokens, tokens * (tokens + 1) // 2, 1)

    def decode(self, contexts: list[int]) -> list[Gemm | Attention]:
        """One token for each sequence; each sees its context, the new token included."""
        return self.text(len(contexts), sum(contexts), len(contexts))

    def decode_bytes(self, contexts: list[int], element_bytes: int) -> int:
        """Bytes one decode step must read: every decoder weight once, and each sequence's keys and values.

        Weights per layer: H(N + 2K)D + (N + 2K)D (biases) + NDH + 3HI + 2H (norms); H for the last norm;
        VH for the head (the tied embedding). Keys and values: 2LKD per context token.
        """
        hidden, inter, layers = self._hidden, self.config["intermediate_size"], self._layers
        queries, keys = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        qkv = (queries + 2 * keys) * self.head_size
        layer = hidden * qkv + qkv + queries * self.head_size * hidden + 3 * hidden * inter + 2 * hidden
        weights = layers * layer + hidden + self.config["vocab_size"] * hidden
        cache = 2 * layers * keys * self.head_size * sum(contexts)
        return int((weights + cache) * element_bytes)

    @property
    def _hidden(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def _layers(self) -> int:
        return int(self.config["num_hidden_layers"])


def total_flops(work: list[Gemm | Attention]) -> int:
    """Sum over a list of products."""
    return sum(item.flops for item in work)

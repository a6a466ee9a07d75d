"""The vision transformer, as CLIP, SigLIP and timm store it, over images of one size or of many."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opsin.api import Activation, BuildContext, KernelQuery
from opsin.layers.linear import Linear, activation, dtype_name
from opsin.layers.module import Layer, Module, Slot, owned
from opsin.layers.norm import LayerNorm, RMSNorm
from opsin.layers.text import fields

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines."""

TIMM_RENAMES: Mapping[str, str] = {
    r"\.patch_embed\.proj\.": ".patch_embed.",
    r"\.blocks\.": ".encoder.layers.",
    r"\.attn\.qkv\.": ".self_attn.qkv_proj.",
    r"\.attn\.proj\.": ".self_attn.out_proj.",
    r"\.norm([12])\.": r".layer_norm\1.",
}
"""``renames`` of a `LanguageModel` whose `VisionEncoder` is stored under timm's names."""


_SIGLIP_FIELDS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
"""Defaults of transformers' SiglipVisionConfig (5.23)."""

_CLIP_FIELDS: Mapping[str, Any] = {
    **_SIGLIP_FIELDS,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""Defaults of transformers' CLIPVisionConfig (5.23)."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A CLIP- or SigLIP-like tower.

    Attributes:
        num_positions: rows of the position table, class token included.
        class_token: whether a learned token stands in front (CLIP).
        pre_norm: whether the embeddings are normalised before the first layer (CLIP; key ``pre_layrnorm``).
        patch_bias: whether the patch embedding has a bias (SigLIP).
        fused: whether the checkpoint stores q, k and v as one tensor (timm).
        rotary: whether q and k are rotated, by the cosines and sines that the encoder is called with.
        norm: of its layers.
        gated: whether its MLPs are gated, with biases (keys ``gate_proj``, ``up_proj``, ``down_proj``).
        full_layers: numbers of the layers, from 0, that attend within an image, where the others attend
            within windows, whose lengths the encoder is called with; None: all attend within an image.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    num_positions: int
    eps: float
    activation: Activation
    num_channels: int = 3
    class_token: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    fused: bool = False
    rotary: bool = False
    norm: Literal["layer", "rms"] = "layer"
    gated: bool = False
    full_layers: tuple[int, ...] | None = None
    qkv_bias: bool = True
    qk_norm_eps: float | None = None
    layer_scale: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> VisionConfig:
        """From a ``vision_config``; ``model_type`` says whether it is CLIP's.

        Raises:
            ValueError: a field cannot be used; the message names it.
        """
        clip = "clip" in config.get("model_type", "") and "siglip" not in config.get("model_type", "")
        given = fields({"vision_config": config}, _CLIP_FIELDS if clip else _SIGLIP_FIELDS, "vision_config")
        size, patch = given["image_size"], given["patch_size"]
        if not 0 < patch <= size:
            raise ValueError(f"vision_config.patch_size is {patch}, image_size {size}; expected a part of it")
        found = {
            "hidden_size": given["hidden_size"],
            "intermediate_size": given["intermediate_size"],
            "num_layers": given["num_hidden_layers"],
            "num_heads": given["num_attention_heads"],
            "patch_size": patch,
            "num_positions": (size // patch) ** 2 + clip,
            "eps": given["layer_norm_eps"],
            "activation": activation(given["hidden_act"], "vision_config.hidden_act"),
            "num_channels": given["num_channels"],
            "class_token": clip,
            "pre_norm": clip,
            "patch_bias": not clip,
        }
        return cls(**{**found, **changes})


class Table(Layer):
    """One learned tensor, stored under ``name`` among the parent's keys."""

    def __init__(self, context: BuildContext, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._name, self._shape = name, shape
        self._dtype, self._device = context.dtype, context.device
        self.value: Tensor | None = None

    def slots(self) -> Iterator[Slot]:
        """The tensor."""
        yield Slot(self._name, self._shape, self._put, beside=True)

    def _put(self, tensor: Tensor) -> None:
        self.value = owned(tensor, self._device, self._dtype)

    def forward(self) -> Tensor:
        """The tensor, in its stored shape."""
        assert self.value is not None, "weights are not loaded"
        return self.value


class VisionEmbeddings(Module):
    """Patches + positions, behind a class token if there is one."""

    def __init__(self, context: BuildContext, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = Linear(
            context,
            config.num_channels * patch**2,
            width,
            bias=config.patch_bias,
            stored_shape=(width, config.num_channels, patch, patch),
            num_sums=config.num_channels,
        )
        self.position = Table(context, "position_embedding.weight", (config.num_positions, width))
        self.first = Table(context, "class_embedding", (width,)) if config.class_token else None

    def forward(self, patches: Tensor, lengths: Sequence[int], positions: Tensor | None) -> Tensor:
        """patches (P, channels * patch**2), ``lengths`` of each image -> (P + images if class token, width).

        ``positions`` int64 (P,), on the host, are rows of the position table for each patch (without the
        class token's row 0, where there is one); None: 0, 1, 2, ... in each image.
        """
        table = self.position()
        x = self.patch_embedding(patches)
        offset = 0 if self.first is None else 1
        if positions is None:
            positions = torch.cat([torch.arange(n) for n in lengths])
        x = x + table.index_select(0, (positions + offset).to(x.device))
        if self.first is None:
            return x
        start = (self.first() + table[0]).unsqueeze(0)
        return torch.cat([part for image in x.split(list(lengths)) for part in (start, image)])


class VisionAttention(Module):
    """Full attention within each image; q, k and v are fused while loading, if they are not stored so."""

    def __init__(self, context: BuildContext, config: VisionConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self._head_size = width // heads
        parts = {"q_proj": width, "k_proj": width, "v_proj": width}
        self.qkv_proj = Linear(context, width, 3 * width if config.fused else parts, bias=config.qkv_bias)
        eps = config.qk_norm_eps
        self.q_norm = None if eps is None else RMSNorm(context, width, eps)
        self.k_norm = None if eps is None else RMSNorm(context, width, eps)
        self.out_proj = Linear(context, width, width, bias=True)
        query = KernelQuery(
            op="dense_attention",
            dtype=dtype_name(context.dtype),
            num_heads=heads,
            num_kv_heads=heads,
            head_size=self._head_size,
        )
        self._attend = context.kernels.dense_attention(query)
        self._rotate = context.kernels.rotary(replace(query, op="rotary")) if config.rotary else None

    def forward(self, x: Tensor, lengths: Sequence[int], rotary: Rotary | None = None) -> Tensor:
        """x (P, width) -> (P, width)."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, -1, self._head_size)).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (
                norm(x.flatten(1).contiguous())[0].view(x.shape)
                for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        if self._rotate is not None:
            assert rotary is not None, "the config says that q and k are rotated"
            q, k = self._rotate(q, k, *rotary)
        attended = self._attend(q, k, v, lengths, None, 1 / math.sqrt(self._head_size))
        return self.out_proj(attended.flatten(1))


class MLP(Module):
    """Two linear layers around an activation, under ``names`` in the checkpoint."""

    def __init__(
        self,
        context: BuildContext,
        width: int,
        hidden: int,
        out: int,
        activation: Activation,
        *,
        bias: bool = True,
        names: tuple[str, str] = ("fc1", "fc2"),
    ) -> None:
        super().__init__()
        self.add_module(names[0], Linear(context, width, hidden, bias=bias, activation=activation))
        self.add_module(names[1], Linear(context, hidden, out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., out)."""
        for linear in self.children():
            x = linear(x)
        return x


class VisionMLP(MLP):
    """An `MLP` whose output is as wide as its input."""

    fc1: Linear
    fc2: Linear

    def __init__(self, context: BuildContext, width: int, hidden: int, activation: Activation) -> None:
        super().__init__(context, width, hidden, width, activation)


class GatedVisionMLP(Module):
    """down(act(gate(x)) * up(x)) with biases; gate and up are fused while loading (Shazeer 2020)."""

    def __init__(self, context: BuildContext, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.gate_up_proj = Linear(context, width, {"gate_proj": hidden, "up_proj": hidden}, bias=True)
        self.down_proj = Linear(context, hidden, width, bias=True)
        self._activation: Activation = activation
        query = KernelQuery(
            op="gated_act", dtype=dtype_name(context.dtype), size=hidden, activation=activation
        )
        self._gated_act = context.kernels.gated_act(query)

    def forward(self, x: Tensor) -> Tensor:
        """x (P, width) -> (P, width)."""
        return self.down_proj(self._gated_act(self.gate_up_proj(x), self._activation))


def vision_norm(
    context: BuildContext, size: int, eps: float, kind: Literal["layer", "rms"]
) -> LayerNorm | RMSNorm:
    """A norm of either kind, for `normed`."""
    return LayerNorm(context, size, eps) if kind == "layer" else RMSNorm(context, size, eps)


def normed(norm: LayerNorm | RMSNorm, x: Tensor) -> Tensor:
    """norm(x), x (P, size)."""
    return norm(x) if isinstance(norm, LayerNorm) else norm(x)[0]


class VisionLayer(Module):
    """Pre-norm transformer block."""

    def __init__(self, context: BuildContext, config: VisionConfig) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        self.layer_norm1 = vision_norm(context, width, config.eps, config.norm)
        self.self_attn = VisionAttention(context, config)
        self.layer_norm2 = vision_norm(context, width, config.eps, config.norm)
        mlp = GatedVisionMLP if config.gated else VisionMLP
        self.mlp: GatedVisionMLP | VisionMLP = mlp(context, width, wide, config.activation)
        self.scale1 = Table(context, "lambda_1", (width,)) if config.layer_scale else None
        self.scale2 = Table(context, "lambda_2", (width,)) if config.layer_scale else None

    def forward(self, x: Tensor, lengths: Sequence[int], rotary: Rotary | None = None) -> Tensor:
        """x (P, width) -> (P, width)."""
        added = self.self_attn(normed(self.layer_norm1, x), lengths, rotary)
        x = x + (added if self.scale1 is None else self.scale1() * added)
        added = self.mlp(normed(self.layer_norm2, x))
        return x + (added if self.scale2 is None else self.scale2() * added)


class VisionEncoder(Module):
    """The stack, under the key ``layers``."""

    def __init__(self, context: BuildContext, config: VisionConfig, read_after: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(context, config) for _ in range(config.num_layers))
        self._read_after = tuple(read_after)
        full = range(config.num_layers) if config.full_layers is None else config.full_layers
        self._windowed = frozenset(range(config.num_layers)) - frozenset(full)

    def forward(
        self,
        x: Tensor,
        lengths: Sequence[int],
        rotary: Rotary | None = None,
        windows: Sequence[int] | None = None,
    ) -> Tensor:
        """x (P, width), rotary (P, D) each -> the states read, side by side, (P, width * len(read_after)).

        ``windows``: lengths of the windows, one after another in x, for a config with ``full_layers``.
        """
        if self._windowed and windows is None:
            raise ValueError(f"layers {sorted(self._windowed)} attend within windows; expected their lengths")
        read = {0: x}
        for number, layer in enumerate(self.layers, 1):
            within = windows if windows is not None and number - 1 in self._windowed else lengths
            x = layer(x, within, rotary)
            if number in self._read_after:
                read[number] = x
        if len(self._read_after) == 1:
            return read[self._read_after[0]]
        return torch.cat([read[number] for number in self._read_after], dim=-1)


class VisionTransformer(Module):
    """Flat patches of any number of images -> hidden states of the layers asked for.

    Args:
        config: the tower, with only the layers that are used: one that is read at its last layer but one
            has one layer less, and the model drops the keys of the rest (``unused`` of `LanguageModel`).
        post_norm: whether ``post_layernorm`` is applied (and stored).
        read_after: after how many layers a state is read (0: the embeddings); several states are put side
            by side, in this order. None: after the last layer.
    """

    def __init__(
        self,
        context: BuildContext,
        config: VisionConfig,
        *,
        post_norm: bool,
        read_after: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        read_after = [config.num_layers] if read_after is None else read_after
        if not read_after or not all(0 <= number <= config.num_layers for number in read_after):
            raise ValueError(f"read_after={list(read_after)}: expected 0 to {config.num_layers} layers")
        if post_norm and len(read_after) > 1:
            raise ValueError("post_layernorm is for one state; several are read")
        self.embeddings = VisionEmbeddings(context, config)
        width = config.hidden_size
        self.pre_layrnorm = LayerNorm(context, width, config.eps) if config.pre_norm else None
        self.encoder = VisionEncoder(context, config, read_after)
        self.post_layernorm = LayerNorm(context, width, config.eps) if post_norm else None
        self._extra = 1 if config.class_token else 0
        self._dtype, self._device = context.dtype, context.device

    def forward(self, patches: Tensor, lengths: Sequence[int], positions: Tensor | None = None) -> Tensor:
        """patches (P, channels * patch**2) in row-major order of each image, ``lengths`` patches of each.

        Returns:
            (P + images if class token, width * states read); an image's class token is its first row.
        """
        patches = patches.to(device=self._device, dtype=self._dtype)
        x = self.embeddings(patches, lengths, positions)
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        x = self.encoder(x, [length + self._extra for length in lengths])
        return x if self.post_layernorm is None else self.post_layernorm(x)


def flatten_patches(pixels: Tensor, patch: int) -> Tensor:
    """(images, channels, height, width) -> (images * rows * columns, channels * patch**2), row-major.

    The column order is that of a convolution's weight (channels, patch, patch).
    """
    images, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    split = pixels[:, :, : rows * patch, : columns * patch].reshape(
        images, channels, rows, patch, columns, patch
    )
    return split.permute(0, 2, 4, 1, 3, 5).reshape(images * rows * columns, -1)

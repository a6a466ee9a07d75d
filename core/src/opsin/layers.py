"""PUBLIC building blocks: models are written with these, on the op table of their device.

A layer declares the checkpoint tensors it takes as `Slot`s and holds nothing until they are put in. A
linear layer hands its finished weight to the device (`prepare_linear`), which may pack it, and keeps only
the callable. Linear layers are column- or row-parallel with a world size that is 1 today: a slot takes
this rank's slice.

Names of modules are the names of the checkpoint's keys; a fused layer names the keys it is fused from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opsin.api import Activation, BuildContext, KernelQuery, KVGeometry, KVLayer, LinearFn

Split = Literal["column", "row"]


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Slot:
    """One checkpoint tensor a layer takes.

    Attributes:
        name: its key, relative to the layer's parent (``"q_proj.weight"``) or to the layer (``"weight"``).
        shape: its full shape in the checkpoint.
        put: takes the tensor (any dtype, host memory); called once.
        beside: the name is relative to the layer's parent.
    """

    name: str
    shape: tuple[int, ...]
    put: Callable[[Tensor], None]
    beside: bool = False


class Layer(nn.Module):
    """A leaf that takes weights."""

    def slots(self) -> Iterator[Slot]:
        """The checkpoint tensors this layer takes."""
        raise AssertionError(f"{type(self).__name__} declares no slots")


class Linear(Layer):
    """act(x @ W.T + b), possibly fused from several checkpoint tensors stacked along the output.

    Args:
        context: build context.
        in_features: width of x.
        out_features: rows of W; or, for a fused layer, checkpoint name -> rows, in stacking order.
        bias: whether there is a bias.
        activation: applied to the result, fused where the device can.
        split: tensor parallelism: ``"column"`` splits the output, ``"row"`` the input (and sums over
            ranks); None: every rank has the whole layer.
        stored_shape: shape of the checkpoint's weight where it is not (out, in), e.g. a convolution
            whose stride equals its kernel.
    """

    def __init__(
        self,
        context: BuildContext,
        in_features: int,
        out_features: int | Mapping[str, int],
        *,
        bias: bool,
        activation: Activation | None = None,
        split: Split | None = None,
        stored_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self._parts = {"": out_features} if isinstance(out_features, int) else dict(out_features)
        self._rank, self._world = context.parallel.rank, context.parallel.world_size
        if split is None:
            self._world = 1
        self._split = split
        self._in, self._stored_shape = in_features, stored_shape
        self._dtype, self._device = context.dtype, context.device
        self._activation, self._has_bias = activation, bias
        out = sum(self._parts.values())
        self.in_features = in_features // (self._world if split == "row" else 1)
        self.out_features = out // (self._world if split == "column" else 1)
        self._prepare = context.kernels.prepare_linear(
            KernelQuery(
                op="prepare_linear",
                dtype=dtype_name(context.dtype),
                in_features=self.in_features,
                out_features=self.out_features,
                activation=activation,
                bias=bias,
            )
        )
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._to_come = len(self._parts) * (2 if bias else 1)
        self._run: LinearFn | None = None

    def slots(self) -> Iterator[Slot]:
        """A weight, and a bias if there is one, for each part."""
        first = 0
        for name, rows in self._parts.items():
            prefix = f"{name}." if name else ""
            shape = self._stored_shape or (rows, self._in)
            yield Slot(f"{prefix}weight", shape, self._putter("_weight", first, rows), beside=bool(name))
            if self._has_bias:
                yield Slot(f"{prefix}bias", (rows,), self._putter("_bias", first, rows), beside=bool(name))
            first += rows

    def _putter(self, target: str, first: int, rows: int) -> Callable[[Tensor], None]:
        def put(tensor: Tensor) -> None:
            flat = tensor.reshape(rows, self._in) if target == "_weight" else tensor
            at, count = first, rows
            if self._split == "column" and self._world > 1:
                at, count = first // self._world, rows // self._world
                flat = flat.narrow(0, self._rank * count, count)
            if self._split == "row" and self._world > 1 and target == "_weight":
                flat = flat.narrow(1, self._rank * self.in_features, self.in_features)
            if len(self._parts) == 1:
                setattr(self, target, flat.to(device=self._device, dtype=self._dtype).contiguous())
            else:
                whole = getattr(self, target)
                if whole is None:
                    shape = (self.out_features, *flat.shape[1:])
                    whole = torch.empty(shape, dtype=self._dtype, device=self._device)
                    setattr(self, target, whole)
                whole.narrow(0, at, count).copy_(flat)
            self._to_come -= 1
            if self._to_come == 0:
                self._finish(keep_weight=False)

        return put

    def adopt(self, weight: Tensor) -> None:
        """Take a finished weight that another layer keeps (a tied output head)."""
        self._weight = weight
        self._finish(keep_weight=True)

    def _finish(self, *, keep_weight: bool) -> None:
        assert self._weight is not None
        bias = self._bias
        if self._split == "row" and self._rank > 0:
            bias = None  # the sum over ranks must hold it once
        self._run = self._prepare(self._weight, bias, self._activation, keep_weight=keep_weight)
        self._weight = self._bias = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        assert self._run is not None, "weights are not loaded"
        y = self._run(x)
        if self._split == "row" and self._world > 1:
            torch.distributed.all_reduce(y)
        return y


class Embedding(Layer):
    """Token embeddings; ``tied`` is an output head that shares the table."""

    def __init__(self, context: BuildContext, rows: int, width: int, *, tied: Linear | None = None) -> None:
        super().__init__()
        self._shape = (rows, width)
        self._dtype, self._device = context.dtype, context.device
        self._tied = [tied] if tied is not None else []  # in a list: not a submodule of this one
        self.weight: Tensor | None = None

    def slots(self) -> Iterator[Slot]:
        """The table (V, H)."""
        yield Slot("weight", self._shape, self._put)

    def _put(self, tensor: Tensor) -> None:
        self.weight = tensor.to(device=self._device, dtype=self._dtype).contiguous()
        for head in self._tied:
            head.adopt(self.weight)

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 (T,) -> (T, H)."""
        assert self.weight is not None, "weights are not loaded"
        return self.weight.index_select(0, token_ids)


class Norm(Layer):
    """What both norms share: a weight, perhaps a bias."""

    def __init__(self, context: BuildContext, size: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self._size, self._eps = size, eps
        self._dtype, self._device = context.dtype, context.device
        self._has_bias = bias
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def slots(self) -> Iterator[Slot]:
        """Weight and bias (size,)."""
        yield Slot("weight", (self._size,), lambda tensor: setattr(self, "weight", self._own(tensor)))
        if self._has_bias:
            yield Slot("bias", (self._size,), lambda tensor: setattr(self, "bias", self._own(tensor)))

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self._device, dtype=self._dtype, copy=True)


class RMSNorm(Norm):
    """Root-mean-square norm with an optional residual added first."""

    def __init__(self, context: BuildContext, size: int, eps: float) -> None:
        super().__init__(context, size, eps, bias=False)
        query = KernelQuery(op="rms_norm", dtype=dtype_name(context.dtype), size=size)
        self._kernel = context.kernels.rms_norm(query)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (T, size) -> (norm(x + residual), x + residual)."""
        assert self.weight is not None, "weights are not loaded"
        return self._kernel(x, self.weight, self._eps, residual)


class LayerNorm(Norm):
    """Layer norm."""

    def __init__(self, context: BuildContext, size: int, eps: float, *, bias: bool = True) -> None:
        super().__init__(context, size, eps, bias=bias)
        query = KernelQuery(op="layer_norm", dtype=dtype_name(context.dtype), size=size, bias=bias)
        self._kernel = context.kernels.layer_norm(query)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> the same shape."""
        assert self.weight is not None, "weights are not loaded"
        return self._kernel(x, self.weight, self.bias, self._eps)


# --------------------------------------------------------------------------------------------------
# Rotary tables
# --------------------------------------------------------------------------------------------------


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """theta ** (-2i / width) for i < width / 2, float32 (Su et al. 2021, eq. 15)."""
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))


class RotaryTable(nn.Module):
    """Cosines and sines of a step's positions, computed once a step and used by every layer.

    Args:
        head_size: D.
        theta: base of the frequencies.
        sections: M-RoPE: how many of the D/2 frequencies follow each axis; None: one axis.
    """

    def __init__(
        self, head_size: int, theta: float, *, sections: Sequence[int] | None = None, device: str = "cpu"
    ) -> None:
        super().__init__()
        self._inverse = inverse_frequencies(head_size, theta).to(device)
        self._axis: Tensor | None = None
        if sections is not None:
            assert sum(sections) == head_size // 2, (sections, head_size)
            axis = torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections))
            self._axis = axis.to(device)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 (A, T) -> cos, sin, float32 (T, D), the halves alike."""
        if self._axis is None:
            angles = positions[0].float().unsqueeze(1) * self._inverse
        else:
            # frequency i turns with its axis' position (Qwen2-VL paper, section 2.1)
            angles = positions.float().index_select(0, self._axis).t() * self._inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


# --------------------------------------------------------------------------------------------------
# The decoder stack
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Llama-like decoder: RMS norm, rotary grouped-query attention, gated MLP.

    Attributes:
        qkv_bias: whether q, k and v have biases (Qwen2).
        fused: whether the checkpoint stores qkv_proj and gate_up_proj already fused (Phi-3).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float
    activation: Activation = "silu"
    qkv_bias: bool = False
    tied: bool = False
    fused: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> DecoderConfig:
        """From the fields every such config.json has."""
        heads = config["num_attention_heads"]
        found = {
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_size": config.get("head_dim") or config["hidden_size"] // heads,
            "eps": config.get("rms_norm_eps", 1e-6),
            "activation": config.get("hidden_act", "silu"),
            "tied": bool(config.get("tie_word_embeddings", False)),
        }
        return cls(**{**found, **changes})


class Attention(nn.Module):
    """Grouped-query attention over the paged cache."""

    def __init__(self, context: BuildContext, config: DecoderConfig) -> None:
        super().__init__()
        world = context.parallel.world_size
        size = config.head_size
        self._sizes = [config.num_heads // world * size] + [config.num_kv_heads // world * size] * 2
        self._head_size, self._scale = size, 1 / math.sqrt(size)
        heads, kv_heads = config.num_heads * size, config.num_kv_heads * size
        parts = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        self.qkv_proj = Linear(
            context,
            config.hidden_size,
            sum(parts.values()) if config.fused else parts,
            bias=config.qkv_bias,
            split="column",
        )
        self.o_proj = Linear(context, heads, config.hidden_size, bias=False, split="row")
        query = KernelQuery(
            op="rotary",
            dtype=dtype_name(context.dtype),
            num_heads=config.num_heads // world,
            num_kv_heads=config.num_kv_heads // world,
            head_size=size,
        )
        self._rotary = context.kernels.rotary(query)
        self._write_kv, self._attend = context.kernels.paged(query)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv: KVLayer, plan: Any) -> Tensor:
        """x (T, H) -> (T, H); writes this step's keys and values."""
        q, k, v = (
            part.unflatten(-1, (-1, self._head_size)) for part in self.qkv_proj(x).split(self._sizes, -1)
        )
        q, k = self._rotary(q, k, cos, sin)
        self._write_kv(k, v, kv, plan)
        attended: Tensor = self.o_proj(self._attend(q, kv, plan, self._scale).flatten(1))
        return attended


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, context: BuildContext, config: DecoderConfig) -> None:
        super().__init__()
        wide = config.intermediate_size
        self.gate_up_proj = Linear(
            context,
            config.hidden_size,
            2 * wide if config.fused else {"gate_proj": wide, "up_proj": wide},
            bias=False,
            split="column",
        )
        self.down_proj = Linear(context, wide, config.hidden_size, bias=False, split="row")
        self._activation: Activation = config.activation
        query = KernelQuery(
            op="gated_act", dtype=dtype_name(context.dtype), size=wide, activation=config.activation
        )
        self._gated_act = context.kernels.gated_act(query)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, H) -> (T, H)."""
        y: Tensor = self.down_proj(self._gated_act(self.gate_up_proj(x), self._activation))
        return y


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, on a residual stream."""

    def __init__(self, context: BuildContext, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(context, config.hidden_size, config.eps)
        self.self_attn = Attention(context, config)
        self.post_attention_layernorm = RMSNorm(context, config.hidden_size, config.eps)
        self.mlp = GatedMLP(context, config)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, kv: KVLayer, plan: Any
    ) -> tuple[Tensor, Tensor]:
        """(branch output, residual stream), both (T, H); the next norm adds them."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, cos, sin, kv, plan)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Embeddings, layers and final norm: the part of a checkpoint below ``model.``."""

    def __init__(
        self, context: BuildContext, config: DecoderConfig, *, rotary: nn.Module, head: Linear
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(
            context, config.vocab_size, config.hidden_size, tied=head if config.tied else None
        )
        self.layers = nn.ModuleList(DecoderLayer(context, config) for _ in range(config.num_layers))
        self.norm = RMSNorm(context, config.hidden_size, config.eps)
        self._rotary_table = [rotary]  # in a list: it takes no weights
        self._dtype = context.dtype

    def forward(self, embeds: Tensor, positions: Tensor, kv: Sequence[KVLayer], plan: Any) -> Tensor:
        """embeds (T, H), positions (A, T) -> hidden states after the final norm (T, H)."""
        cos, sin = self._rotary_table[0](positions)
        x, residual = embeds, None
        for layer, cache in zip(self.layers, kv, strict=True):
            x, residual = layer(x, residual, cos, sin, cache, plan)
        hidden: Tensor = self.norm(x, residual)[0]
        return hidden


def kv_geometry(config: DecoderConfig, world_size: int) -> KVGeometry:
    """Shape of a decoder's KV cache on one rank."""
    return KVGeometry(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads // world_size,
        head_size=config.head_size,
    )


def output_head(context: BuildContext, config: DecoderConfig) -> Linear:
    """hidden -> vocabulary; every rank has it whole."""
    return Linear(context, config.hidden_size, config.vocab_size, bias=False)

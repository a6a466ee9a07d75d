"""The op table, and the reference implementation of every op in plain torch.

The references are slow and obvious on purpose: they define what an op means, serve devices that have no
kernel of their own, and judge those that do (`opsin.testing.kernels`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin import api
from opsin.errors import ConfigError, PluginError

logger = logging.getLogger(__name__)

ACTIVATIONS: Mapping[api.Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


# ---- References ----------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Reference of `opsin.api.RMSNorm`."""
    h = x if residual is None else x + residual
    wide = h.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(h.dtype) * weight, h


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Reference of `opsin.api.LayerNorm`."""
    wide_bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), wide_bias, eps).to(x.dtype)


def gated_act(x: Tensor, activation: api.Activation) -> Tensor:
    """Reference of `opsin.api.GatedAct`."""
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Reference of `opsin.api.Rotary`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., :width].float(), x[..., width:]
        first, second = turned.chunk(2, dim=-1)
        half = torch.cat((-second, first), dim=-1)
        return torch.cat(((turned * cos + half * sin).to(x.dtype), rest), dim=-1)

    return rotate(q), rotate(k)


@dataclass(frozen=True, kw_only=True)
class ReferencePlan:
    """What the reference attention needs, made once per step.

    Attributes:
        block_ids: per sequence, int64 (blocks,) of the context.
        slots: int64 (T,).
    """

    batch: api.AttentionBatch
    block_ids: Sequence[Tensor]
    slots: Tensor


def plan_attention(batch: api.AttentionBatch) -> ReferencePlan:
    """Reference of `opsin.api.PlanAttention`."""
    to_tensor = partial(torch.tensor, dtype=torch.int64, device=batch.device)
    tables = zip(batch.block_tables, batch.context_lens)
    block_ids = [to_tensor(table[: -(-length // batch.block_size)]) for table, length in tables]
    return ReferencePlan(batch=batch, block_ids=block_ids, slots=to_tensor(batch.slots))


def write_kv(k: Tensor, v: Tensor, layer: api.KVLayer, plan: ReferencePlan) -> None:
    """Reference of `opsin.api.WriteKV`."""
    size = plan.batch.block_size
    layer.k[plan.slots // size, plan.slots % size] = k
    layer.v[plan.slots // size, plan.slots % size] = v


def paged_attention(q: Tensor, layer: api.KVLayer, plan: ReferencePlan, scale: float) -> Tensor:
    """Reference of `opsin.api.PagedAttention`."""
    outputs = []
    chunks = q.split(list(plan.batch.query_lens))
    groups = q.shape[1] // layer.k.shape[2]
    for chunk, length, blocks in zip(chunks, plan.batch.context_lens, plan.block_ids):
        k, v = (
            cache[blocks].flatten(0, 1)[:length].repeat_interleave(groups, dim=1).float()
            for cache in (layer.k, layer.v)
        )
        scores = torch.einsum("qnd,knd->nqk", chunk.float(), k) * scale
        places = torch.arange(length, device=q.device)
        seen = places <= places[length - len(chunk) :].unsqueeze(1)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("nqk,knd->qnd", weights, v))
    return torch.cat(outputs).to(q.dtype)


def in_a_row(rotate: api.Rotary, write: api.WriteKV, attend: api.PagedAttention) -> api.RotaryPagedAttention:
    """`RotaryPagedAttention` of three ops; of their references it is its reference."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer: api.KVLayer,
        plan: Any,
        scale: float,
    ) -> Tensor:
        q, k = rotate(q, k, cos, sin)
        write(k, v, layer, plan)
        return attend(q, layer, plan, scale)

    return attention


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lens: Sequence[int], k_lens: Sequence[int] | None, scale: float
) -> Tensor:
    """Reference of `opsin.api.DenseAttention`."""
    lens = list(k_lens if k_lens is not None else q_lens)
    outputs = []
    for qs, ks, vs in zip(q.split(list(q_lens)), k.split(lens), v.split(lens)):
        weights = (torch.einsum("qnd,knd->nqk", qs.float(), ks.float()) * scale).softmax(-1)
        outputs.append(torch.einsum("nqk,knd->qnd", weights, vs.float()))
    return torch.cat(outputs).to(q.dtype)


def prepare_linear(
    weight: Tensor,
    bias: Tensor | None,
    activation: api.Activation | None,
    *,
    keep_weight: bool,  # noqa: ARG001 (the op's signature)
    few_rows: bool = False,  # noqa: ARG001 (the op's signature)
) -> api.LinearFn:
    """Reference of `opsin.api.PrepareLinear`."""
    act = None if activation is None else ACTIVATIONS[activation]

    def linear(x: Tensor) -> Tensor:
        y = F.linear(x, weight.to(x.dtype), bias)
        return y if act is None else act(y)

    return linear


def prepare_quantized_linear(
    weight: api.QuantizedWeight,
    bias: Tensor | None,
    activation: api.Activation | None,
    *,
    keep_weight: bool,  # noqa: ARG001 (the op's signature)
    few_rows: bool = False,  # noqa: ARG001 (the op's signature)
) -> api.LinearFn:
    """Reference of `opsin.api.PrepareQuantizedLinear`: dequantizes at every call, rounds no activations."""
    act = None if activation is None else ACTIVATIONS[activation]

    def linear(x: Tensor) -> Tensor:
        y = F.linear(x, weight.dequantize(x.dtype), bias)
        return y if act is None else act(y)

    return linear


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Reference of `opsin.api.TopK`."""
    values, ids = x.max(-1, keepdim=True) if k == 1 else x.topk(k, dim=-1)
    return values, ids


def all_reduce(x: Tensor, place: api.Parallel) -> Tensor:
    """Reference of `opsin.api.AllReduce`: torch.distributed's."""
    group = None if place.link is None else place.link.group
    if group is None:
        torch.distributed.all_reduce(x)
    else:
        group.allreduce([x]).wait()
    return x


def all_gather(x: Tensor, widths: Sequence[int], place: api.Parallel) -> Tensor:
    """Reference of `opsin.api.AllGather`: torch.distributed's, of parts of equal widths."""
    group = None if place.link is None else place.link.group
    padded = F.pad(x, (0, max(widths) - widths[place.rank])).contiguous()
    parts = [torch.empty_like(padded) for _ in widths]
    if group is None:
        torch.distributed.all_gather(parts, padded)
    else:
        group.allgather([parts], [padded]).wait()
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)


REFERENCES: Mapping[api.OpName, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "gated_act": gated_act,
    "rotary": rotary,
    "plan_attention": plan_attention,
    "write_kv": write_kv,
    "paged_attention": paged_attention,
    "dense_attention": dense_attention,
    "prepare_linear": prepare_linear,
    "top_k": top_k,
    "prepare_quantized_linear": prepare_quantized_linear,
    "rotary_paged_attention": in_a_row(rotary, write_kv, paged_attention),
    "all_reduce": all_reduce,
    "all_gather": all_gather,
}

_KV_OPS: tuple[api.OpName, ...] = ("plan_attention", "write_kv", "paged_attention")


def allocate_kv(
    device: api.Device, num_blocks: int, block_size: int, geometry: api.KVGeometry, dtype: torch.dtype
) -> Sequence[api.KVLayer]:
    """The KV cache, laid out by the device, or [num_blocks, block_size, K, D] if it has no wish.

    Raises:
        ConfigError: the device allocated another number of layers than the model has.
    """
    if device.allocate_kv is None:
        shape = (num_blocks, block_size, geometry.num_kv_heads, geometry.head_size)
        zeros = partial(torch.zeros, shape, dtype=dtype, device=device.torch_device)
        return [api.KVLayer(k=zeros(), v=zeros()) for _ in range(geometry.num_layers)]
    layers = device.allocate_kv(num_blocks, block_size, geometry, dtype)
    if len(layers) != geometry.num_layers:
        raise ConfigError(
            f"device {device.name} allocated {len(layers)} KV layers, the model has {geometry.num_layers}"
        )
    return layers


# ---- The table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Who serves a query: a device's kernel or the reference."""

    op: api.OpName
    provider: str


@dataclass(frozen=True)
class WeightUse:
    """The form in which a linear layer's weight came, and the one it is used in; of floats, their dtype."""

    stored: str
    used: str


class Kernels:
    """Binds ops for one device. Layers bind at construction; nothing is looked up while running.

    `plan_attention`, `write_kv` and `paged_attention` come from one provider: if the device declines or
    lacks one of them, all three are the reference's.
    """

    def __init__(self, device: str = "reference", specs: Sequence[api.KernelSpec] = ()) -> None:
        self._device = device
        self._specs = {spec.op: spec for spec in specs if spec.device == device}
        self._loaded: dict[tuple[api.OpName, bool], Callable[..., Any]] = {}
        self._plan: api.PlanAttention | None = None
        self.choices: Counter[Choice] = Counter()
        """How often each (op, provider) was bound: shown at start-up and by ``opsin doctor``."""
        self.weights: Counter[WeightUse] = Counter()
        """How many linear layers have weights in which form: shown at start-up and in the statistics."""

    def rms_norm(self, query: api.KernelQuery) -> api.RMSNorm:
        """Bind `RMSNorm`."""
        return self._bind(query)

    def layer_norm(self, query: api.KernelQuery) -> api.LayerNorm:
        """Bind `LayerNorm`."""
        return self._bind(query)

    def gated_act(self, query: api.KernelQuery) -> api.GatedAct:
        """Bind `GatedAct`."""
        return self._bind(query)

    def rotary(self, query: api.KernelQuery) -> api.Rotary:
        """Bind `Rotary`."""
        return self._bind(query)

    def dense_attention(self, query: api.KernelQuery) -> api.DenseAttention:
        """Bind `DenseAttention`."""
        return self._bind(query)

    def prepare_linear(self, query: api.KernelQuery) -> api.PrepareLinear:
        """Bind `PrepareLinear`."""
        return self._bind(query)

    def prepare_quantized_linear(self, query: api.KernelQuery) -> api.PrepareQuantizedLinear:
        """Bind `PrepareQuantizedLinear`."""
        return self._bind(query)

    def supports(self, query: api.KernelQuery) -> bool:
        """Whether the device itself serves a query; if not, the reference would."""
        spec = self._specs.get(query.op)
        if spec is None:
            return False
        narrow = query.weight if query.op == "prepare_linear" else None
        if narrow is not None and narrow.kind not in spec.weights:
            return False  # a kernel made before there were such weights would not look at this one's
        return spec.supports(query)

    def count_weight(self, stored: str, used: str) -> None:
        """Note the form in which a linear layer's weight came, and the one it is used in."""
        self.weights[WeightUse(stored, used)] += 1

    def top_k(self, query: api.KernelQuery) -> api.TopK:
        """Bind `TopK`."""
        return self._bind(query)

    def all_reduce(self, query: api.KernelQuery) -> api.AllReduce:
        """Bind `AllReduce`."""
        return self._bind(query)

    def all_gather(self, query: api.KernelQuery) -> api.AllGather:
        """Bind `AllGather`."""
        return self._bind(query)

    def paged(self, query: api.KernelQuery) -> tuple[api.WriteKV, api.PagedAttention]:
        """Bind the ops around the KV cache. With `plan_attention` they share a plan: one provider for all."""
        own = all(op in self._specs and self._specs[op].supports(replace(query, op=op)) for op in _KV_OPS)
        plan, write, attend = (self._take(op, own) for op in _KV_OPS)
        if self._plan not in (None, plan):
            raise PluginError(
                f"device {self._device} supports paged attention for some layers of this model and declines "
                f"it for {query}; all layers of a model share one plan: support all of them or none"
            )
        self._plan = plan
        return write, attend

    def rotary_paged(self, query: api.KernelQuery) -> api.RotaryPagedAttention:
        """Bind `RotaryPagedAttention`: the device's, if its KV ops are, or `rotary` and `paged` in a row."""
        fused = replace(query, op="rotary_paged_attention")
        if self.supports(fused) and all(self.supports(replace(query, op=op)) for op in _KV_OPS):
            self.paged(replace(query, op="paged_attention"))
            return self._bind(fused)
        rotate = self.rotary(replace(query, op="rotary"))
        return in_a_row(rotate, *self.paged(replace(query, op="paged_attention")))

    @property
    def plan_attention(self) -> api.PlanAttention:
        """The planning op that belongs to the attention the model's layers have bound."""
        assert self._plan is not None, "no layer has bound paged attention"
        return self._plan

    def report(self) -> str:
        """One line: which ops run on the device's kernels and which on the reference."""
        own = sorted({choice.op for choice in self.choices if choice.provider != "reference"})
        fallback = sorted({choice.op for choice in self.choices if choice.provider == "reference"})
        names = f"{', '.join(own) or 'none'}; reference: {', '.join(fallback) or 'none'}"
        return f"kernels of {self._device}: {names}"

    def report_weights(self) -> str:
        """One line: how many linear layers have weights in which form, and how those were stored."""
        uses = sorted(self.weights.items(), key=lambda item: (-item[1], item[0].used, item[0].stored))
        told = [
            f"{count} {use.used}" + (f" (from {use.stored})" if use.stored != use.used else "")
            for use, count in uses
        ]
        return f"linear layers: {'; '.join(told) or 'none'}"

    def _bind(self, query: api.KernelQuery) -> Callable[..., Any]:
        assert query.op not in _KV_OPS, "bind the KV ops together, with paged()"
        narrow = query.op == "prepare_linear" and query.weight is not None
        return self._take(query.op, self.supports(query), narrow=narrow)

    def _take(self, op: api.OpName, own: bool, *, narrow: bool = False) -> Callable[..., Any]:
        self.choices[Choice(op, self._device if own else "reference")] += 1
        if not own:
            return REFERENCES[op]
        if (op, narrow) not in self._loaded:
            spec = self._specs[op]
            load = spec.load_narrow if narrow and spec.load_narrow is not None else spec.load
            self._loaded[op, narrow] = load()
        return self._loaded[op, narrow]

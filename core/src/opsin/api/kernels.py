"""The op table: what each op computes, what a layer asks of it, and what attention needs to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from opsin.api.parallel import Parallel
from opsin.api.weights import QuantizedWeight, WeightForm

if TYPE_CHECKING:
    from torch import Tensor

OpName = Literal[
    "rms_norm",
    "layer_norm",
    "gated_act",
    "rotary",
    "plan_attention",
    "write_kv",
    "paged_attention",
    "dense_attention",
    "prepare_linear",
    "top_k",
    "prepare_quantized_linear",
    "rotary_paged_attention",
    "all_reduce",
    "all_gather",
]
"""The op table. Every op has a reference in `opsin.kernels`; a device may bring its own."""

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class KernelQuery:
    """What a layer is about to ask of an op; a device answers whether it can.

    Only the fields that make sense for ``op`` are set.

    Attributes:
        op: the op.
        dtype: element type of activations, e.g. ``"float32"``.
        size: normalised or feature width (norms, gated_act), row length (top_k, all_reduce, and of the whole
            rows of all_gather).
        in_features, out_features: prepare_linear, prepare_quantized_linear.
        num_heads, num_kv_heads, head_size: attention and rotary.
        activation: gated_act, or fused after a linear layer.
        bias: whether the linear layer has a bias.
        weight: how the linear layer's weight is stored; None: in ``dtype``. For prepare_linear it is a kind
            of 16 bits, asked for only of a kernel whose `KernelSpec.weights` has it: the weight comes and is
            read as it is stored, products and sums are those of ``dtype``. For prepare_quantized_linear it
            is always set. Since 1.2.
    """

    op: OpName
    dtype: str
    size: int | None = None
    in_features: int | None = None
    out_features: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_size: int | None = None
    activation: Activation | None = None
    bias: bool = False
    weight: WeightForm | None = None


@dataclass(frozen=True, kw_only=True)
class KVGeometry:
    """Shape of a model's key/value cache."""

    num_layers: int
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True, kw_only=True)
class KVLayer:
    """Keys and values of one layer, in a layout the device chose.

    Attributes:
        k, v: *logical* views [num_blocks, block_size, K, D]. The memory behind them may be ordered in
            any way (a device keeps e.g. [num_blocks, K, block_size, D] and hands out a permuted view);
            the reference kernels only ever index the logical axes.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """The attention geometry of one flat token batch, on the host. Built once per step.

    Sequences stand one after another in the flat batch, in this order.

    Attributes:
        query_lens: tokens of each sequence in this step.
        context_lens: tokens of each sequence in the KV cache once this step's are written
            (so ``context_len - query_len`` tokens were there before).
        block_tables: block ids of each sequence, at least ``ceil(context_len / block_size)``.
        slots: for each of the T tokens, ``block * block_size + offset`` where its key and value go.
        block_size: tokens per block.
        device: torch device of the step's tensors.
        upload: integers -> int32 (n,) on the device, which travel there with all other numbers of the step in
            one transfer: to be read by kernels of the step, not by the plan. None: nobody collects them.
            Since 1.2.
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    slots: Sequence[int]
    block_size: int
    device: str
    upload: Callable[[Sequence[int]], Tensor] | None = field(default=None, compare=False, repr=False)


class RMSNorm(Protocol):
    """y = x / rms(x) * weight over the last axis, accumulated in float32.

    Source: Zhang & Sennrich 2019, eq. 4. With ``residual``: ``h = x + residual`` first; returns
    ``(norm(h), h)``, and may reuse either input's memory. Without: returns ``(norm(x), x)``.
    """

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class LayerNorm(Protocol):
    """Layer normalisation over the last axis, accumulated in float32 (Ba et al. 2016)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor: ...


class GatedAct(Protocol):
    """x (T, 2F) -> act(x[:, :F]) * x[:, F:], (T, F)."""

    def __call__(self, x: Tensor, activation: Activation) -> Tensor: ...


class Rotary(Protocol):
    """Rotate-half rotary embedding (Su et al. 2021, section 3.4.2).

    q (T, N, D), k (T, K, D); cos and sin (T, R) with R <= D, already duplicated over the two halves;
    the first R elements of each head are rotated. Returns the rotated q and k; may work in place.
    """

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...


class PlanAttention(Protocol):
    """Whatever the device wants to compute once per step; handed to write_kv and paged_attention."""

    def __call__(self, batch: AttentionBatch) -> Any: ...


class WriteKV(Protocol):
    """Store k and v (T, K, D) of this step's tokens at the plan's slots."""

    def __call__(self, k: Tensor, v: Tensor, layer: KVLayer, plan: Any) -> None: ...


class PagedAttention(Protocol):
    """Causal attention of q (T, N, D) over the cache -> (T, N, D).

    Query i of a sequence with ``query_len`` q and ``context_len`` c sees keys ``0 .. c - q + i``
    (bottom-right aligned). Softmax is accumulated in float32. Heads are grouped: query head n uses
    key/value head ``n // (N / K)``.
    """

    def __call__(self, q: Tensor, layer: KVLayer, plan: Any, scale: float) -> Tensor: ...


class RotaryPagedAttention(Protocol):
    """`Rotary` of q and k, `WriteKV` of k and v, and `PagedAttention` of q, in one: (T, N, D).

    Optional, since 1.2: without it the three are called one after another. It shares the plan and the cache
    of the device's other KV ops. May overwrite q and k.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer: KVLayer,
        plan: Any,
        scale: float,
    ) -> Tensor: ...


class DenseAttention(Protocol):
    """Full (not causal) attention within each of several segments of a flat batch.

    q (Tq, N, D), k and v (Tk, N, D) -> (Tq, N, D); ``q_lens`` and ``k_lens`` are the segment lengths
    (``k_lens`` None: the same as ``q_lens``).
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lens: Sequence[int],
        k_lens: Sequence[int] | None,
        scale: float,
    ) -> Tensor: ...


LinearFn = Callable[["Tensor"], "Tensor"]
"""x (..., in_features) -> (..., out_features)."""


class PrepareLinear(Protocol):
    """weight (out, in), bias (out) -> a callable computing act(x @ weight.T + bias).

    Called once per layer while loading; may pack, transpose or quantise. If it keeps its own copy, the
    caller drops the original weight unless ``keep_weight`` says that it is also used elsewhere.
    ``few_rows``: the layer also sees single rows, again and again (it decodes). There the time goes into
    reading the weight, and a second form of it may be worth its memory.
    """

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None,
        *,
        keep_weight: bool,
        few_rows: bool = False,
    ) -> LinearFn: ...


class PrepareQuantizedLinear(Protocol):
    """A `QuantizedWeight` on the device, bias (out) in the run dtype -> a callable as of `PrepareLinear`.

    It computes act(x @ W.T + bias), W the weight that ``weight.dequantize`` gives: to the precision of the
    run dtype, where the form does not allow rounding the activations. Where it does, each row of x may first
    be rounded to 8 bits: ``s = max(abs(row)) / 127``, codes ``round(row / s)``. A row's result never depends
    on the rows beside it. ``keep_weight`` and ``few_rows`` are those of `PrepareLinear`. Since 1.2.
    """

    def __call__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: Activation | None,
        *,
        keep_weight: bool,
        few_rows: bool = False,
    ) -> LinearFn: ...


class TopK(Protocol):
    """The k largest values of each row, in descending order, and where they are.

    x (R, V), any floating dtype -> values (R, k) of that dtype, ids int64 (R, k). NaN counts as largest.
    Where ``k`` is 1, the lowest id of equal values is taken; otherwise their order is open.
    """

    def __call__(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]: ...


class AllReduce(Protocol):
    """The sum of x over all ranks, the same bits on each; may be written into x. Since 1.2.

    x is contiguous, of the run dtype, and has the same shape on all ranks, which call this in the same order.

    Raises:
        TimeoutError: a rank does not come within `RankLink.timeout`.
    """

    def __call__(self, x: Tensor, place: Parallel) -> Tensor: ...


class AllGather(Protocol):
    """x (B, n) of each rank -> their columns side by side, (B, sum of widths), on each. Since 1.2.

    ``widths``: n of each rank; all ranks call this in the same order with the same B.
    """

    def __call__(self, x: Tensor, widths: Sequence[int], place: Parallel) -> Tensor: ...


class Kernels(Protocol):
    """The op table of one device, from which layers bind their ops when they are constructed."""

    def rms_norm(self, query: KernelQuery) -> RMSNorm: ...

    def layer_norm(self, query: KernelQuery) -> LayerNorm: ...

    def gated_act(self, query: KernelQuery) -> GatedAct: ...

    def rotary(self, query: KernelQuery) -> Rotary: ...

    def dense_attention(self, query: KernelQuery) -> DenseAttention: ...

    def prepare_linear(self, query: KernelQuery) -> PrepareLinear: ...

    def prepare_quantized_linear(self, query: KernelQuery) -> PrepareQuantizedLinear: ...

    def supports(self, query: KernelQuery) -> bool:
        """Whether the device itself serves a query; if not, the reference would. Since 1.2."""
        ...

    def count_weight(self, stored: str, used: str) -> None:
        """Note the form in which a linear layer's weight came, and the one it is used in. Since 1.2."""
        ...

    def top_k(self, query: KernelQuery) -> TopK: ...

    def all_reduce(self, query: KernelQuery) -> AllReduce:
        """Since 1.2."""
        ...

    def all_gather(self, query: KernelQuery) -> AllGather:
        """Since 1.2."""
        ...

    def paged(self, query: KernelQuery) -> tuple[WriteKV, PagedAttention]:
        """Bind the ops around the KV cache, which share a plan."""
        ...

    def rotary_paged(self, query: KernelQuery) -> RotaryPagedAttention:
        """Bind rotary and the ops around the KV cache as one call. Since 1.2."""
        ...

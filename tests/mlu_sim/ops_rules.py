"""What the kernels of torch_mlu_ops compute and refuse, apart from their signatures.

Where the public sources are silent the simulator takes the stricter reading: contiguous inputs, no empty
tensors, no aliasing of results and inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.mlu_sim.card import CARD
from tests.mlu_sim.switches import SWITCHES
from tests.mlu_sim.tensors import adopt, alias

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def need(condition: bool, message: str) -> None:
    """Refuse a call."""
    if not condition:
        raise RuntimeError(f"torch_mlu_ops: {message}")


def enter(op: str, **tensors: Tensor | None) -> None:
    """Note the op, and check what holds for all inputs of all ops."""
    CARD.trace[f"tmo::{op}"] += 1
    for name, x in tensors.items():
        if x is not None:
            need(x.device.type == "mlu", f"{op}: {name} must be on mlu, is on {x.device}")
            need(x.numel() > 0, f"{op}: {name} is empty")
            if CARD.major < 5:
                need(x.dtype != torch.bfloat16, f"{op}: bfloat16 is not supported on {CARD.name}")
    devices = {x.device for x in tensors.values() if x is not None}
    need(len(devices) == 1, f"{op}: inputs on several devices: {devices}")


def alike(op: str, **tensors: Tensor | None) -> None:
    """Contiguous floating-point tensors of one dtype."""
    given = {name: x for name, x in tensors.items() if x is not None}
    for name, x in given.items():
        need(x.is_contiguous(), f"{op}: {name} must be contiguous")
        need(x.dtype in _FLOATS, f"{op}: {name} is {x.dtype}")
    need(len({x.dtype for x in given.values()}) <= 1, f"{op}: all tensors must have one dtype")


def halves(op: str, x: Tensor) -> None:
    """The manual lists float16 and bfloat16 only."""
    refused = SWITCHES.float32 == "refused" and x.dtype == torch.float32
    need(not refused, f"{op}: float32 is not supported")


def rows_apart(op: str, **tensors: Tensor) -> dict[str, Tensor]:
    """Host aliases of tensors (..., heads, D) whose rows may be further apart than they are long."""
    taken = {}
    for name, x in tensors.items():
        need(x.dtype in _FLOATS, f"{op}: {name} is {x.dtype}")
        dense = x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
        need(dense, f"{op}: the last two dimensions of {name} must be contiguous")
        if not x.is_contiguous():
            need(SWITCHES.views != "refused", f"{op}: {name} must be contiguous")
        taken[name] = _unstrided(x) if SWITCHES.views == "ignored" else alias(x)
    need(len({x.dtype for x in tensors.values()}) == 1, f"{op}: all tensors must have one dtype")
    return taken


def _unstrided(x: Tensor) -> Tensor:
    """What a kernel reads that takes every tensor for contiguous."""
    return alias(x).as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


def int32(op: str, dims: int, **tensors: Tensor | None) -> None:
    """Lengths, slots, tables and positions."""
    for name, x in tensors.items():
        if x is not None:
            need(x.dtype == torch.int32, f"{op}: {name} must be int32, is {x.dtype}")
            need(x.dim() == dims and x.is_contiguous(), f"{op}: {name} must be {dims}-D and contiguous")


def overlap(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors share bytes."""
    a, b = left.data_ptr(), right.data_ptr()
    return a < b + right.nbytes and b < a + left.nbytes


def norm(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    bias: Tensor | None,
    eps: float,
    store_output_before_norm: bool,
    centred: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm, or layer norm if ``centred``, of x + bias + residual."""
    tensors = {"x": x, "residual": residual, "gamma": gamma, "beta": beta, "bias": bias}
    enter(op, **tensors)
    alike(op, **tensors)
    halves(op, x)
    need(residual is None or residual.shape == x.shape, f"{op}: residual and x differ in shape")
    h = alias(x)
    for added in (bias, residual):
        h = h if added is None else h + alias(added)
    wide, scale = h.float(), alias(gamma).float()
    shift = None if beta is None else alias(beta).float()
    if centred:
        normed = F.layer_norm(wide, wide.shape[-1:], scale, shift, eps)
    else:
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * scale
        normed = normed if shift is None else normed + shift
    out = adopt(normed.to(x.dtype), x.device.index)
    if not store_output_before_norm:
        return out
    return out, adopt(h.clone(), x.device.index)


def active(x: Tensor, act: Callable[[Tensor], Tensor], is_gated: bool) -> Tensor:
    """act(x), or act(first half) * second half."""
    enter("active", input=x)
    alike("active", input=x)
    wide = alias(x).float()
    if is_gated:
        first, second = wide.chunk(2, -1)
        result = act(first) * second
    else:
        result = act(wide)
    return adopt(result.to(x.dtype), x.device.index)


def rotary(
    x: Tensor,
    sin: Tensor,
    cos: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    discrete: bool,
    dynamic_ntk: bool,
    max_seqlen: int,
) -> Tensor | None:
    """On x (B, S, H, D) or (total, H, D); where the result stands is a switch."""
    op = "apply_rotary"
    enter(op, input=x, sin_cache=sin, cos_cache=cos, position_ids=positions, cu_seqlens=cu_seqlens)
    alike(op, sin_cache=sin, cos_cache=cos)
    need(sin.dtype == x.dtype, f"{op}: the caches must have the input's dtype {x.dtype}, have {sin.dtype}")
    need(sin.dim() == 2 and sin.shape == cos.shape, f"{op}: caches are (rotary_seq_len, rotary_dim)")
    need(x.dim() in (3, 4) and x.stride(-1) == 1, f"{op}: input is (B, S, H, D) or (total, H, D)")
    need(x.stride(-2) == x.shape[-1], f"{op}: the heads of a token must lie one after another")
    size, width = x.shape[-1], sin.shape[-1]
    need(2 <= size <= 256 and width % 2 == 0 and width <= size, f"{op}: head {size}, rotary_dim {width}")
    need(not dynamic_ntk, f"{op}: dynamic_ntk is not simulated")
    int32(op, 1, cu_seqlens=cu_seqlens)
    halves(op, x)
    whole = _unstrided(x) if SWITCHES.rows == "ignored" else alias(x)
    flat = whole.view(-1, *x.shape[2:]) if x.dim() == 4 else whole
    rows = _rotary_rows(op, x, flat.shape[0], positions, cu_seqlens, discrete, max_seqlen)
    need(int(rows.max()) < sin.shape[0], f"{op}: a position beyond rotary_seq_len={sin.shape[0]}")
    s, c = alias(sin)[rows][:, None].float(), alias(cos)[rows][:, None].float()
    part = flat[..., :width].float()
    if interleaved:
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        turned = torch.cat((-part[..., width // 2 :], part[..., : width // 2]), -1)
    rotated = (part * c + turned * s).to(x.dtype)
    if SWITCHES.rotary == "elsewhere":
        flat = flat.clone()
    flat[..., :width] = rotated
    if SWITCHES.rotary == "elsewhere":
        return adopt(flat.contiguous(), x.device.index)
    return x if SWITCHES.rotary == "in place" else None


def _rotary_rows(
    op: str,
    x: Tensor,
    count: int,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    discrete: bool,
    max_seqlen: int,
) -> Tensor:
    """Row of the caches for each token."""
    need(positions is None or positions.dtype == torch.int32, f"{op}: position_ids must be int32")
    if discrete:
        need(positions is not None and positions.numel() == count, f"{op}: one position per token")
        assert positions is not None
        return alias(positions).flatten().long()
    if cu_seqlens is None:
        need(x.dim() == 4 and x.shape[1] == max_seqlen, f"{op}: padded input needs max_seqlen == S")
        lengths = [max_seqlen] * x.shape[0]
    else:
        lengths = alias(cu_seqlens).diff().tolist()
    starts = [0] * len(lengths) if positions is None else alias(positions).tolist()
    return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths)])


def write_paged(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """k, v (T, K, D) into caches (blocks, K, block_size, D); negative slots are skipped."""
    op = "reshape_paged_cache"
    enter(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slots)
    alike(op, k_cache=k_cache, v_cache=v_cache)
    need(k.dtype == v.dtype == k_cache.dtype, f"{op}: all tensors must have one dtype")
    halves(op, k)
    host = rows_apart(op, k=k, v=v)
    int32(op, 1, slot_mapping=slots)
    blocks, heads, size, width = k_cache.shape
    need(
        k.shape == (len(slots), heads, width),
        f"{op}: k is {tuple(k.shape)}, the cache {tuple(k_cache.shape)}",
    )
    rows = alias(slots).long()
    need(int(rows.max()) < blocks * size, f"{op}: slot {int(rows.max())} of {blocks * size}")
    kept = rows >= 0
    block, offset = rows[kept] // size, rows[kept] % size
    # A public test of another project saw half of the cache unwritten for tiny heads.
    written = width if width >= 32 else width // 2
    for x, cache in ((host["k"], k_cache), (host["v"], v_cache)):
        alias(cache)[block, :, offset, :written] = x[kept][..., :written]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int = -1, right: int = -1
) -> Tensor:
    """Host tensors q (Tq, N, D), k and v (Tk, K, D), bottom-right aligned; -1: no window."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q.float(), k) * scale
    num_q, num_k = scores.shape[-2:]
    query = torch.arange(num_q)[:, None] + (num_k - num_q)
    key = torch.arange(num_k)[None]
    seen = torch.ones(num_q, num_k, dtype=torch.bool)
    if causal:
        seen &= key <= query
    if left >= 0:
        seen &= key >= query - left
    if right >= 0:
        seen &= key <= query + right
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, v).to(q.dtype)


def _context(cache: Tensor, table: list[int], length: int) -> Tensor:
    """(length, K, D) of one sequence."""
    size = cache.shape[2]
    blocks = cache[table[: -(-length // size)]].transpose(1, 2).flatten(0, 1)
    if SWITCHES.tail == "loaded":  # times a weight of 0, which NaN survives
        return blocks[:length] + (blocks[length:].sum(0, keepdim=True) * 0 if len(blocks) > length else 0)
    return blocks[:length]


def _not_one_column(op: str, tables: Tensor) -> None:
    """The manual takes a table of one column for keys that are not paged; what becomes of them is open."""
    paged = tables.shape[1] > 1 or SWITCHES.one_column == "paged"
    need(paged, f"{op}: block tables of one column mean that nothing is paged")


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_q: Tensor,
    cu_kv: Tensor,
    max_q: int,
    max_kv: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    compute_dtype: torch.dtype,
    tables: Tensor | None,
    head_sizes: Collection[int],
) -> Tensor:
    """Attention of segments; paged where there are tables."""
    op = "flash_attention"
    enter(op, q=q, k=k, v=v, out=out, cu_seq_lens_q=cu_q, cu_seq_lens_kv=cu_kv, block_tables=tables)
    host = rows_apart(op, q=q, k=k, v=v)
    alike(op, out=out)
    need(out is None or out.dtype == q.dtype, f"{op}: all tensors must have one dtype")
    int32(op, 1, cu_seq_lens_q=cu_q, cu_seq_lens_kv=cu_kv)
    int32(op, 2, block_tables=tables)
    need(q.dim() == 3, f"{op}: the simulator takes q (total_q, Hq, D) only")
    need(q.shape[-1] in head_sizes, f"{op}: head size {q.shape[-1]}; supported: {sorted(head_sizes)}")
    need(compute_dtype in (torch.float32, torch.float16), f"{op}: compute_dtype {compute_dtype}")
    starts, kv_starts = alias(cu_q).tolist(), alias(cu_kv).tolist()
    lens = [b - a for a, b in itertools.pairwise(starts)]
    kv_lens = [b - a for a, b in itertools.pairwise(kv_starts)]
    need(len(lens) == len(kv_lens), f"{op}: {len(lens)} query and {len(kv_lens)} key sequences")
    need(starts[-1] == q.shape[0], f"{op}: cu_seq_lens_q ends at {starts[-1]}, q has {q.shape[0]} rows")
    need(max_q >= max(lens) and max_kv >= max(kv_lens), f"{op}: max_seq_len_* below the longest")
    result = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    host_q, host_k, host_v = host["q"], host["k"], host["v"]
    if tables is None:
        need(kv_starts[-1] == k.shape[0], f"{op}: cu_seq_lens_kv ends at {kv_starts[-1]}, k has {k.shape[0]}")
    else:
        need(k.dim() == 4 and k.shape[2] == 16, f"{op}: paged keys need a block size of 16")
        need(tables.shape[0] == len(lens), f"{op}: one block table per sequence")
        _not_one_column(op, tables)
    for i, (start, length, kv_length) in enumerate(zip(starts, lens, kv_lens)):
        if tables is None:
            rows = slice(kv_starts[i], kv_starts[i] + kv_length)
            keys, values = host_k[rows], host_v[rows]
        else:
            table = alias(tables)[i].tolist()
            keys, values = _context(host_k, table, kv_length), _context(host_v, table, kv_length)
        part = slice(start, start + length)
        result[part] = attend(host_q[part], keys, values, scale, causal, left, right)
    if out is None:
        return adopt(result, q.device.index)
    need(not overlap(out, q), f"{op}: out must not share memory with q")
    need(out.shape == result.shape, f"{op}: out is {tuple(out.shape)}, expected {tuple(result.shape)}")
    alias(out).copy_(result)
    return out


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    tables: Tensor,
    lengths: Tensor,
    max_length: int,
    left: int,
    right: int,
    scale: float,
    head_sizes: Collection[int],
) -> Tensor:
    """q (B, seq_q, N, D) over caches (blocks, K, block_size, D). Windows: -1 is none."""
    op = "single_query_cached_kv_attn"
    enter(op, q=q, k_cache=k_cache, v_cache=v_cache, out=out, block_tables=tables, context_lens=lengths)
    alike(op, k_cache=k_cache, v_cache=v_cache)
    need(q.dtype == k_cache.dtype == out.dtype, f"{op}: all tensors must have one dtype")
    host_q = rows_apart(op, q=q)["q"]
    rows_apart(op, out=out)
    int32(op, 2, block_tables=tables)
    int32(op, 1, context_lens=lengths)
    _not_one_column(op, tables)
    need(q.dim() == 4 and q.shape[0] == len(lengths) == len(tables), f"{op}: q is (B, seq_q, Hq, D)")
    need(q.shape[-1] in head_sizes, f"{op}: head size {q.shape[-1]}; supported: {sorted(head_sizes)}")
    need(k_cache.shape[2] in (1, 2, 4, 8, 16, 32, 64), f"{op}: block size {k_cache.shape[2]}")
    groups = q.shape[2] // k_cache.shape[1]
    need(q.shape[1] * groups <= 128, f"{op}: seq_q * Hq / Hkv is {q.shape[1] * groups}; at most 128")
    need(not overlap(out, q) and out.shape == q.shape, f"{op}: out must be like q, and not q")
    known = alias(lengths).tolist()
    need(max_length <= 0 or max_length >= max(known), f"{op}: max_context_len {max_length} < {max(known)}")
    for i, length in enumerate(known):
        need(length > 0, f"{op}: context_lens[{i}] is {length}")
        table = alias(tables)[i].tolist()
        keys, values = (_context(alias(cache), table, length) for cache in (k_cache, v_cache))
        alias(out)[i] = attend(host_q[i], keys, values, scale, True, left, right)
    return out


def product(
    op: str,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    c: Tensor | None,
    act: Callable[[Tensor], Tensor],
    alpha: float,
    beta: float,
) -> Tensor:
    """act(alpha * (a @ b.T + bias) + beta * c)."""
    _check_product(op, a, b, bias, c)
    need(a.shape[1] == b.shape[1], f"{op}: a is {tuple(a.shape)}, b {tuple(b.shape)}")
    need(a.dtype == b.dtype, f"{op}: a is {a.dtype}, b {b.dtype}")
    need(bias is None or SWITCHES.bias == "any" or bias.dim() == 2, f"{op}: bias must be (1, N)")
    y = alpha * (alias(a).float() @ alias(b).float().t() + (0 if bias is None else alias(bias).float()))
    y = y if c is None else y + beta * alias(c).float()
    return adopt(act(y).to(a.dtype), a.device.index)


def _check_product(op: str, a: Tensor, b: Tensor, bias: Tensor | None, c: Tensor | None) -> None:
    enter(op, a=a, b=b, bias=bias, c=c)
    alike(op, a=a, bias=bias, c=c)
    need(a.dim() == 2 and b.dim() == 2 and b.is_contiguous(), f"{op}: a (M, K) and b (N, K), contiguous")


def few_bits_product(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    c: Tensor | None,
    act: Callable[[Tensor], Tensor],
    bits: int,
    alpha: float,
    beta: float,
) -> Tensor:
    """alpha * act(a @ (b * scale).T + bias) + beta * c, b int8 (N, K) or two codes of 4 bits in a byte."""
    op = "weight_only_quant_matmul"
    _check_product(op, a, b, bias, c)
    enter(op, scale=scale)
    need(b.dtype == torch.int8 and bits in (4, 8), f"{op}: b is {b.dtype} of {bits} bits")
    codes = alias(b)
    if bits == 4:
        parts = [(codes << 4) >> 4, codes >> 4]
        codes = torch.stack(parts if SWITCHES.halves == "low" else parts[::-1], -1).flatten(1)
    need(a.shape[1] == codes.shape[1], f"{op}: a is {tuple(a.shape)}, b {tuple(b.shape)} of {bits} bits")
    rows, wide = codes.shape
    if scale.dim() == 1:
        need(bits == 8, f"{op}: 4 bits need scales of groups")
        need(scale.dtype == torch.float32 and len(scale) == rows, f"{op}: scale is float32 (N)")
        scales = alias(scale)[:, None]
    else:
        need(scale.dtype == a.dtype, f"{op}: scales of groups have the activations' dtype")
        group = wide // scale.shape[1]
        need(group in (64, 128, 256, 512) and group * scale.shape[1] == wide, f"{op}: groups of {group}")
        scales = alias(scale).float().repeat_interleave(group, 1)
    y = alias(a).float() @ (codes.float() * scales).t() + (0 if bias is None else alias(bias).float())
    y = alpha * act(y) + (0 if c is None else beta * alias(c).float())
    return adopt(y.to(a.dtype), a.device.index)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh" if SWITCHES.gelu == "tanh" else "none"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def activation(op: str, mode: str, known: Collection[str]) -> Callable[[Tensor], Tensor]:
    """The function of an ``act_mode``."""
    need(mode in known, f"{op}: act_mode {mode!r}; known: {', '.join(known)}")
    return ACTIVATIONS[mode]

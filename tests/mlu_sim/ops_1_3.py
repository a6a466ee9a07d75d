"""torch_mlu_ops 1.3.2, of the MLU370's container: what its manual (2025-01) says each function does.

Names and order of arguments are those of callers (vLLM pull request 10315, dlinfer 90d8a9e); see `names` for
the manual's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.mlu_sim import ops_rules as rules
from tests.mlu_sim.switches import SWITCHES

__version__ = "1.3.2"

_HEAD_SIZES = frozenset({32, 64, 96, 128, 160, 192, 224, 256})
_MODES = ("none", "silu", "gelu")
_ACTIVE_MODES = ("silu", "gelu", "quick_gelu")


def fused_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    bias: Tensor | None,
    eps: float,
    store_output_before_norm: bool,
    quant_scale: Tensor | None = None,
    out: Tensor | None = None,
    dynamic_quant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    rules.need(quant_scale is None and out is None and not dynamic_quant, "fused_rms_norm: not simulated")
    return rules.norm("fused_rms_norm", x, residual, gamma, beta, bias, eps, store_output_before_norm, False)


def fused_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    bias: Tensor | None,
    eps: float,
    store_output_before_norm: bool,
    quant_scale: Tensor | None = None,
    out: Tensor | None = None,
    dynamic_quant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    rules.need(quant_scale is None and out is None and not dynamic_quant, "fused_layer_norm: not simulated")
    return rules.norm("fused_layer_norm", x, residual, gamma, beta, bias, eps, store_output_before_norm, True)


def active(input: Tensor, act_mode: str, is_gated: bool, active_coef: float = 1.0) -> Tensor:
    rules.need(active_coef == 1.0, "active: not simulated")
    return rules.active(input, rules.activation("active", act_mode, _ACTIVE_MODES), is_gated)


def apply_rotary(
    input: Tensor,
    sin_cache: Tensor,
    cos_cache: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    discrete: bool,
    dynamic_ntk: bool,
    max_seqlen: int,
) -> Tensor | None:
    return rules.rotary(
        input, sin_cache, cos_cache, position_ids, cu_seqlens, interleaved, discrete, dynamic_ntk, max_seqlen
    )


def reshape_paged_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    rules.write_paged(k, v, k_cache, v_cache, slot_mapping)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_kv: Tensor,
    alibi_slope: Tensor | None,
    attn_bias: Tensor | None,
    max_seq_len_q: int,
    max_seq_len_kv: int,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    compute_dtype: torch.dtype = torch.float,
    return_lse: bool = False,
    block_tables: Tensor | None = None,
    k_quant_scale: Tensor | None = None,
    v_quant_scale: Tensor | None = None,
) -> Tensor:
    unused = (alibi_slope, attn_bias, k_quant_scale, v_quant_scale)
    rules.need(all(x is None for x in unused) and not return_lse, "flash_attention: not simulated")
    return rules.flash(
        q, k, v, out, cu_seq_lens_q, cu_seq_lens_kv, max_seq_len_q, max_seq_len_kv, softmax_scale, is_causal,
        window_size_left, window_size_right, compute_dtype, block_tables, _HEAD_SIZES,
    )  # fmt: skip


def single_query_cached_kv_attn(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    k_cache_quant_scale: Tensor | None,
    v_cache_quant_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    max_contxt_len: int,
    windows_size_left: int,
    windows_size_right: int,
    softmax_scale: float,
    return_lse: bool = False,
    kv_cache_quant_bit_size: int = -1,
) -> None:
    op = "single_query_cached_kv_attn"
    unused = (k_cache_quant_scale, v_cache_quant_scale, alibi_slopes)
    known = all(x is None for x in unused) and not return_lse and kv_cache_quant_bit_size == -1
    rules.need(known, f"{op}: not simulated")
    left, right = windows_size_left, windows_size_right
    if SWITCHES.window == "-1":
        rules.need(right < 0, f"{op}: only support windows_size_right < 0 currently.")
    elif (left, right) == (0, 0):
        left = right = -1
    else:
        rules.need(SWITCHES.window == "both", f"{op}: windows {left}, {right}; 0, 0 means none")
    rules.decode(
        q, k_cache, v_cache, out, block_tables, context_lens, max_contxt_len, left, right, softmax_scale,
        _HEAD_SIZES,
    )  # fmt: skip


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    c: Tensor | None = None,
    act_mode: str = "none",
    alpha: float = 1.0,
    beta: float = 0.0,
    fast_act: bool = True,
    approximate: bool = True,
) -> Tensor:
    return rules.product("matmul", a, b, bias, c, rules.activation("matmul", act_mode, _MODES), alpha, beta)


def weight_only_quant_matmul(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    c: Tensor | None = None,
    act_mode: str = "none",
    quant_bit_size: int = 8,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    op = "weight_only_quant_matmul"
    rules.need(zero is None, f"{op}: zero points are not supported")
    act = rules.activation(op, act_mode, _MODES)
    return rules.few_bits_product(a, b, scale, bias, c, act, quant_bit_size, alpha, beta)

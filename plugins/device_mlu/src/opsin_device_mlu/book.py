"""The functions of torch_mlu_ops that are called, as the vendor's manual of 1.3.2 and callers have them.

The manual (Torch-MLU-Ops user manual, version 1.3.2, 2025-01) prints names and an order that are partly those
of the C++ below Python; public callers that ran on cards (vLLM pull request 10315, dlinfer 90d8a9e) show
others. Both spellings of an argument are known here, and both orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HALVES = frozenset({"float16", "bfloat16"})
FLOATS = HALVES | {"float32"}


@dataclass(frozen=True, kw_only=True)
class Function:
    """What is known of a function.

    Attributes:
        arguments: this plugin's names for them, in the order in which callers pass them.
        printed: the manual's order, where it is another one.
        spellings: further names of an argument.
        nothing: argument -> the value that asks for nothing: passed where an argument of that name is needed
            and not given, left out where the function has none.
        dtypes: of activations, as the manual lists them.
    """

    arguments: Sequence[str]
    printed: Sequence[str] = ()
    spellings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    nothing: Mapping[str, Any] = field(default_factory=dict)
    dtypes: frozenset[str] = FLOATS


_NORM = Function(
    arguments=("x", "residual", "gamma", "beta", "bias", "eps", "store_output_before_norm"),
    printed=(
        *("x", "residual", "gamma", "beta", "bias", "eps", "store_output_before_norm"),
        *("quant_scale", "out", "dynamic_quant"),
    ),
    spellings={"x": ["input"], "gamma": ["weight"]},
    nothing={"bias": None, "quant_scale": None, "out": None, "dynamic_quant": False},
    dtypes=HALVES,
)

FUNCTIONS: Mapping[str, Function] = {
    "fused_rms_norm": _NORM,
    "fused_layer_norm": _NORM,
    "active": Function(
        arguments=("input", "act_mode", "is_gated"),
        spellings={"input": ["x"]},
        nothing={"bias": None, "active_coef": 1.0},
    ),
    "apply_rotary": Function(
        arguments=(
            *("input", "sin_cache", "cos_cache", "position_ids", "cu_seqlens"),
            *("interleaved", "discrete", "dynamic_ntk", "max_seqlen"),
        ),
        spellings={"input": ["x"], "sin_cache": ["sin"], "cos_cache": ["cos"]},
        nothing={
            "position_ids": None,
            "cu_seqlens": None,
            "interleaved": False,
            "discrete": False,
            "dynamic_ntk": False,
            "output": None,
        },
        dtypes=HALVES,
    ),
    "reshape_paged_cache": Function(
        arguments=("k", "v", "k_cache", "v_cache", "slot_mapping"),
        spellings={
            "k": ["key"],
            "v": ["value"],
            "k_cache": ["key_cache"],
            "v_cache": ["value_cache"],
            "slot_mapping": ["slots"],
        },
        dtypes=HALVES,
    ),
    "flash_attention": Function(
        arguments=(
            *("q", "k", "v", "out", "cu_seq_lens_q", "cu_seq_lens_kv", "alibi_slope", "attn_bias"),
            *("max_seq_len_q", "max_seq_len_kv", "softmax_scale", "is_causal", "window_size_left"),
            *("window_size_right", "compute_dtype", "return_lse", "block_tables"),
        ),
        printed=(
            *("q", "k", "v", "out", "cu_seq_lens_q", "cu_seq_lens_kv", "alibi_slope", "attn_bias"),
            *("k_cache_quant_scale", "v_cache_quant_scale", "block_tables", "max_seq_len_q"),
            *("max_seq_len_kv", "softmax_scale", "is_causal", "window_size_left", "window_size_right"),
            *("compute_dtype", "return_lse"),
        ),
        spellings={
            "q": ["query", "q_ori"],
            "k": ["key"],
            "v": ["value"],
            "out": ["output"],
            "alibi_slope": ["alibi_slopes"],
            "k_cache_quant_scale": ["k_quant_scale"],
            "v_cache_quant_scale": ["v_quant_scale"],
            "block_tables": ["block_table"],
        },
        nothing={
            "alibi_slope": None,
            "attn_bias": None,
            "k_cache_quant_scale": None,
            "v_cache_quant_scale": None,
            "block_tables": None,
            "return_lse": False,
            "window_size_left": -1,
            "window_size_right": -1,
        },
    ),
    "single_query_cached_kv_attn": Function(
        arguments=(
            *("q", "k_cache", "v_cache", "out", "block_tables", "context_lens", "k_cache_quant_scale"),
            *("v_cache_quant_scale", "alibi_slopes", "max_context_len", "windows_size_left"),
            *("windows_size_right", "softmax_scale"),
        ),
        printed=(
            *("q", "k_cache", "v_cache", "out", "block_tables", "context_lens", "k_cache_quant_scale"),
            *("v_cache_quant_scale", "alibi_slopes", "max_context_len", "windows_size_left"),
            *("windows_size_right", "softmax_scale", "return_lse"),
        ),
        spellings={
            "q": ["q_ori", "query"],
            "k_cache": ["key_cache"],
            "v_cache": ["value_cache"],
            "out": ["output"],
            "block_tables": ["block_table"],
            "context_lens": ["context_lengths"],
            # Misspelt until 2025.
            "max_context_len": ["max_contxt_len"],
            "alibi_slopes": ["alibi_slope"],
            "windows_size_left": ["window_size_left"],
            "windows_size_right": ["window_size_right"],
            "k_cache_quant_scale": ["k_quant_scale"],
            "v_cache_quant_scale": ["v_quant_scale"],
        },
        nothing={
            "k_cache_quant_scale": None,
            "v_cache_quant_scale": None,
            "alibi_slopes": None,
            "return_lse": False,
            "kv_cache_quant_bit_size": -1,
        },
    ),
    "matmul": Function(
        arguments=("a", "b", "bias", "c", "act_mode", "alpha", "beta"),
        printed=("a", "b", "bias", "c", "act_mode", "alpha", "beta", "use_fast", "approximate"),
        spellings={
            "a": ["input", "x"],
            "b": ["filter", "weight"],
            "c": ["residual"],
            "use_fast": ["fast_act"],
        },
        nothing={
            "bias": None,
            "c": None,
            "act_mode": "none",
            "alpha": 1.0,
            "beta": 0.0,
            "use_fast": False,
            "approximate": False,
            "out_dtype": None,
            "a_scale": 1.0,
            "b_scale": 1.0,
            "trans_a": False,
            "trans_b": True,
        },
    ),
    "weight_only_quant_matmul": Function(
        arguments=("a", "b", "scale", "zero", "bias", "c", "act_mode", "quant_bit_size", "alpha", "beta"),
        spellings={"a": ["input", "x"], "b": ["filter", "weight"], "c": ["residual"]},
        nothing={
            "zero": None,
            "bias": None,
            "c": None,
            "act_mode": "none",
            "alpha": 1.0,
            "beta": 1.0,
            "use_hp_active": False,
        },
    ),
}
"""Name -> what is known of it."""

OPTIONAL = frozenset({"weight_only_quant_matmul"})
"""Functions that not every version has."""

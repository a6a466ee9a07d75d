"""How the simulated torch_mlu_ops names the arguments of its functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

_NONE = inspect.Parameter.empty

PRINTED: Mapping[str, tuple[str, ...]] = {
    "fused_rms_norm": (
        "input=x", "residual", "gamma", "beta", "bias", "eps", "store_output_before_norm", "quant_scale",
        "out", "dynamic_quant",
    ),
    "fused_layer_norm": (
        "input=x", "residual", "gamma", "beta", "bias", "eps", "store_output_before_norm", "quant_scale",
        "out", "dynamic_quant",
    ),
    "active": ("input", "act_mode", "is_gated", "active_coef?"),
    "apply_rotary": (
        "input", "sin_cache", "cos_cache", "position_ids", "cu_seqlens", "interleaved", "discrete",
        "dynamic_ntk", "max_seqlen",
    ),
    "reshape_paged_cache": ("key=k", "value=v", "key_cache=k_cache", "value_cache=v_cache", "slot_mapping"),
    "flash_attention": (
        "q", "k", "v", "out", "cu_seq_lens_q", "cu_seq_lens_kv", "alibi_slope", "attn_bias",
        "k_cache_quant_scale=k_quant_scale", "v_cache_quant_scale=v_quant_scale", "block_tables",
        "max_seq_len_q", "max_seq_len_kv", "softmax_scale", "is_causal", "window_size_left",
        "window_size_right", "compute_dtype", "return_lse",
    ),
    "single_query_cached_kv_attn": (
        "q_ori=q", "k_cache", "v_cache", "out", "block_tables", "context_lens", "k_cache_quant_scale",
        "v_cache_quant_scale", "alibi_slopes", "max_context_len=max_contxt_len", "windows_size_left",
        "windows_size_right", "softmax_scale", "return_lse", "kv_cache_quant_bit_size?",
    ),
    "matmul": (
        "input=a", "filter=b", "bias", "residual=c", "act_mode", "alpha", "beta", "use_fast=fast_act",
        "approximate",
    ),
    "weight_only_quant_matmul": (
        "a", "b", "scale", "zero", "bias", "c", "act_mode", "quant_bit_size", "alpha?", "beta?",
        "use_hp_active?",
    ),
}  # fmt: skip
"""Arguments in the manual's words and order (1.3.2, chapter 5): ``printed=known``, ``?`` has a default."""


def renamed(name: str, function: Callable[..., Any], names: str) -> Callable[..., Any]:
    """A function of the package as it would tell of its arguments, see `Switches.names`."""
    if names == "known":
        return function
    if names == "hidden":
        return _hidden(function)
    if names == "untold":
        return _Untold(function)
    printed = _printed(name, function)
    return printed if names == "printed" else _Untold(printed)


def _hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class _Untold:
    """As a compiled function: no names, no closure."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    @property
    def __signature__(self) -> Any:
        raise ValueError("no signature found for builtin")


def _printed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    own = inspect.signature(function).parameters
    pairs = []
    for text in PRINTED[name]:
        shown, _, known = text.rstrip("?").partition("=")
        known = known or shown
        if known not in own:
            known = ""
        default = own[known].default if text.endswith("?") and known else (_NONE if known else None)
        pairs.append((shown, known, default))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(shown, kind, default=d) for shown, _, d in pairs])

    def function_of_the_manual(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        return function(**{known: given[shown] for shown, known, _ in pairs if known and shown in given})

    function_of_the_manual.__signature__ = signature  # type: ignore[attr-defined]
    return function_of_the_manual

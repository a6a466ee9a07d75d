"""The vendor's kernel package torch_mlu_ops: found, checked, and called only as it is known.

Its functions are called positionally over the oldest known arguments (vLLM pull request 10315, 2024-11), to
which later versions only ever added. A function whose arguments have other names or another order is refused:
a wrong order would give wrong numbers, not an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

from opsin_device_mlu.settings import Settings

PACKAGE = "torch_mlu_ops"

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "fused_rms_norm": ("x", "residual", "gamma", "beta", "bias", "eps", "store_output_before_norm"),
    "fused_layer_norm": ("x", "residual", "gamma", "beta", "bias", "eps", "store_output_before_norm"),
    "active": ("input", "act_mode", "is_gated"),
    "apply_rotary": (
        "input",
        "sin_cache",
        "cos_cache",
        "position_ids",
        "cu_seqlens",
        "interleaved",
        "discrete",
        "dynamic_ntk",
        "max_seqlen",
    ),
    "reshape_paged_cache": ("k", "v", "k_cache", "v_cache", "slot_mapping"),
    "flash_attention": (
        "q",
        "k",
        "v",
        "out",
        "cu_seq_lens_q",
        "cu_seq_lens_kv",
        "alibi_slope",
        "attn_bias",
        "max_seq_len_q",
        "max_seq_len_kv",
        "softmax_scale",
        "is_causal",
        "window_size_left",
        "window_size_right",
        "compute_dtype",
        "return_lse",
        "block_tables",
    ),
    "single_query_cached_kv_attn": (
        "q",
        "k_cache",
        "v_cache",
        "out",
        "block_tables",
        "context_lens",
        "k_cache_quant_scale",
        "v_cache_quant_scale",
        "alibi_slopes",
        "max_context_len",
        "windows_size_left",
        "windows_size_right",
        "softmax_scale",
    ),
    "matmul": ("a", "b", "bias", "c", "act_mode", "alpha", "beta"),
    "weight_only_quant_matmul": (
        "a",
        "b",
        "scale",
        "zero",
        "bias",
        "c",
        "act_mode",
        "quant_bit_size",
        "alpha",
        "beta",
    ),
}
"""The arguments this plugin passes, in order."""

OPTIONAL = frozenset({"weight_only_quant_matmul"})
"""Functions that not every version has."""

_OTHER_SPELLINGS = {"maxcontxtlen": "maxcontextlen"}
"""Argument 10 of decoding: misspelt until 2025."""


@dataclass(frozen=True, kw_only=True)
class Ops:
    """What can be called.

    Attributes:
        version: of the package; None if it is not there or does not say.
        functions: name -> function.
        refused: name -> why it is not called.
        missing: why the package as a whole is not used; empty if it is.
    """

    version: str | None = None
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""

    def has(self, *names: str) -> bool:
        """Whether all of these can be called."""
        return all(name in self.functions for name in names)


def find_ops(settings: Settings) -> Ops:
    """Import the package, if it is wanted and there. Never raises."""
    if not settings.ops:
        return Ops(missing=f"{PACKAGE} is switched off by OPSIN_MLU_OPS=0")
    try:
        module = importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name == PACKAGE:
            return Ops(missing=f"{PACKAGE} is not installed")
        return Ops(missing=f"{PACKAGE} cannot be imported: {error}")
    except (
        Exception
    ) as error:  # its libraries may be built for another torch_mlu and raise whatever they like
        return Ops(missing=f"{PACKAGE} cannot be imported: {type(error).__name__}: {error}")
    return _examine(module, settings.trust_signatures)


@lru_cache(maxsize=8)
def _examine(module: ModuleType, trust: bool) -> Ops:
    functions: dict[str, Callable[..., Any]] = {}
    refused: dict[str, str] = {}
    for name, arguments in ARGUMENTS.items():
        function = getattr(module, name, None)
        if function is None:
            if name not in OPTIONAL:
                refused[name] = f"{PACKAGE} has no {name}"
            continue
        problem = None if trust else _mismatch(function, arguments)
        if problem is None:
            functions[name] = function
        else:
            refused[name] = (
                f"{PACKAGE}.{name} {problem}; "
                "set OPSIN_MLU_TRUST_SIGNATURES=1 if you know that the meaning is the same"
            )
    version = getattr(module, "__version__", None)
    return Ops(version=None if version is None else str(version), functions=functions, refused=refused)


def _mismatch(function: Callable[..., Any], arguments: tuple[str, ...]) -> str | None:
    """Why a function cannot be called with these positional arguments, or None."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "does not tell its arguments"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in positional]
    if [_plain(name) for name in names[: len(arguments)]] != [_plain(name) for name in arguments]:
        return f"takes ({', '.join(names)}), expected ({', '.join(arguments)}, ...)"
    rest = [p for p in parameters if p not in positional[: len(arguments)]]
    needed = [
        p.name for p in rest if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return f"needs more arguments than are known: {', '.join(needed)}" if needed else None


def _plain(name: str) -> str:
    bare = name.replace("_", "").lower()
    return _OTHER_SPELLINGS.get(bare, bare)


def no_window(ops: Ops, settings: Settings) -> int:
    """What tells the decoding kernel that there is no window.

    Callers passed 0 until version 1.5.0 gave 0 the meaning of a window of one token, and -1 since (dlinfer
    e1bf9cc).
    """
    if settings.decode_window is not None:
        return settings.decode_window
    return 0 if version_numbers(ops.version) < (1, 5) else -1


def version_numbers(version: str | None) -> tuple[int, ...]:
    """``"1.3.2+torch2.5"`` -> (1, 3, 2); a version nobody knows counts as new."""
    found = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, found[0].split("."))) if found else (999,)

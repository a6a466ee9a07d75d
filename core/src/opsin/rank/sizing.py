"""The sizes of a running engine, from settings, device and checkpoint: dtype, KV blocks, context."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opsin.api import Capabilities, Rounding, WeightForm
from opsin.config import EngineConfig
from opsin.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What `resolve` has settled."""

    dtype: str
    block_size: int
    num_blocks: int
    max_model_len: int
    explanation: str


INT4_GROUP_SIZE = 32
"""Inputs that share a scale at ``quantization="int4"`` unless the user says otherwise."""

KV_SHARE = 0.3
"""Share of free device memory taken for the KV cache by default. Weights are loaded before it is measured;
the rest stays for activations, caches and everything else on a shared host."""

KV_DEFAULT_CEILING = 4 * 2**30
"""Most bytes taken of a host without ``kv_cache_memory``, by all ranks together."""


def resolve_dtype(requested: str, checkpoint: str, capabilities: Capabilities) -> str:
    """The dtype to run in.

    Raises:
        ConfigError: the device does not support what was asked for; the message says what to pass.
    """
    dtype = capabilities.dtype_for.get(checkpoint, checkpoint) if requested == "auto" else requested
    if dtype not in capabilities.dtypes:
        advice = capabilities.advice.get(dtype, f"pass one of {', '.join(capabilities.dtypes)}")
        raise ConfigError(f"dtype {dtype} is not supported by this device: {advice}")
    return dtype


def resolve_rounding(config: EngineConfig, stored: str | None) -> Rounding:
    """What may become of weights while they are loaded.

    Rounding the tower and the output head costs no answers that could be measured at 8 bits, and many at 4
    (docs/decisions/0071-rounding.md): at ``int4`` they have 8.

    Args:
        config: what the user asked for.
        stored: method by which the checkpoint's weights are quantised; None: they are floats.

    Raises:
        ConfigError: the checkpoint is not stored as ``quantization`` says.
    """
    asked, group = config.quantization, config.quantization_group_size
    if asked == "auto":
        return Rounding()
    if asked == "none":
        return Rounding(keep_stored=False)
    rows = WeightForm(kind="int8", round_activations=True)
    if asked == "int8":
        return Rounding(decoder=replace(rows, group_size=group), head=rows, other=rows, allowed=True)
    if asked == "int4":
        decoder = WeightForm(kind="int4", group_size=group or INT4_GROUP_SIZE, round_activations=True)
        return Rounding(decoder=decoder, head=rows, other=rows, allowed=True)
    if asked != stored:
        what = "is not quantised" if stored is None else f"is quantised by {stored!r}"
        raise ConfigError(
            f"quantization={asked!r}: {config.model} {what}; leave it out to take the checkpoint as it "
            'is, or pass quantization="int8" or "int4" to round its weights while they are loaded'
        )
    return Rounding()


def resolve(
    config: EngineConfig,
    capabilities: Capabilities,
    *,
    dtype: str,
    model_max_len: int,
    kv_bytes_per_token: int,
    kv_row_elements: int,
    free_bytes: int,
    sharing: int = 1,
) -> Resolved:
    """Fix the sizes of a running engine. Pure: equal arguments give equal results.

    Args:
        config: what the user asked for.
        capabilities: what the device can do.
        dtype: the run dtype.
        model_max_len: longest context of the model.
        kv_bytes_per_token: of all layers.
        kv_row_elements: elements of one token's keys in one layer.
        free_bytes: device memory, after the weights were loaded.
        sharing: how many ranks that memory is for.

    Raises:
        ConfigError: the context asked for is longer than the model's, or the memory holds no block.
    """
    asked = config.max_model_len
    if asked is not None and asked > model_max_len:
        raise ConfigError(
            f"max_model_len={asked} is greater than the {model_max_len} tokens this model was made for; "
            f"pass at most {model_max_len}"
        )
    wanted_len = asked or model_max_len
    size = capabilities.kv_block_size
    budget = config.kv_cache_memory
    if budget is None:
        if capabilities.kv_memory_share is None:
            budget = min(int(free_bytes * KV_SHARE), KV_DEFAULT_CEILING) // sharing
        else:
            budget = int(free_bytes * capabilities.kv_memory_share) // sharing
        # More than all sequences at full length can never be used.
        budget = min(budget, config.max_num_seqs * (wanted_len + size) * kv_bytes_per_token)
    num_blocks = budget // (kv_bytes_per_token * size)
    if num_blocks < 1:
        raise ConfigError(
            f"kv_cache_memory={budget} bytes hold no block of {size} tokens "
            f"({kv_bytes_per_token * size} bytes); pass more"
        )
    if capabilities.max_tensor_elements is not None:
        num_blocks = min(num_blocks, capabilities.max_tensor_elements // (kv_row_elements * size))
    capacity = num_blocks * size
    max_len = min(wanted_len, capacity)
    if asked is not None and max_len < asked:
        raise ConfigError(
            f"max_model_len={asked} needs {asked * kv_bytes_per_token} bytes of KV cache, "
            f"there are {budget}; pass max_model_len={max_len} or a larger kv_cache_memory"
        )
    return Resolved(
        dtype=dtype,
        block_size=size,
        num_blocks=num_blocks,
        max_model_len=max_len,
        explanation=(
            f"KV cache: {num_blocks} blocks x {size} tokens x {kv_bytes_per_token} B = "
            f"{capacity * kv_bytes_per_token / 2**20:.0f} MiB = {capacity} tokens; "
            f"context {max_len} tokens, {capacity / max_len:.1f} full-length sequences at once"
        ),
    )

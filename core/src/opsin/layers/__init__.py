"""PUBLIC building blocks: models are written with these, on the op table of their device.

A family is a `LanguageModel` with an encoder, its config.json read by `text_config`. A layer declares the
checkpoint tensors it takes as `Slot`s and holds nothing until they are put in. A linear layer hands its
finished weight to the device (`prepare_linear`), which may pack it, and keeps only the callable. Linear
layers are column- or row-parallel with a world size that is 1 today: a slot takes this rank's slice.

Names of modules are the names of the checkpoint's keys; a fused layer names the keys it is fused from.
"""

from opsin.layers.decoder import (
    Attention,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    GatedMLP,
    LanguageModel,
    kv_geometry,
    output_head,
)
from opsin.layers.embeds import ProcessorMapper, split_embeds, split_image_embeds
from opsin.layers.grids import (
    PatchMerger,
    frame_angles,
    frame_lengths,
    grid_rotary,
    in_blocks,
    patch_projection,
)
from opsin.layers.linear import Embedding, Linear, activation, dtype_name
from opsin.layers.module import Layer, Module, Slot
from opsin.layers.norm import LayerNorm, RMSNorm
from opsin.layers.patches import (
    Grid,
    GridMapper,
    Patching,
    TimedGridMapper,
    fit_to_patches,
    step_seconds,
    step_times,
    token_placeholder,
)
from opsin.layers.pixels import CLIP_MEAN, CLIP_STD, pixel_levels, pixel_values, resampling
from opsin.layers.rotary import (
    PositionBlock,
    RotaryTable,
    embed_runs,
    inverse_frequencies,
    mrope_positions,
)
from opsin.layers.rounding import round_weight
from opsin.layers.text import context_length, fields, sequential_positions, switch_lengths, text_config
from opsin.layers.tiling import (
    cut_tiles,
    grid_by_aspect_ratio,
    grid_by_longest_edge,
    pixel_shuffle,
    resized,
    size_by_longest_edge,
)
from opsin.layers.vision import (
    MLP,
    TIMM_RENAMES,
    GatedVisionMLP,
    Table,
    VisionConfig,
    VisionEncoder,
    VisionMLP,
    VisionTransformer,
    flatten_patches,
)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "MLP",
    "TIMM_RENAMES",
    "Attention",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "Embedding",
    "GatedMLP",
    "GatedVisionMLP",
    "Grid",
    "GridMapper",
    "LanguageModel",
    "Layer",
    "LayerNorm",
    "Linear",
    "Module",
    "PatchMerger",
    "Patching",
    "PositionBlock",
    "ProcessorMapper",
    "RMSNorm",
    "RotaryTable",
    "Slot",
    "Table",
    "TimedGridMapper",
    "VisionConfig",
    "VisionEncoder",
    "VisionMLP",
    "VisionTransformer",
    "activation",
    "context_length",
    "cut_tiles",
    "dtype_name",
    "embed_runs",
    "fields",
    "fit_to_patches",
    "flatten_patches",
    "frame_angles",
    "frame_lengths",
    "grid_by_aspect_ratio",
    "grid_by_longest_edge",
    "grid_rotary",
    "in_blocks",
    "inverse_frequencies",
    "kv_geometry",
    "mrope_positions",
    "output_head",
    "patch_projection",
    "pixel_levels",
    "pixel_shuffle",
    "pixel_values",
    "resampling",
    "resized",
    "round_weight",
    "sequential_positions",
    "size_by_longest_edge",
    "split_embeds",
    "split_image_embeds",
    "step_seconds",
    "step_times",
    "switch_lengths",
    "text_config",
    "token_placeholder",
]

"""Writes a checkpoint as a hub repository is laid out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from towers import CLIP_MEAN, CLIP_STD

CLIP_PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(CLIP_STD),
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def write(
    folder: Path, files: Mapping[str, object], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Writes weights and settings beside the tokenizer's files, which must be there already."""
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    # Written aside and moved, so that a reader never meets half a file.
    partial = folder / "model.safetensors.partial"
    stored = {name: p.detach().to(dtype).contiguous().clone() for name, p in tensors.items()}
    save_file(stored, partial, {"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")

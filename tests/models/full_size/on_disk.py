"""A checkpoint of full size on disk, laid out as the hub's: shards, an index, random bfloat16 weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.full_size.hub_layout import Shapes, hub_shapes, published_config
from tests.models.full_size.vocabulary import MODEL, write_tokenizer

SHARD_BYTES = 4 * 10**9
"""As the published 2B model is cut."""


def write_checkpoint(folder: Path, name: str) -> int:
    """Write the folder of a published Qwen2-VL with random weights.

    Returns:
        Bytes of weights.
    """
    config = published_config(name)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    shutil.copy(MODEL / "chat_template.json", folder)
    preprocessor = json.loads((MODEL / "preprocessor_config.json").read_text())
    preprocessor |= {"min_pixels": 3136, "max_pixels": 12845056}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    stop = [config["eos_token_id"], config["bos_token_id"]]
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": stop}))

    shapes = hub_shapes(config)
    shards = list(_shards(shapes))
    random = torch.Generator().manual_seed(1)
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: _random(key, shapes[key], random) for key in keys}, folder / file)
        weight_map |= dict.fromkeys(keys, file)
    total = 2 * sum(map(prod, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(shapes: Shapes) -> Iterator[list[str]]:
    keys: list[str] = []
    size = 0
    for key in sorted(shapes):
        num_bytes = 2 * prod(shapes[key])
        if keys and size + num_bytes > SHARD_BYTES:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += num_bytes
    yield keys


def _random(key: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Norms around 1; the rest small enough that 28 layers of it stay far from overflow."""
    tensor = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03, generator=random)
    is_norm = ("norm" in key or "ln_q" in key) and key.endswith("weight")
    return tensor.add_(1) if is_norm else tensor

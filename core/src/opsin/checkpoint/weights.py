"""Checkpoint files -> a model's layers, one tensor at a time; every key is accounted for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from opsin.api import Model
from opsin.errors import CheckpointError
from opsin.layers import Layer, Linear, Slot

logger = logging.getLogger(__name__)

_SHOWN_KEYS = 8


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Which keys went where.

    Attributes:
        loaded: keys that were put into a layer.
        missing: keys that a layer needs and no file has.
        unexpected: keys of the files that the model does not know.
        ignored: keys that the model does not use, and weights of tied heads.
    """

    loaded: Sequence[str]
    missing: Sequence[str]
    unexpected: Sequence[str]
    ignored: Sequence[str]

    def check(self) -> None:
        """Raise `CheckpointError` if anything is missing or unexpected."""
        problems = [
            f"{len(keys)} {kind} ({', '.join(keys[:_SHOWN_KEYS])}{', ...' * (len(keys) > _SHOWN_KEYS)})"
            for kind, keys in (("missing", self.missing), ("unexpected", self.unexpected))
            if keys
        ]
        if problems:
            raise CheckpointError(
                f"the checkpoint's tensors do not fit its architecture: {'; '.join(problems)}. "
                "Is config.json the one that belongs to these weights?"
            )


def model_slots(model: nn.Module) -> dict[str, Slot]:
    """Every checkpoint key a model takes -> its slot."""
    slots = {}
    for path, module in model.named_modules():
        if isinstance(module, Layer):
            for slot in module.slots():
                base = path.rpartition(".")[0] if slot.beside else path
                slots[f"{base}.{slot.name}" if base else slot.name] = slot
    return slots


def load_weights(model: Model, tensors: Iterable[tuple[str, Tensor]]) -> LoadReport:
    """Put (key, tensor) pairs into the model, in whatever order they come.

    Raises:
        CheckpointError: a tensor has another shape than its layer.
    """
    assert isinstance(model, nn.Module)
    waiting = model_slots(model)
    layers = model.named_modules(remove_duplicate=False)
    tied = {f"{path}.weight" for path, layer in layers if isinstance(layer, Linear) and layer.tied}
    loaded, unexpected, ignored = [], [], []
    for key, tensor in tensors:
        name = model.weight_name(key)
        if name is None or name in tied:
            ignored.append(key)
            continue
        if name not in waiting:
            unexpected.append(key)
            continue
        slot = waiting.pop(name)
        if tuple(tensor.shape) != slot.shape:
            raise CheckpointError(
                f"tensor {key} has shape {tuple(tensor.shape)}, its layer expects {slot.shape}; "
                "config.json and weights disagree"
            )
        slot.put(tensor)
        loaded.append(key)
    return LoadReport(loaded=loaded, missing=sorted(waiting), unexpected=unexpected, ignored=ignored)


def read_safetensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Memory-mapped tensors of several files, one at a time, with progress for large checkpoints."""
    from safetensors import SafetensorError, safe_open

    total = sum(file.stat().st_size for file in files)
    small = total < 256 * 2**20
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=small) as progress:
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    for key in handle.keys():  # noqa: SIM118 (not a dict: it has no iterator)
                        tensor: Tensor = handle.get_tensor(key)
                        yield key, tensor
                        progress.update(tensor.numel() * tensor.element_size())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file.name} is not a readable safetensors file: {error}") from error


def torch_dtype(name: str) -> torch.dtype:
    """``"float32"`` -> ``torch.float32``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype

"""Checkpoint files -> a model's layers, one tensor at a time; every key is accounted for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from opsin.api import Model, QuantizedWeight
from opsin.errors import CheckpointError
from opsin.layers import Layer, Linear, Slot
from opsin.layers.decoder import OutputHead

logger = logging.getLogger(__name__)

_SHOWN_KEYS = 8


_CONSTANTS = re.compile(r"(^|\.)(inv_freq|(cos|sin)_cached|position_ids)$")
"""What some exports store of what a model computes by itself."""

_WRAPPERS = {
    "module.": "torch's DataParallel or DistributedDataParallel (save model.module)",
    "_orig_mod.": "torch.compile (save the model before it is compiled)",
    "base_model.": "peft or another wrapper (merge adapters first: merge_and_unload; save the model inside)",
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Which keys went where.

    Attributes:
        loaded: keys that were put into a layer.
        missing: names that a layer needs and no key has.
        unexpected: keys of the files that the model does not know.
        ignored: keys that the model does not use, constants, biases of zeros, and weights of tied heads.
        renamed: key -> name, of keys that the model renames.
    """

    loaded: Sequence[str]
    missing: Sequence[str]
    unexpected: Sequence[str]
    ignored: Sequence[str]
    renamed: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `CheckpointError` if anything is missing or unexpected."""
        if not self.missing and not self.unexpected:
            return
        for prefix, wrapper in _WRAPPERS.items():
            inside = [key for key in self.unexpected if key.startswith(prefix)]
            if inside and not self.loaded:
                raise CheckpointError(
                    f"the keys of the checkpoint's tensors begin with {prefix!r} ({inside[0]}): they were "
                    f"saved from inside of {wrapper}"
                )
        unexpected = [
            f"{key}, renamed to {self.renamed[key]}" if key in self.renamed else key
            for key in self.unexpected
        ]
        problems = [
            f"{len(keys)} {kind} ({', '.join(keys[:_SHOWN_KEYS])}{', ...' * (len(keys) > _SHOWN_KEYS)})"
            for kind, keys in (("missing", self.missing), ("unexpected", unexpected))
            if keys
        ]
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


def load_weights(
    model: Model,
    tensors: Iterable[tuple[str, Tensor | QuantizedWeight]],
    *,
    needs_head: bool = True,
) -> LoadReport:
    """Put (key, tensor) pairs into the model, in whatever order they come.

    Args:
        model: to fill.
        tensors: (key, tensor) of each; a tensor may be a weight in integers.
        needs_head: whether the model is to give logits; a model of embeddings may lack its output head.

    Raises:
        CheckpointError: a tensor has another shape than its layer, or is not of floating point.
    """
    assert isinstance(model, nn.Module)
    waiting = model_slots(model)
    layers = dict(model.named_modules(remove_duplicate=False))
    tied = {f"{path}.weight" for path, layer in layers.items() if isinstance(layer, Linear) and layer.tied}
    taken: dict[str, str] = {}
    unexpected: list[str] = []
    ignored: list[str] = []
    renamed: dict[str, str] = {}
    for key, tensor in tensors:
        name = model.weight_name(key)
        if name is not None and name != key:
            renamed[key] = name
        slot = None if name is None else waiting.pop(name, None)
        if slot is None and name is not None and name in taken:
            raise CheckpointError(f"tensors {taken[name]} and {key} are both for the layer's {name}")
        if slot is None:
            unused = name is None or name in tied or _CONSTANTS.search(key)
            if unused or (key.endswith("bias") and isinstance(tensor, Tensor) and not tensor.any()):
                ignored.append(key)
            else:
                unexpected.append(key)
            continue
        assert name is not None
        _put(slot, key, tensor)
        taken[name] = key
    heads = {f"{path}.weight" for path, layer in layers.items() if isinstance(layer, OutputHead)}
    return LoadReport(
        loaded=list(taken.values()),
        missing=sorted(
            name for name, slot in waiting.items() if not slot.optional and (needs_head or name not in heads)
        ),
        unexpected=unexpected,
        ignored=ignored,
        renamed=renamed,
    )


def _put(slot: Slot, key: str, tensor: Tensor | QuantizedWeight) -> None:
    if isinstance(tensor, QuantizedWeight) and (slot.put_quantized is None or tensor.shape != slot.shape):
        tensor = tensor.dequantize(torch.float32)
    if isinstance(tensor, Tensor) and tensor.dtype not in _FLOATS:
        raise CheckpointError(
            f"tensor {key} is {str(tensor.dtype).removeprefix('torch.')}, its layer expects floating "
            "point: quantised weights, without the quantization_config or the tensors beside them (scales) "
            "that say how to read them"
        )
    if tuple(tensor.shape) != slot.shape:
        raise CheckpointError(
            f"tensor {key} has shape {tuple(tensor.shape)}, its layer expects {slot.shape}; "
            "config.json and weights disagree"
        )
    if isinstance(tensor, Tensor):
        slot.put(tensor)
    else:
        assert slot.put_quantized is not None
        slot.put_quantized(tensor)


def safetensors_keys(files: Sequence[Path]) -> set[str]:
    """The names of all tensors in some files.

    Raises:
        CheckpointError: a file is not readable.
    """
    from safetensors import SafetensorError, safe_open

    keys: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                keys.update(handle.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file.name} is not a readable safetensors file: {error}") from error
    return keys


def read_safetensors(
    files: Sequence[Path], weight_map: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Memory-mapped tensors of several files, one at a time, with progress for large checkpoints.

    Args:
        files: in order.
        weight_map: key -> name of the file whose copy counts, where several files have one.

    Raises:
        CheckpointError: a file is not readable, or two have a tensor and ``weight_map`` does not decide.
    """
    from safetensors import SafetensorError, safe_open

    total = sum(file.stat().st_size for file in files)
    small = total < 256 * 2**20
    found_in: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=small) as progress:
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    for key in handle.keys():  # noqa: SIM118 (not a dict: it has no iterator)
                        if (weight_map or {}).get(key, file.name) != file.name:
                            continue
                        if found_in.setdefault(key, file.name) != file.name:
                            raise CheckpointError(
                                f"{found_in[key]} and {file.name} both have the tensor {key}, and no index "
                                "says which counts"
                            )
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

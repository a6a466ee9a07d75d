"""A checkpoint of floats -> one of fewer bits, in the layout of compressed-tensors, file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opsin.api import BuildContext, ModelSpec, QuantizedWeight, Rounding, WeightForm
from opsin.checkpoint.files import Checkpoint, settings_explained
from opsin.checkpoint.weights import read_safetensors
from opsin.errors import CheckpointError
from opsin.kernels import Kernels
from opsin.layers import Linear, round_weight

_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")


@dataclass(frozen=True)
class RoundedLayer:
    """What rounding did to one tensor.

    Attributes:
        key: of the tensor.
        form: of its weight now.
        error: Frobenius norm of the difference over that of the weight.
        saved_bytes: how many fewer it takes.
    """

    key: str
    form: WeightForm
    error: float
    saved_bytes: int


def forms_of(checkpoint: Checkpoint, spec: ModelSpec, rounding: Rounding) -> dict[str, WeightForm]:
    """Key -> form of each tensor that `EngineConfig.quantization` would round while it is loaded.

    Raises:
        CheckpointError: config.json cannot be followed.
    """
    context = BuildContext(
        config=checkpoint.config, kernels=Kernels(), dtype=torch.float32, device="meta", rounding=rounding
    )
    with settings_explained(checkpoint.path, spec.build):
        model = spec.build(context)
    assert isinstance(model, nn.Module)
    forms = {}
    for path, layer in model.named_modules():
        form = layer.rounded_to() if isinstance(layer, Linear) and not layer.tied else None
        if form is None:
            continue
        for slot in layer.slots():
            base = path.rpartition(".")[0] if slot.beside else path
            if slot.put_quantized is not None:
                forms[f"{base}.{slot.name}" if base else slot.name] = form
    return _by_key(checkpoint, model, forms)


def _by_key(checkpoint: Checkpoint, model: Any, forms: Mapping[str, WeightForm]) -> dict[str, WeightForm]:
    from opsin.checkpoint.weights import safetensors_keys

    names = {key: model.weight_name(key) for key in safetensors_keys(checkpoint.weight_files())}
    return {key: forms[name] for key, name in names.items() if name in forms}


def write_rounded(
    checkpoint: Checkpoint, forms: Mapping[str, WeightForm], out: Path
) -> Iterator[RoundedLayer]:
    """Write the checkpoint with the tensors of ``forms`` rounded; tell of each one as it is done.

    ``out`` appears when everything is written. Shards keep their names; one is in memory at a time.

    Raises:
        CheckpointError: ``out`` exists, a file cannot be read, or a weight holds NaN or infinity.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists, and nothing is written over; choose another folder")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        where: dict[str, str] = {}
        used: dict[str, WeightForm] = {}
        for file in checkpoint.weight_files():
            tensors: dict[str, Tensor] = {}
            for key, tensor in read_safetensors([file], checkpoint.weight_map()):
                form = forms.get(key)
                if form is None or tensor.shape[-1] % (form.group_size or 1):
                    tensors[key] = tensor
                    continue
                rounded = _rounded(key, tensor, form)
                stored = _stored(rounded)
                module = key.removesuffix(".weight")
                tensors |= {f"{module}.{name}": part for name, part in stored.items()}
                used[module] = form
                yield RoundedLayer(key, form, _error(tensor, rounded), tensor.nbytes - rounded.nbytes)
            save_file(tensors, partial / file.name, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file.name)
        _copy_rest(checkpoint, partial)
        config = {**checkpoint.config, "quantization_config": _settings(used)}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if len(checkpoint.weight_files()) > 1:
            total = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _rounded(key: str, tensor: Tensor, form: WeightForm) -> QuantizedWeight:
    try:
        return round_weight(tensor.flatten(1), form)
    except ValueError as error:
        raise CheckpointError(f"{key}: {error}") from error


def _error(tensor: Tensor, rounded: QuantizedWeight) -> float:
    exact = tensor.flatten(1).float()
    return float((exact - rounded.dequantize(torch.float32)).norm() / exact.norm().clamp(min=1e-30))


def _stored(weight: QuantizedWeight) -> dict[str, Tensor]:
    """As compressed-tensors has it: int8 codes as they are, codes of 4 bits eight to a word of 32."""
    if weight.form.kind == "int8":
        return {"weight": weight.codes.contiguous(), "weight_scale": weight.scales}
    rows, wide = weight.shape
    codes = weight.codes
    if missing := -codes.shape[1] % 4:
        codes = torch.cat((codes, codes.new_full((rows, missing), 0x88)), dim=1)
    return {
        "weight_packed": codes.contiguous().view(torch.int32),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor([rows, wide]),
    }


def _settings(used: Mapping[str, WeightForm]) -> dict[str, Any]:
    groups = {}
    for number, form in enumerate(dict.fromkeys(used.values())):
        bits = 8 if form.kind == "int8" else 4
        strategy = "channel" if form.group_size is None else "group"
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy}
        groups[f"group_{number}"] = {
            "targets": [module for module, own in used.items() if own == form],
            "weights": {**weights, "group_size": form.group_size},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
            "format": "int-quantized" if bits == 8 else "pack-quantized",
        }
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def _copy_rest(checkpoint: Checkpoint, target: Path) -> None:
    for file in checkpoint.path.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in ("config.json", _INDEX):
            shutil.copyfile(file, target / file.name)

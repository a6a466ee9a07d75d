"""LoRA adapters, merged into the weights while these are read: W + scale * B A (Hu et al. 2021, eq. 3).

Adapters are read as peft writes them. Every tensor of an adapter must find its place, and every setting that
would change an answer is followed or refused.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsin.api import QuantizedWeight
from opsin.checkpoint.files import read_json
from opsin.checkpoint.hub import locate
from opsin.errors import CheckpointError

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"}

_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout"),
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "bias",
    ),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "runtime_config", "peft_version"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "lora_bias"),
    *("parent_library",),
}
"""Of the training, or said by the adapter's tensors, too: where a bias was trained, its tensor is there."""

_UNCHANGED_BASE = (True, False, None, "gaussian", "eva")
"""``init_lora_weights`` with which training starts from the base model's weights as they are."""

_TENSOR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+?)\.(?P<kind>lora_(?:embedding_)?[AB])(?:\.default)?(?P<weight>\.weight)?$"
)
_SAVED = re.compile(r"^(?:base_model\.model\.)?(?P<name>.+?)$")
_WRAPPED = re.compile(r"\.(?:modules_to_save\.default|original_module|base_layer)(?=\.)")


@dataclass(frozen=True, kw_only=True)
class _Update:
    """What an adapter adds to one weight (N, K): scale * B (N, r) @ A (r, K)."""

    source: str
    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> Tensor:
        """float32 (N, K)."""
        return (self.b.float() @ self.a.float()) * self.scale


class Adapters:
    """Several adapters, in order, for one model.

    Args:
        names: a folder or hub id of each.
        scales: one for each.
        weight_name: the model's: what a tensor's key is in its tree.
    """

    def __init__(
        self, names: Sequence[str], scales: Sequence[float], weight_name: Callable[[str], str | None]
    ) -> None:
        self._weight_name = weight_name
        self._updates: dict[str, list[_Update]] = {}
        self._saved: dict[str, tuple[str, Tensor]] = {}
        self._used: set[str] = set()
        self._dequantized = self._unread = 0
        for name, scale in zip(names, scales, strict=True):
            self._read(locate(name), scale)

    def merged(
        self, tensors: Iterable[tuple[str, Tensor | QuantizedWeight]]
    ) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """(key, tensor) of each, with what the adapters change; then the tensors that only they have.

        Raises:
            CheckpointError: a tensor of an adapter has another shape than its weight, or no weight at all.
        """
        for key, tensor in tensors:
            name = self._weight_name(key)
            if name is None:
                yield key, tensor
                continue
            if name in self._saved:
                source, tensor = self._saved[name]
                self._used.add(source)
            if name in self._updates:
                tensor = self._updated(key, tensor, self._updates[name])
            yield key, tensor
        for name, (source, tensor) in self._saved.items():
            if source not in self._used:  # e.g. the head of a checkpoint whose head is tied
                self._used.add(source)
                yield name, tensor
        self._check_all_used()
        if self._dequantized:
            logger.warning(
                "%d quantised weights have become floats, since adapters were merged into them; "
                "quantization='int8' or 'int4' rounds them again",
                self._dequantized,
            )

    def report(self) -> str:
        """One line: how many weights were changed."""
        saved = f", {len(self._saved)} replaced" if self._saved else ""
        unread = f", {self._unread} are for weights that nothing reads" if self._unread else ""
        return f"LoRA: merged into {len(self._updates)} weights{saved}{unread}"

    # ---- reading ------------------------------------------------------------------------------

    def _read(self, folder: Path, scale: float) -> None:
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG}: it is no LoRA adapter as peft saves them")
        config = read_json(folder / CONFIG)
        _check(config, folder)
        halves: dict[str, dict[str, tuple[str, Tensor]]] = {}
        for key, tensor in _tensors(folder):
            found = _TENSOR.match(key)
            source = f"{key} of {folder.name}"
            if found is None:
                self._keep(_WRAPPED.sub("", _SAVED.sub(r"\g<name>", key)), source, tensor)
                continue
            halves.setdefault(found["module"], {})[found["kind"]] = source, tensor
        if not halves and not self._saved:
            raise CheckpointError(f"{folder / WEIGHTS} holds no tensors of LoRA")
        for module, tensors in halves.items():
            self._pair(module, tensors, config, folder, scale)

    def _keep(self, name: str, source: str, tensor: Tensor) -> None:
        own = self._weight_name(name)
        if ".lora_" in name:
            raise CheckpointError(f"{source} has no place in this model")
        if own is None:
            self._unread += 1
        else:
            self._saved[own] = source, tensor

    def _pair(
        self,
        module: str,
        tensors: Mapping[str, tuple[str, Tensor]],
        config: Mapping[str, Any],
        folder: Path,
        scale: float,
    ) -> None:
        embedding = "lora_embedding_A" in tensors or "lora_embedding_B" in tensors
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if first not in tensors or second not in tensors:
            raise CheckpointError(f"{folder.name}: {module} has only {', '.join(tensors)}")
        (source, a), (_, b) = tensors[first], tensors[second]
        own = self._weight_name(f"{module}.weight")
        if own is None:  # of a weight that no computation reads, such as the last layers of some towers
            self._unread += 1
            return
        rank = int(_of_module(config.get("rank_pattern"), module, config["r"]))
        alpha = float(_of_module(config.get("alpha_pattern"), module, config["lora_alpha"]))
        if a.shape[0] != rank or b.shape[-1] != rank or a.ndim != 2 or b.ndim != 2:
            raise CheckpointError(
                f"{source}: {tuple(a.shape)} and {tuple(b.shape)} are not of rank {rank}, as {CONFIG} says"
            )
        factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if embedding or config.get("fan_in_fan_out"):  # stored as (K, N)
            a, b = b.T, a.T
        self._updates.setdefault(own, []).append(_Update(source=source, a=a, b=b, scale=scale * factor))

    # ---- merging ------------------------------------------------------------------------------

    def _updated(self, key: str, tensor: Tensor | QuantizedWeight, updates: Sequence[_Update]) -> Tensor:
        dtype = None
        if isinstance(tensor, QuantizedWeight):
            weight = tensor.dequantize(torch.float32)
            self._dequantized += 1
        else:
            weight, dtype = tensor.float(), tensor.dtype
        for update in updates:
            delta = update.delta()
            if delta.shape != weight.shape:
                raise CheckpointError(
                    f"{update.source} is for a weight of {tuple(delta.shape)}; {key} has "
                    f"{tuple(weight.shape)}: the adapter is for another model"
                )
            weight = weight + delta
            self._used.add(update.source)
        return weight if dtype is None else weight.to(dtype)

    def _check_all_used(self) -> None:
        sources = [update.source for updates in self._updates.values() for update in updates]
        lost = [source for source in sources if source not in self._used]
        if lost:
            shown = ", ".join(lost[:4]) + ", ..." * (len(lost) > 4)
            raise CheckpointError(
                f"{len(lost)} tensors of LoRA have no weight in this checkpoint ({shown}): "
                "the adapter is for another model"
            )


def _check(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse an adapter whose settings are not all followed."""
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA is merged")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)) or isinstance(config[name], bool):
            raise CheckpointError(f"{where}: {name} is {config.get(name)!r}; expected a number")
    init = config.get("init_lora_weights")
    if init not in _UNCHANGED_BASE:
        raise CheckpointError(
            f"{where}: init_lora_weights is {init!r}: training began from other weights than the base "
            "model's; convert the adapter when it is saved (peft: path_initial_model_for_weight_conversion)"
        )
    unknown = _set_fields(config) - _READ - _WITHOUT_EFFECT
    if unknown:
        raise CheckpointError(
            f"{where}: {', '.join(f'{name}={config[name]!r:.60}' for name in sorted(unknown))}: adapters of "
            "this kind are not merged; merge it with peft (merge_and_unload) and save the model"
        )


def _set_fields(config: Mapping[str, Any]) -> set[str]:
    return {name for name, value in config.items() if value not in (None, False, 0, "", [], {})}


def _of_module(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """peft's rule: the first key that a module's name ends with, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    file = folder / WEIGHTS
    if not file.is_file():
        others: Collection[str] = sorted(path.name for path in folder.glob("adapter_model.*"))
        found = f"; there is {', '.join(others)}, which is not read" if others else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS}{found}")
    try:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dict: it has no iterator)
                yield key, handle.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error

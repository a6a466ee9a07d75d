"""What hooks return: one frozen, keyword-only spec for each thing a plugin provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from opsin.api.device import Device, Probe
from opsin.api.kernels import KernelQuery, OpName
from opsin.api.media import InputContext, InputMapper, Modality, PlacedMedia, Placeholder, Positions
from opsin.api.model import BuildContext, Model, Pooling
from opsin.api.tools import ToolFormat
from opsin.api.weights import QuantizedWeight, WeightKind

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

API_MAJOR = 1
"""Plugins for another major live in another entry-point group and are reported, never imported."""

API_MINOR = 2
"""Counts compatible additions: a hook, an optional argument, a field with a default."""

ENTRY_POINT_GROUP = f"opsin.v{API_MAJOR}"
CHECKPOINT_GROUP = f"opsin.checkpoints.v{API_MAJOR}"
"""Installed checkpoints: entry-point name is the model id, its object returns the checkpoint's folder."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One architecture, as ``architectures[0]`` of config.json names it.

    Attributes:
        architecture: the key.
        build: builds the model; raises ValueError for a config.json it cannot follow.
        positions: (config, token ids, placed media) -> rotary positions; None: 0, 1, 2, ...
        default_chat_template: used when the checkpoint has none; config -> template (or None) where
            checkpoints of one architecture differ.
        content_format: how ``default_chat_template`` wants ``message["content"]``; None: found out from it.
        tool_format: config -> the form of tool calls it was trained with; None: it makes none. Since 1.1.
        tasks: what it can do: ``"generate"``, ``"embed"``.
        pooling: how the family's embedding models pool, unless the user says otherwise.
        default_limits: how many items of a modality one prompt may hold unless
            ``limit_mm_per_prompt`` says otherwise; a modality not named is unlimited.
        max_len: config -> longest context; None: ``max_position_embeddings``.
        stop_tokens: tokens that end an answer of this family, for checkpoints whose own settings do not
            name them all; those the tokenizer does not have are passed over.
        load_checkpoint: for other weight containers: folder -> (name, tensor) pairs; None: safetensors.
    """

    architecture: str
    build: Callable[[BuildContext], Model]
    positions: Callable[[Mapping[str, Any], Sequence[int], Sequence[PlacedMedia]], Positions] | None = None
    default_chat_template: str | Callable[[Mapping[str, Any]], str | None] | None = None
    content_format: Literal["openai", "string"] | None = None
    tasks: tuple[str, ...] = ("generate",)
    pooling: Pooling = field(default_factory=Pooling)
    default_limits: Mapping[Modality, int] = field(default_factory=dict)
    max_len: Callable[[Mapping[str, Any]], int] | None = None
    stop_tokens: tuple[str, ...] = ()
    load_checkpoint: Callable[[Path], Any] | None = None
    tool_format: Callable[[Mapping[str, Any]], ToolFormat | None] | None = None


@dataclass(frozen=True, kw_only=True)
class InputMapperSpec:
    """How one architecture takes one modality. Key: (architecture, modality).

    ``build`` returns None for a checkpoint that does not take the modality, where others of the same
    architecture do.
    """

    architecture: str
    modality: Modality
    build: Callable[[InputContext], InputMapper | None]


@dataclass(frozen=True, kw_only=True)
class PlaceholderSpec:
    """How one architecture writes one modality in a prompt. Key: (architecture, modality).

    ``build`` returns None where that of the `InputMapperSpec` does.
    """

    architecture: str
    modality: Modality
    build: Callable[[InputContext], Placeholder | None]


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """A kind of device. Key: name.

    Attributes:
        name: as in ``device="cpu"`` or ``device="cuda:1"`` (the index goes to ``open``).
        torch_type: torch's device type; a device that opens as another one is warned about. None: any.
        probe: never raises; imports what it must.
        open: index -> an opened device; raises ValueError for an index or a setting that cannot be.
        report: files for ``opsin doctor --report``, by name; never raises. None: there are none. Since 1.2.
    """

    name: str
    torch_type: str | None = None
    probe: Callable[[], Probe]
    open: Callable[[int], Device]
    report: Callable[[], Mapping[str, str | bytes]] | None = None


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """A device's own implementation of one op. Key: (device, op).

    Attributes:
        device: a `DeviceSpec` name.
        op: a name of the op table.
        load: imports and returns the kernel; its signature is the op's protocol in this module.
        supports: declines queries it cannot serve; they run on the reference, counted and shown.
        weights: of prepare_linear: the kinds of `WeightForm` besides the run dtype that ``supports`` knows
            about; it is never asked about others. Since 1.2.
        load_narrow: of prepare_linear: like ``load``, for weights of those kinds. Default: ``load``.
            Since 1.2.
    """

    device: str
    op: OpName
    load: Callable[[], Callable[..., Any]]
    supports: Callable[[KernelQuery], bool] = lambda query: True  # noqa: ARG005 (its name is the protocol's)
    weights: tuple[WeightKind, ...] = ()
    load_narrow: Callable[[], Callable[..., Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class StoredModule:
    """What a quantised checkpoint holds for one module, e.g. one linear layer. Since 1.2.

    Attributes:
        name: of the module, as in the checkpoint's keys.
        tensors: what stands in the key after the module's name -> tensor, in host memory, as it is stored.
        settings: ``quantization_config`` of config.json.
    """

    name: str
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class WeightFormatSpec:
    """How one method of quantisation stores weights. Key: method. Since 1.2.

    Attributes:
        method: ``quant_method`` of config.json's ``quantization_config``.
        suffixes: names of the tensors that it keeps for a module, besides what it leaves alone (a bias).
        marks: those of them by which a module is recognised as stored so; the rest is as in any checkpoint.
        decode: the tensors of one module -> its weight: what any layer takes as (N, K), or floats where
            integers cannot stand for it. Raises ValueError, with what is wrong, for tensors or settings it
            cannot follow.
    """

    method: str
    suffixes: tuple[str, ...]
    marks: tuple[str, ...]
    decode: Callable[[StoredModule], QuantizedWeight | Tensor]

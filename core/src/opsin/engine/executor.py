"""The wall between the engine and what computes its steps: one device, or several ranks, one of them here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from opsin.api import Device, MappedMedia, Modality, Model, TopK
from opsin.checkpoint.files import Checkpoint
from opsin.config import EngineConfig
from opsin.plugins import Plugins
from opsin.rank.leader import LeadingRank
from opsin.rank.local import Rank
from opsin.rank.sizing import Resolved
from opsin.rank.step import Embed, StepInput, StepOutput


class Executor(Protocol):
    """Computes steps. Tokens are embedded and sampled by the engine, on ``device``.

    Attributes:
        model: embeds tokens. `encode` and `compute` run the rest of it.
        device: where tensors of a step are.
        dtype: of embeddings and hidden states.
        top_k: searches rows of logits.
        resolved: sizes of the KV cache.
    """

    model: Model
    device: Device
    dtype: torch.dtype
    top_k: TopK
    resolved: Resolved

    @property
    def media_width(self) -> int:
        """Columns of what the model's encoder gives."""
        ...

    @property
    def weight_forms(self) -> Mapping[str, int]:
        """Form of weights -> linear layers that use it."""
        ...

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """Encode several items of one modality -> (E, H) each."""
        ...

    def compute(self, step: StepInput, embed: Embed) -> StepOutput:
        """Compute a step; see `opsin.rank.local.Rank.compute`."""
        ...

    def check(self) -> None:
        """Raise `DeviceLostError` if nothing more can be computed."""
        ...

    def close(self) -> None:
        """Release model and caches, and end processes."""
        ...


def open_executor(config: EngineConfig, checkpoint: Checkpoint, plugins: Plugins) -> Rank:
    """What a configuration asks for: an `Executor`.

    Raises:
        MissingPluginError, ConfigError, CheckpointError: as `opsin.rank.local.Rank`.
    """
    kind = Rank if config.tensor_parallel_size == 1 else LeadingRank
    return kind(config, checkpoint, plugins)

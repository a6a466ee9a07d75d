"""Models: what one is built from, what it computes in a step, how its embeddings are pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from opsin.api.kernels import Kernels, KVGeometry, KVLayer
from opsin.api.media import MappedMedia, Modality
from opsin.api.parallel import Parallel
from opsin.api.weights import Rounding

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What a model is built from. Building allocates nothing: core streams the weights in afterwards.

    Attributes:
        config: the checkpoint's config.json.
        kernels: layers bind their ops from it.
        dtype: run dtype of parameters and activations.
        device: torch device of weights and activations.
        parallel: tensor-parallel place.
        rounding: what may become of weights while they are loaded. Since 1.2.
    """

    config: Mapping[str, Any]
    kernels: Kernels
    dtype: torch.dtype
    device: str = "cpu"
    parallel: Parallel = field(default_factory=Parallel)
    rounding: Rounding = field(default_factory=Rounding)


@dataclass(frozen=True, kw_only=True)
class MediaFeatures:
    """What media say beyond their embeddings, for the tokens of a step that are media. Since 1.2.

    Attributes:
        rows: int64 (R,), which of the step's T tokens they are.
        features: (R, `WideMedia.media_width` - H), run dtype: of each, the columns of `Model.encode` after
            the first H.
    """

    rows: Tensor
    features: Tensor


@dataclass(frozen=True, kw_only=True)
class ForwardStep:
    """One flat token batch for `Model.forward`.

    Attributes:
        embeds: (T, H) input embeddings, media already in place.
        positions: int64 (A, T), or (A + 1, T) with the variants of `Positions.switch_lengths` last.
        kv: one cache layer per model layer.
        plan: the step's attention plan.
        media: further features of media tokens, for a model that is `WideMedia`; None: there are none in this
            step. Since 1.2.
    """

    embeds: Tensor
    positions: Tensor
    kv: Sequence[KVLayer]
    plan: Any
    media: MediaFeatures | None = None


class Model(Protocol):
    """A model. `opsin.layers` has the building blocks; it is an ``nn.Module``."""

    kv_geometry: KVGeometry
    hidden_size: int
    vocab_size: int

    def weight_name(self, key: str) -> str | None:
        """Checkpoint key -> name in this model's tree; None for a tensor that is not used."""
        ...

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """Encode several items of one modality in as few calls as the architecture allows -> (E, H) each."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 (T,) -> (T, H)."""
        ...

    def forward(self, step: ForwardStep) -> Tensor:
        """Hidden states after the final norm, (T, H)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, V)."""
        ...


@runtime_checkable
class WideMedia(Protocol):
    """What a `Model` may have besides: encoder outputs wider than its embeddings. Since 1.2.

    The first H columns of a row of `Model.encode` are the embedding of a token; the rest comes with
    `ForwardStep.media`, e.g. to be added to the hidden states after the first layers. Embeddings as input are
    as wide.
    """

    media_width: int
    """Columns of `Model.encode`, at least H."""


PoolingType = Literal["last", "mean", "cls"]
"""Which hidden state stands for a text: the last token's, the mean of all, or the first token's."""


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How an embedding is made of the hidden states after the final norm.

    Attributes:
        type: which of them.
        normalize: divide by the L2 norm.
    """

    type: PoolingType = "last"
    normalize: bool = True

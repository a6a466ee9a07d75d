"""What crosses the wall between the engine and what computes its steps: plain numbers in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepInput:
    """All that a rank needs of a step besides the embeddings: no sequences, no media, no texts.

    Attributes:
        positions: int64 (A, T), see `opsin.api.ForwardStep`.
        query_lens, context_lens, block_tables, slots: see `opsin.api.AttentionBatch`.
        logit_rows: of the T tokens, those whose logits are wanted, in this order.
        media_rows: of the T tokens, those that have further features, see `opsin.api.MediaFeatures`.
    """

    positions: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    slots: Sequence[int]
    logit_rows: Sequence[int]
    media_rows: Sequence[int] = ()

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.slots)


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step gave, the same on all ranks.

    Attributes:
        hidden: (T, H) after the final norm.
        logits: (rows wanted, V).
    """

    hidden: Tensor
    logits: Tensor

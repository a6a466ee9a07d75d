"""Hidden states -> one vector per prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.engine.sequence import Sequence
from opsin.errors import RequestError


def pool(sequence: Sequence, start: int, hidden: Tensor) -> Tensor | None:
    """Take the hidden states of a chunk; returns the embedding with the last one.

    Args:
        sequence: an embedding request's.
        start: index of the chunk's first token.
        hidden: (tokens, H) after the final norm.

    Returns:
        float32 (H,) or (dimensions,) in host memory; None if more chunks are to come.
    """
    assert sequence.pooling is not None
    end, before = start + len(hidden), sequence.pooled if start > 0 else None
    match sequence.pooling.type:
        case "last":
            pooled = hidden[-1].float()
        case "cls":
            pooled = hidden[0].float() if before is None else before
        case "mean":
            total = hidden.float().sum(0)
            pooled = total if before is None else before + total
    sequence.pooled = pooled
    if end < sequence.num_tokens:
        return None
    if sequence.pooling.type == "mean":
        pooled = pooled / end
    pooled = pooled[: sequence.dimensions]
    if not bool(torch.isfinite(pooled).all()):
        raise RequestError("the model gave an embedding that is not finite")
    return (F.normalize(pooled, dim=0) if sequence.pooling.normalize else pooled).cpu()

"""Hidden states -> one vector per prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.engine.sequence import Sequence
from opsin.errors import RequestError


def pool(sequence: Sequence, start: int, hidden: Tensor) -> tuple[Tensor, Tensor | RequestError | None]:
    """Pool the hidden states of a chunk with those before it. Changes nothing: a step may be tried again.

    Args:
        sequence: an embedding request's.
        start: index of the chunk's first token.
        hidden: (tokens, H) after the final norm.

    Returns:
        ``sequence.pooled`` after this chunk, float32 (H,); and with the last chunk the embedding, float32
        (H,) or (dimensions,) in host memory, or why there is none.
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
    if end < sequence.num_tokens:
        return pooled, None
    embedding = (pooled / end if sequence.pooling.type == "mean" else pooled)[: sequence.dimensions]
    if not bool(torch.isfinite(embedding).all()):
        return pooled, RequestError("the model gave an embedding that is not finite")
    return pooled, (F.normalize(embedding, dim=0) if sequence.pooling.normalize else embedding).cpu()

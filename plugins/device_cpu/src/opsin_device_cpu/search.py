"""The largest values of long rows: first among the maxima of blocks, then in the best blocks only.

torch's CPU argmax and topk are not vectorised along a row while its maximum is: on rows as long as a
vocabulary, finding the best blocks first is several times faster.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Width of the blocks whose maxima are searched before the elements."""


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`opsin.api.TopK`. The k blocks with the largest maxima contain the k largest values."""
    if k == 1:
        if x.shape[1] < 16 * BLOCK:
            values, best = x.max(-1, keepdim=True)
            return values, best
        blocks = _blocks(x)
        block = blocks.amax(-1).argmax(-1)
        values, offset = blocks[torch.arange(len(block)), block].max(-1)
        return values.unsqueeze(1), (block * BLOCK + offset).unsqueeze(1)
    if x.shape[1] < 4 * k * BLOCK:
        values, ids = x.topk(k, dim=-1)
        return values, ids
    blocks = _blocks(x)
    block_ids = blocks.amax(-1).topk(k, dim=-1, sorted=False).indices
    found = blocks.gather(1, block_ids.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
    values, places = found.topk(k, dim=-1)
    return values, block_ids.gather(1, places // BLOCK) * BLOCK + places % BLOCK


def _blocks(x: Tensor) -> Tensor:
    """(R, V) -> (R, blocks, BLOCK), filled up with -inf."""
    missing = -x.shape[1] % BLOCK
    filled = F.pad(x, (0, missing), value=-math.inf) if missing else x
    return filled.reshape(x.shape[0], -1, BLOCK)

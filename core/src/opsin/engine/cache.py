"""What is kept between steps: KV blocks (paged, shared by prefix) and encoder outputs (by content)."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from itertools import takewhile

from torch import Tensor

from opsin.engine.sequence import Sequence


def extend_block_keys(sequence: Sequence, block_size: int, root: bytes) -> list[bytes]:
    """Prefix-cache keys of all full blocks of a sequence; computes only those not known yet.

    A block's key covers everything its keys and values depend on: all earlier blocks (by their key), its
    token ids, and for every media item it touches the item's content key and the part that is inside.
    ``root`` stands for the model. The prompt's salt separates requests whose user wants it; the sequence's
    variant separates what is computed differently for its length.
    """
    keys = sequence.block_keys
    for index in range(len(keys), sequence.num_tokens // block_size):
        start, end = index * block_size, (index + 1) * block_size
        digest = hashlib.blake2b(keys[-1] if keys else _first_key(sequence, root), digest_size=16)
        digest.update(array("q", sequence.token_ids[start:end]).tobytes())
        for item in sequence.media:
            if item.start < end and item.end > start:
                digest.update(f"|{item.modality}|{item.key}|{start - item.start}".encode())
        keys.append(digest.digest())
    return keys


def _first_key(sequence: Sequence, root: bytes) -> bytes:
    # The salt is the user's: it comes last, so that it cannot pretend to be something else.
    return b"%b|%d|%b" % (root, sequence.variant, sequence.prompt.salt.encode())


class BlockPool:
    """Ownership of KV blocks. It knows ids and keys, never the memory.

    A block is *used* (referenced by one or more sequences) or *free*. A free block may still carry a key:
    its contents are valid and a later sequence with that prefix takes it back. Blocks without a key are
    given away first, then those that were freed longest ago.

    Attributes:
        queries: blocks looked up by prefix.
        hits: of these, blocks found.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self.queries = self.hits = 0

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks referenced by sequences."""
        return self.num_blocks - len(self._free)

    def find(self, keys: SequenceOf[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of ``keys``."""
        return [self._block_of[key] for key in takewhile(self._block_of.__contains__, keys)]

    def take(self, blocks: SequenceOf[int]) -> None:
        """Add a reference to each of the blocks, which `find` gave."""
        for block in blocks:
            self._references[block] += 1
            self._free.pop(block, None)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks with one reference each, or None if there are not that many."""
        if count > len(self._free):
            return None
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: SequenceOf[int]) -> None:
        """Drop one reference of each; the ends of prefixes become available before their beginnings."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def reset(self) -> bool:
        """Forget the keys of all blocks, unless one is in use. Returns whether it did."""
        if self.num_used:
            return False
        self._key_of.clear()
        self._block_of.clear()
        return True

    def register(self, block: int, key: bytes) -> None:
        """Make a used block's finished contents findable; the first block with a key keeps it."""
        assert self._references[block] > 0, f"block {block} registered while free"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key


class EncoderCache:
    """Encoder outputs by content key, under a byte budget.

    An entry is *reserved* when its encoding is scheduled and *stored* when it is done. Sequences pin the
    entries their next tokens need; what nobody pins is dropped when room is needed, least recently used
    first. An item larger than the whole budget is let in alone.

    Attributes:
        used_bytes: reserved and stored.
        queries: items that a step needed encoded.
        hits: of these, items that were already there or on their way.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self.used_bytes = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._outputs: dict[str, Tensor] = {}
        self._pins: dict[str, set[int]] = {}
        self.queries = self.hits = 0

    def reserve(self, key: str, num_bytes: int, seq_id: int) -> bool:
        """Pin an entry for a sequence, making room if it is new; False if pinned entries leave no room."""
        if key in self._sizes:
            if seq_id not in self._pins[key]:
                self.queries += 1
                self.hits += 1
            self._pins[key].add(seq_id)
            self._sizes.move_to_end(key)
            return True
        for other in list(self._sizes):
            if self.used_bytes + num_bytes <= self._budget:
                break
            if not self._pins[other]:
                self.drop(other)
        if self.used_bytes + num_bytes > self._budget and self._sizes:
            return False
        self.queries += 1
        self._sizes[key] = num_bytes
        self._pins[key] = {seq_id}
        self.used_bytes += num_bytes
        return True

    def store(self, key: str, output: Tensor) -> None:
        """Fill a reserved entry."""
        assert key in self._sizes, "only reserved entries are stored"
        self._outputs[key] = output

    def get(self, key: str) -> Tensor | None:
        """The output (E, H), None if it is not encoded yet."""
        return self._outputs.get(key)

    def release(self, seq_id: int, keys: SequenceOf[str]) -> None:
        """Remove a sequence's pins; entries that were never filled go with their last pin."""
        for key in keys:
            pins = self._pins.get(key)
            if pins is not None and seq_id in pins:
                pins.remove(seq_id)
                if not pins and key not in self._outputs:
                    self.drop(key)

    def drop(self, key: str) -> None:
        """Forget an entry."""
        self.used_bytes -= self._sizes.pop(key)
        del self._pins[key]
        self._outputs.pop(key, None)

"""Waiting and running sequences + budgets -> the next step; and the step's results -> their state.

There is no prefill and no decode phase: every sequence has tokens that are not computed yet, one in steady
decoding, many after arrival or preemption, and a step computes some of them. What is left of a step's budgets
may go to drafts, which are computed as if they were tokens of their sequence.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from itertools import takewhile

from opsin.api import PlacedMedia
from opsin.engine.cache import BlockPool, EncoderCache, extend_block_keys
from opsin.engine.sequence import Sequence, Status
from opsin.engine.speculation import MAX_STEP_DRAFTS, Drafter

MIN_SHARED_TOKENS = 64
"""Tokens that a request must save to wait for a prefix that another one is computing. To compute fewer again
alongside the others costs less than the wait."""


@dataclass(frozen=True)
class Chunk:
    """The tokens ``start .. start + length`` of one sequence, computed in one step.

    Attributes:
        draft: guesses at the tokens after the sequence's last one; they are the chunk's last tokens.
    """

    sequence: Sequence
    start: int
    length: int
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Index after the last token."""
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that new ones are sampled."""
        return self.end - len(self.draft) == self.sequence.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """What is computed."""
        return [*self.sequence.token_ids[self.start : self.end], *self.draft]

    def media(self) -> list[PlacedMedia]:
        """Media whose tokens are (partly) in the chunk."""
        return [item for item in self.sequence.media if item.start < self.end and item.end > self.start]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One flat batch.

    Attributes:
        chunks: in batch order.
        encode: media to encode first, each once.
    """

    chunks: tuple[Chunk, ...]
    encode: tuple[PlacedMedia, ...] = ()


@dataclass
class _Budget:
    """What is left of one step's limits, and the media to encode in it, by key."""

    tokens: int
    encoder: int
    encode: dict[str, PlacedMedia] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Scheduler:
    """Decides what runs next. Owns all sequences, the KV blocks and the encoder cache's pins.

    Attributes:
        embed_bytes: size of one media embedding.
        root_key: identifies the model.
        drafter: makes drafts; None: there are none.
        waiting: the next one first: by priority, then by arrival.
        running: by priority, then by admission: the last one is the first to be preempted.
        num_preemptions: sequences preempted for want of blocks, so far.
        num_restarts: sequences computed again because their variant changed, so far.
    """

    blocks: BlockPool
    encoder_cache: EncoderCache
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_encoder_tokens: int
    embed_bytes: int
    prefix_caching: bool = True
    root_key: bytes = b""
    drafter: Drafter | None = None
    waiting: list[Sequence] = field(default_factory=list, init=False)
    running: list[Sequence] = field(default_factory=list, init=False)
    num_preemptions: int = field(default=0, init=False)
    num_restarts: int = field(default=0, init=False)
    _in_flight: dict[bytes, int] = field(default_factory=dict, init=False)
    """Block key -> id of the running sequence that computes it."""

    # ---- arrival and departure ----------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        insort(self.waiting, sequence, key=_turn)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and give back all it holds."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    # ---- a step -------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """The next step; empty only if nothing is unfinished."""
        budget = _Budget(self.max_num_batched_tokens, self.max_encoder_tokens)
        chunks, preempted = self._continue_running(budget)
        if not preempted:
            chunks += self._admit_waiting(budget)
            chunks = self._with_drafts(chunks, budget)
        return Step(chunks=tuple(chunks), encode=tuple(budget.encode.values()))

    def commit(self, step: Step, sampled: Mapping[int, SequenceOf[int]]) -> None:
        """Record that a step is done.

        Sequences that were removed in the meantime are skipped.

        Args:
            step: the last one.
            sampled: sequence id -> its new tokens. All but the last are the beginning of its draft.
        """
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence.status is not Status.RUNNING:
                continue
            tokens = sampled.get(sequence.seq_id, ())
            if chunk.draft and self.drafter is not None:
                self.drafter.learn(sequence, chunk.draft, tokens)
            sequence.token_ids += tokens[:-1]
            # What was computed beyond is a wrong guess; its place is written again.
            sequence.num_computed = min(chunk.end, sequence.num_tokens)
            self._publish_blocks(sequence, chunk.start)
            self._trim(sequence)
            passed = [item.key for item in sequence.media if item.end <= sequence.num_computed]
            self.encoder_cache.release(sequence.seq_id, passed)
            if tokens:
                variant = sequence.variant
                sequence.token_ids.append(tokens[-1])
                if sequence.variant != variant:  # none of its keys and values hold any longer
                    self._send_back(sequence)
                    sequence.block_keys.clear()
                    self.num_restarts += 1

    # ---- parts of schedule --------------------------------------------------------------------

    def _continue_running(self, budget: _Budget) -> tuple[list[Chunk], bool]:
        chunks: list[Chunk] = []
        preempted = False
        index = 0
        while index < len(self.running) and budget.tokens > 0:
            sequence = self.running[index]
            length = self._chunk_length(sequence, budget)
            if length == 0:  # its next picture waits for room in the encoder cache
                index += 1
                continue
            while not self._grow(sequence, sequence.num_computed + length):
                victim = self.running[-1]
                self._send_back(victim)
                victim.num_preemptions += 1
                self.num_preemptions += 1
                preempted = True
                if victim is sequence:
                    break
            else:
                chunks.append(self._chunk(sequence, length, budget))
                index += 1
        return chunks, preempted

    def _admit_waiting(self, budget: _Budget) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self.waiting):
            if budget.tokens <= 0 or len(self.running) >= self.max_num_seqs:
                break
            cached = self._cached_blocks(sequence)
            if cached is None:
                continue  # a running sequence is computing its prefix
            self.blocks.take(cached)
            sequence.block_ids = list(cached)
            sequence.num_computed = len(cached) * self.block_size
            length = self._chunk_length(sequence, budget)
            # Room for all its tokens, not only for this chunk: a sequence that soon preempts another one is
            # not worth admitting.
            missing = self._blocks_for(sequence.num_tokens) - len(cached)
            fits = missing <= self.blocks.num_free or not self.running
            if length == 0 or not fits or not self._grow(sequence, sequence.num_computed + length):
                self._release(sequence)
                break
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=lambda other: other.priority)
            sequence.status = Status.RUNNING
            sequence.num_cached = sequence.num_computed
            self.blocks.queries += (sequence.num_tokens - 1) // self.block_size
            self.blocks.hits += len(cached)
            self._announce(sequence)
            chunks.append(self._chunk(sequence, length, budget))
        return chunks

    def _with_drafts(self, chunks: list[Chunk], budget: _Budget) -> list[Chunk]:
        """The chunks with drafts, as far as there is room left: no other work gives way to a guess."""
        if self.drafter is None:
            return chunks
        num_rows = sum(chunk.samples for chunk in chunks)
        tokens = min(budget.tokens, MAX_STEP_DRAFTS)
        drafted: list[Chunk] = []
        for chunk in chunks:
            sequence = chunk.sequence
            blocks = len(sequence.block_ids) + self.blocks.num_free
            room = min(tokens, blocks * self.block_size - chunk.end)
            draft = self.drafter.draft(sequence, num_rows, room) if chunk.samples else ()
            if draft:
                chunk = replace(chunk, length=chunk.length + len(draft), draft=draft)
                self._grow(sequence, chunk.end)
                tokens -= len(draft)
            drafted.append(chunk)
        return drafted

    def _chunk(self, sequence: Sequence, length: int, budget: _Budget) -> Chunk:
        chunk = Chunk(sequence, sequence.num_computed, length)
        budget.tokens -= length
        for item in chunk.media():
            if self._to_encode(item, budget):
                budget.encoder -= item.mapped.num_embeds
                budget.encode[item.key] = item
        return chunk

    def _chunk_length(self, sequence: Sequence, budget: _Budget) -> int:
        """How many tokens the budgets allow, up to the first media item that cannot be encoded now."""
        length = min(sequence.num_remaining, budget.tokens)
        encoder = budget.encoder
        for item in Chunk(sequence, sequence.num_computed, length).media():
            if item.mapped.embeds is not None:
                continue
            cost = item.mapped.num_embeds if self._to_encode(item, budget) else 0
            affordable = cost <= encoder or encoder == self.max_encoder_tokens
            if not affordable or not self.encoder_cache.reserve(
                item.key, item.mapped.num_embeds * self.embed_bytes, sequence.seq_id
            ):
                return max(0, item.start - sequence.num_computed)
            encoder -= cost
        return length

    def _to_encode(self, item: PlacedMedia, budget: _Budget) -> bool:
        known = item.mapped.embeds is not None or self.encoder_cache.get(item.key) is not None
        return not known and item.key not in budget.encode

    # ---- blocks -------------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = self._blocks_for(num_tokens) - len(sequence.block_ids)
        if missing <= 0:
            return True
        blocks = self.blocks.allocate(missing)
        if blocks is None:
            return False
        sequence.block_ids.extend(blocks)
        return True

    def _cached_blocks(self, sequence: Sequence) -> list[int] | None:
        """Cached blocks of the sequence's prefix; None if waiting for a running sequence pays."""
        if not self.prefix_caching or _needs_whole_prompt(sequence):
            return []
        # The last token is always computed: its logits are needed.
        usable = (sequence.num_tokens - 1) // self.block_size
        keys = self._keys(sequence)[:usable]
        found = self.blocks.find(keys)
        num_coming = sum(1 for _ in takewhile(self._in_flight.__contains__, keys[len(found) :]))
        return found if num_coming * self.block_size < MIN_SHARED_TOKENS else None

    def _keys(self, sequence: Sequence) -> list[bytes]:
        return extend_block_keys(sequence, self.block_size, self.root_key) if self.prefix_caching else []

    def _announce(self, sequence: Sequence) -> None:
        for key in self._keys(sequence)[sequence.num_computed // self.block_size :]:
            self._in_flight.setdefault(key, sequence.seq_id)

    def _trim(self, sequence: Sequence) -> None:
        """Give back the blocks of wrong guesses."""
        kept = self._blocks_for(sequence.num_computed)
        self.blocks.release(sequence.block_ids[kept:])
        del sequence.block_ids[kept:]

    def _publish_blocks(self, sequence: Sequence, start: int) -> None:
        first, last = start // self.block_size, sequence.num_computed // self.block_size
        if first < last:
            for block, key in zip(sequence.block_ids[first:last], self._keys(sequence)[first:last]):
                self.blocks.register(block, key)
                self._withdraw(sequence, key)

    def _withdraw(self, sequence: Sequence, key: bytes) -> None:
        if self._in_flight.get(key) == sequence.seq_id:
            del self._in_flight[key]

    def _send_back(self, sequence: Sequence) -> None:
        """Give back everything; the sequence is computed again, from the prefix cache where it can be."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_turn)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = 0
        for key in sequence.block_keys:
            self._withdraw(sequence, key)
        self.encoder_cache.release(sequence.seq_id, [item.key for item in sequence.media])


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.seq_id


def _needs_whole_prompt(sequence: Sequence) -> bool:
    """Whether hidden states are needed of tokens other than the last: the prefix cache has none."""
    if sequence.pooling is not None:
        return sequence.pooling.type != "last"
    return sequence.params.prompt_logprobs is not None and sequence.index == 0

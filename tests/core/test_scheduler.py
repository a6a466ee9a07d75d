"""The scheduler and the caches against a simulated device memory that knows what each slot should hold."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.api import MappedMedia, PlacedMedia, Positions, ProcessedPrompt
from opsin.config import SpeculativeConfig
from opsin.engine.cache import BlockPool, EncoderCache
from opsin.engine.scheduler import Chunk, Scheduler, Step
from opsin.engine.sequence import Sequence, Status
from opsin.engine.speculation import Drafter
from opsin.params import SamplingParams

BLOCK = 4
EMBED_BYTES = 8


def media_item(key: str, start: int, length: int) -> PlacedMedia:
    return PlacedMedia(
        modality="image",
        key=key,
        mapped=MappedMedia(num_embeds=length),
        start=start,
        is_embed=[True] * length,
    )


def make_sequence(
    seq_id: int,
    token_ids: list[int],
    *,
    max_tokens: int = 3,
    media: tuple[PlacedMedia, ...] = (),
    salt: str = "",
    params: SamplingParams | None = None,
    switch_lengths: tuple[int, ...] = (),
    priority: int = 0,
) -> Sequence:
    positions = Positions(prompt=np.arange(len(token_ids))[None], switch_lengths=switch_lengths)
    return Sequence(
        seq_id=seq_id,
        request_id=str(seq_id),
        index=0,
        prompt=ProcessedPrompt(token_ids=token_ids, media=media, salt=salt, positions=positions),
        params=params or SamplingParams(max_tokens=max_tokens, priority=priority),
    )


def content(sequence: Sequence, position: int, draft: SequenceOf[int] = ()) -> tuple[object, ...]:
    """What the cache must hold for a token: everything its keys and values depend on."""
    media = tuple((item.key, item.start) for item in sequence.media if item.start <= position)
    token_ids = [*sequence.token_ids, *draft]
    return (sequence.prompt.salt, sequence.variant, tuple(token_ids[: position + 1]), media)


def next_token(num_tokens: int) -> int:
    """What follows so many tokens."""
    return 1000 + num_tokens


class Guesser(Drafter):
    """Guesses rightly by chance, as often as ``skill`` says."""

    def __init__(self, num_speculative_tokens: int, skill: float, seed: int = 0) -> None:
        config = SpeculativeConfig(num_speculative_tokens=num_speculative_tokens)
        super().__init__(config, max_len=10_000)
        self._skill = skill
        self._chance = random.Random(seed)

    def guess(self, sequence: Sequence, count: int) -> list[int]:
        return [
            next_token(sequence.num_tokens + i) if self._chance.random() < self._skill else 5
            for i in range(count)
        ]


@dataclass
class Machine:
    """Runs steps on simulated memory and checks every promise of the scheduler."""

    num_blocks: int
    max_num_seqs: int = 4
    max_tokens: int = 16
    max_encoder_tokens: int = 16
    encoder_bytes: int = 16 * EMBED_BYTES
    prefix_caching: bool = True
    drafter: Drafter | None = None
    memory: dict[int, tuple[object, ...]] = field(default_factory=dict)
    num_computed: int = 0
    num_encoded: int = 0
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            blocks=BlockPool(self.num_blocks),
            encoder_cache=EncoderCache(self.encoder_bytes),
            block_size=BLOCK,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_tokens,
            max_encoder_tokens=self.max_encoder_tokens,
            embed_bytes=EMBED_BYTES,
            prefix_caching=self.prefix_caching,
            drafter=self.drafter,
        )

    def step(self) -> Step:
        scheduler = self.scheduler
        step = scheduler.schedule()
        self.num_steps += 1
        assert sum(chunk.length for chunk in step.chunks) <= self.max_tokens
        assert len(scheduler.running) <= self.max_num_seqs
        assert len({chunk.sequence.seq_id for chunk in step.chunks}) == len(step.chunks)
        self._encode(step)
        held: dict[int, int] = {}
        for sequence in scheduler.running:
            assert len(set(sequence.block_ids)) == len(sequence.block_ids)
            for block in sequence.block_ids:
                held[block] = held.get(block, 0) + 1
        assert len(held) == scheduler.blocks.num_used
        for chunk in step.chunks:
            sequence = chunk.sequence
            assert chunk.length > 0
            assert chunk.start == sequence.num_computed
            slots = [sequence.block_ids[i // BLOCK] * BLOCK + i % BLOCK for i in range(chunk.end)]
            for position in range(chunk.start):
                assert self.memory[slots[position]] == content(sequence, position), "a wrong cached block"
            for position in range(chunk.start, chunk.end):
                assert held[slots[position] // BLOCK] == 1, "a shared block is written"
                self.memory[slots[position]] = content(sequence, position, chunk.draft)
            assert len(sequence.block_ids) == -(-chunk.end // BLOCK), "blocks that nothing is written to"
            self.num_computed += chunk.length
            for item in chunk.media():
                assert scheduler.encoder_cache.get(item.key) is not None, "media are not encoded in time"
        scheduler.commit(step, {chunk.sequence.seq_id: self._sample(chunk) for chunk in step.chunks})
        for chunk in step.chunks:
            sequence = chunk.sequence
            expected = [next_token(n) for n in range(sequence.num_prompt, sequence.num_tokens)]
            assert sequence.output_ids == expected, "a wrong guess is kept"
            if sequence.status is Status.RUNNING:
                assert len(sequence.block_ids) == -(-sequence.num_computed // BLOCK), (
                    "blocks of wrong guesses"
                )
            assert sequence.num_output <= (sequence.params.max_tokens or 0), "beyond the limit"
            if sequence.num_output == (sequence.params.max_tokens or 0):
                scheduler.remove(sequence)
        return step

    def _sample(self, chunk: Chunk) -> list[int]:
        """The draft's tokens as far as they are right, and one more."""
        if not chunk.samples:
            assert not chunk.draft, "a guess at tokens that are known"
            return []
        sequence = chunk.sequence
        after = sequence.num_tokens + len(chunk.draft)
        switches = sequence.prompt.positions.switch_lengths if sequence.prompt.positions else ()
        assert not any(sequence.num_tokens <= length < after for length in switches), (
            "two variants in a chunk"
        )
        run = [next_token(sequence.num_tokens)]
        for guess in chunk.draft:
            if guess != run[-1]:
                break
            run.append(next_token(sequence.num_tokens + len(run)))
        return run

    def _encode(self, step: Step) -> None:
        cache = self.scheduler.encoder_cache
        sizes = [item.mapped.num_embeds for item in step.encode]
        assert len({item.key for item in step.encode}) == len(step.encode)
        assert sum(sizes) <= self.max_encoder_tokens or len(sizes) == 1
        for item in step.encode:
            assert cache.get(item.key) is None, "encoded twice"
            cache.store(item.key, torch.zeros(1))
            self.num_encoded += 1
        assert cache.used_bytes <= self.encoder_bytes or len(cache._sizes) == 1

    def finish(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not (self.scheduler.waiting or self.scheduler.running):
                break
            self.step()
        assert self.scheduler.waiting + self.scheduler.running == [], "not all requests end"
        assert self.scheduler.blocks.num_used == 0, "blocks leak"
        assert not self.scheduler._in_flight, "a finished sequence is waited for"
        assert not any(self.scheduler.encoder_cache._pins.values()), "pins leak"


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], tuple[PlacedMedia, ...], str]:
    """Prompts from few pieces, so that prefixes and pictures repeat."""
    token_ids: list[int] = []
    media = []
    for piece in draw(
        st.lists(st.sampled_from(["a", "bb", "ccc", "image", "IMAGE"]), min_size=1, max_size=6)
    ):
        if piece.lower() == "image":
            length = 5 if piece == "image" else 13
            key = draw(st.sampled_from(["cat", "dog"])) + str(length)
            media.append(media_item(key, len(token_ids), length))
            token_ids += [7] * length
        else:
            token_ids += [ord(piece[0])] * (len(piece) * 3)
    return token_ids, tuple(media), draw(st.sampled_from(["", "", "salt"]))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_loads_keep_every_promise(data: st.DataObject) -> None:
    longest = 6 * 13 + 12
    machine = Machine(
        num_blocks=data.draw(st.integers(-(-longest // BLOCK), 60), "blocks"),
        max_num_seqs=data.draw(st.integers(1, 6), "seqs"),
        max_tokens=data.draw(st.integers(1, 40), "tokens"),
        max_encoder_tokens=data.draw(st.integers(1, 40), "encoder tokens"),
        encoder_bytes=data.draw(st.integers(1, 40), "encoder room") * EMBED_BYTES,
        prefix_caching=data.draw(st.booleans(), "prefix caching"),
        drafter=data.draw(
            st.none()
            | st.builds(
                Guesser, st.integers(1, 9), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(0, 2**32)
            ),
            "drafter",
        ),
    )
    switch_lengths = data.draw(st.sampled_from([(), (), (12,), (17, 21)]), "switch lengths")
    priorities = data.draw(st.sampled_from([(0,), (0, 1, -5)]), "priorities")
    sequences: list[Sequence] = []
    for _ in range(data.draw(st.integers(1, 30), "events")):
        event = data.draw(st.sampled_from(["add", "add", "step", "step", "abort"]))
        if event == "add":
            token_ids, media, salt = data.draw(prompts())
            sequence = make_sequence(
                len(sequences),
                token_ids,
                media=media,
                salt=salt,
                max_tokens=data.draw(st.integers(1, 12)),
                switch_lengths=switch_lengths,
                priority=data.draw(st.sampled_from(priorities)),
            )
            sequences.append(sequence)
            machine.scheduler.add(sequence)
        elif event == "step":
            machine.step()
        elif sequences:
            victim = data.draw(st.sampled_from(sequences))
            machine.scheduler.remove(victim)
    machine.finish()
    assert all(sequence.status is Status.FINISHED for sequence in sequences)


def test_long_prompts_are_computed_in_chunks_beside_decodes() -> None:
    machine = Machine(num_blocks=40, max_tokens=8)
    first = make_sequence(0, list(range(4)), max_tokens=8)
    machine.scheduler.add(first)
    machine.step()
    machine.scheduler.add(make_sequence(1, list(range(100, 130)), max_tokens=1))
    step = machine.step()
    assert [(chunk.sequence.seq_id, chunk.length) for chunk in step.chunks] == [(0, 1), (1, 7)]
    machine.finish()


def test_a_finished_prefix_is_not_computed_again() -> None:
    machine = Machine(num_blocks=40, max_tokens=64)
    prompt = list(range(20))
    machine.scheduler.add(make_sequence(0, prompt, max_tokens=1))
    machine.finish()
    machine.num_computed = 0
    machine.scheduler.add(make_sequence(1, [*prompt[:17], 99, 98], max_tokens=1))
    machine.finish()
    assert machine.num_computed == 3, "16 of 19 tokens come from the cache"


def test_the_last_token_of_a_known_prompt_is_computed() -> None:
    machine = Machine(num_blocks=40, max_tokens=64)
    for seq_id in range(2):
        machine.num_computed = 0
        machine.scheduler.add(make_sequence(seq_id, list(range(16)), max_tokens=1))
        machine.finish()
    assert machine.num_computed == 4, "the last block, for the logits of its last token"


def test_requests_wait_for_a_long_prefix_that_is_being_computed() -> None:
    machine = Machine(num_blocks=400, max_tokens=50, max_num_seqs=8)
    shared = list(range(100))
    for seq_id in range(8):
        machine.scheduler.add(make_sequence(seq_id, [*shared, 200 + seq_id, 7], max_tokens=2))
    machine.finish()
    alone = 102 + 1
    others = 7 * (2 + 1)
    assert machine.num_computed == alone + others, "the prefix is computed once, in flight"


def test_a_waiting_request_goes_on_when_the_one_it_waits_for_is_aborted() -> None:
    machine = Machine(num_blocks=400, max_tokens=20)
    shared = list(range(100))
    owner = make_sequence(0, shared, max_tokens=1)
    machine.scheduler.add(owner)
    machine.scheduler.add(make_sequence(1, [*shared, 5], max_tokens=1))
    machine.step()
    assert [s.seq_id for s in machine.scheduler.running] == [0]
    machine.scheduler.remove(owner)
    machine.finish()


def test_equal_tokens_with_other_pictures_share_nothing() -> None:
    machine = Machine(num_blocks=40, max_tokens=64, encoder_bytes=1000)
    for seq_id, key in enumerate(["cat", "dog"]):
        machine.num_computed = 0
        media = (media_item(key, 2, 8),)
        machine.scheduler.add(make_sequence(seq_id, [1, 2, *[7] * 8, 3, 4], media=media, max_tokens=1))
        machine.finish()
        assert machine.num_computed == 12
    assert machine.num_encoded == 2


def test_one_picture_of_many_requests_is_encoded_once() -> None:
    machine = Machine(num_blocks=100, max_tokens=64, max_num_seqs=8, encoder_bytes=1000)
    for seq_id in range(6):
        media = (media_item("cat", 1, 8),)
        machine.scheduler.add(make_sequence(seq_id, [50 + seq_id, *[7] * 8, 3], media=media, max_tokens=2))
    machine.finish()
    assert machine.num_encoded == 1


def test_salt_separates() -> None:
    machine = Machine(num_blocks=40, max_tokens=64)
    for seq_id, salt in enumerate(["", "mine"]):
        machine.num_computed = 0
        machine.scheduler.add(make_sequence(seq_id, list(range(12)), salt=salt, max_tokens=1))
        machine.finish()
        assert machine.num_computed == 12


def test_a_sequence_that_outgrows_its_variant_is_computed_again_once() -> None:
    machine = Machine(num_blocks=40, max_tokens=64)
    machine.scheduler.add(make_sequence(0, list(range(10)), max_tokens=6, switch_lengths=(12,)))
    machine.finish()
    assert machine.scheduler.num_restarts == 1
    assert machine.num_computed == (10 + 2) + (13 + 2), "up to 12 tokens, then from the first to the 15th"
    assert machine.scheduler.num_preemptions == 0


def test_sequences_of_different_variants_share_no_blocks() -> None:
    machine = Machine(num_blocks=40, max_tokens=64)
    prompt = list(range(24))
    for seq_id, (length, computed) in enumerate([(24, 24), (20, 20), (23, 3), (19, 3)]):
        machine.num_computed = 0
        machine.scheduler.add(make_sequence(seq_id, prompt[:length], max_tokens=1, switch_lengths=(20,)))
        machine.finish()
        assert machine.num_computed == computed, f"{length} tokens"
    assert machine.scheduler.num_restarts == 1, "the sequence of 20 whose answer was its 21st token"


def test_without_room_the_latest_sequence_is_preempted_and_still_ends() -> None:
    machine = Machine(num_blocks=6, max_tokens=64, prefix_caching=False)
    early, late = (make_sequence(i, [i] * 8, max_tokens=14) for i in range(2))
    machine.scheduler.add(early)
    machine.scheduler.add(late)
    machine.finish()
    assert early.num_preemptions == 0
    assert late.num_preemptions > 0
    assert early.num_tokens == late.num_tokens == 22


def test_priority_comes_before_arrival() -> None:
    machine = Machine(num_blocks=40, max_tokens=64, max_num_seqs=1)
    sequences = [make_sequence(i, [i] * 8, priority=p) for i, p in enumerate((0, 5, -1, 5, -1))]
    for sequence in sequences:
        machine.scheduler.add(sequence)
    order: list[int] = []
    while machine.scheduler.waiting or machine.scheduler.running:
        order += [chunk.sequence.seq_id for chunk in machine.step().chunks]
    assert list(dict.fromkeys(order)) == [2, 4, 0, 1, 3]


def test_without_room_the_least_urgent_sequence_is_preempted() -> None:
    machine = Machine(num_blocks=6, max_tokens=64, prefix_caching=False)
    early = make_sequence(0, [0] * 8, max_tokens=14, priority=1)
    late = make_sequence(1, [1] * 8, max_tokens=14)
    machine.scheduler.add(early)
    machine.step()
    machine.scheduler.add(late)
    machine.finish()
    assert late.num_preemptions == 0
    assert early.num_preemptions > 0
    assert early.num_tokens == late.num_tokens == 22


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    machine = Machine(num_blocks=40, max_tokens=64)
    for seq_id in range(2):
        machine.num_computed = 0
        params = SamplingParams(max_tokens=1, prompt_logprobs=1)
        machine.scheduler.add(make_sequence(seq_id, list(range(16)), params=params, max_tokens=1))
        machine.finish()
        assert machine.num_computed == 16


def test_right_guesses_save_steps_and_wrong_ones_cost_none() -> None:
    steps = {}
    for skill in (0.0, 1.0):
        machine = Machine(num_blocks=40, max_tokens=64, drafter=Guesser(8, skill))
        machine.scheduler.add(make_sequence(0, list(range(10)), max_tokens=40))
        machine.finish()
        steps[skill] = machine.num_steps
    assert steps[0.0] == 40
    assert steps[1.0] <= 40 / 4


def test_guesses_push_nobody_out_and_take_nobodys_tokens() -> None:
    for max_tokens, num_blocks in ((64, 6), (3, 40)):
        plain, guessing = (
            Machine(num_blocks=num_blocks, max_tokens=max_tokens, prefix_caching=False, drafter=drafter)
            for drafter in (None, Guesser(8, 0.0))
        )
        for machine in (plain, guessing):
            for seq_id in range(3):
                machine.scheduler.add(make_sequence(seq_id, [seq_id] * 4, max_tokens=8))
            machine.finish()
        assert guessing.scheduler.num_preemptions == plain.scheduler.num_preemptions
        assert guessing.num_steps == plain.num_steps

"""Step -> embeddings -> what the executor computes -> tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from traceback import format_exc
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from opsin.api import Modality, PlacedMedia
from opsin.engine.cache import EncoderCache
from opsin.engine.executor import Executor
from opsin.engine.pooling import pool
from opsin.engine.sampler import prompt_logprobs
from opsin.engine.scheduler import Chunk, Step
from opsin.engine.sequence import SampledToken
from opsin.engine.speculation import sample_runs
from opsin.errors import DeviceLostError, RequestError
from opsin.rank.step import StepInput

T = TypeVar("T")

_Rows = np.ndarray[tuple[int], np.dtype[np.intp]]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StepTokens:
    """What a step gave.

    Attributes:
        sampled: sequence id -> its new tokens: those of its draft that were right, and one more.
        prompt_logprobs: sequence id -> (index of the first prompt token described, one per token).
        embeddings: sequence id -> its embedding, for embedding requests that are complete.
        errors: sequence id -> why this sequence, and only this one, could not be computed.
    """

    sampled: dict[int, list[SampledToken]] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[int, list[SampledToken]]] = field(default_factory=dict)
    embeddings: dict[int, Tensor] = field(default_factory=dict)
    errors: dict[int, RequestError] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Runner:
    """Runs steps: encodes media, places embeddings, has the step computed, samples.

    Attributes:
        executor: computes what needs the language model.
        num_encoded: media items encoded so far.
    """

    executor: Executor
    encoder_cache: EncoderCache
    num_encoded: int = 0

    def __post_init__(self) -> None:
        self._model = self.executor.model
        self._device = self.executor.device.torch_device
        self._block_size = self.executor.resolved.block_size

    @torch.inference_mode()
    def run(self, step: Step) -> StepTokens:
        """Compute a step. An item or a sequence that cannot be computed fails alone.

        Raises:
            DeviceLostError: the device is gone.
        """
        result = StepTokens()
        failed = self._encode(step.encode)
        chunks = []
        for chunk in step.chunks:
            error = next((failed[item.key] for item in chunk.media() if item.key in failed), None)
            if error is None:
                chunks.append(chunk)
            else:
                result.errors[chunk.sequence.seq_id] = error
        # A second attempt writes the same keys and values again, which is harmless.
        for chunk, error in _isolate(partial(self._compute, result), chunks, "computing this request failed"):
            result.errors[chunk.sequence.seq_id] = error
        return result

    # ---- media --------------------------------------------------------------------------------

    def _encode(self, items: SequenceOf[PlacedMedia]) -> dict[str, RequestError]:
        failed: dict[str, RequestError] = {}
        for modality in dict.fromkeys(item.modality for item in items):
            group = [item for item in items if item.modality == modality]
            work = partial(self._encode_group, modality)
            for item, error in _isolate(work, group, f"the {modality} could not be encoded"):
                failed[item.key] = error
        return failed

    def _encode_group(self, modality: Modality, items: SequenceOf[PlacedMedia]) -> None:
        outputs = self.executor.encode(modality, [item.mapped for item in items])
        for item, output in zip(items, outputs, strict=True):
            expected = (item.mapped.num_embeds, self.executor.media_width)
            if tuple(output.shape) != expected:
                raise RequestError(
                    f"the encoder gave {tuple(output.shape)} for one {modality}, expected {expected}"
                )
            # A copy of its own: a view would keep the whole group's output alive.
            self.encoder_cache.store(item.key, output.clone() if len(items) > 1 else output)
            self.num_encoded += 1

    # ---- tokens -------------------------------------------------------------------------------

    def _compute(self, result: StepTokens, chunks: SequenceOf[Chunk]) -> None:
        first_rows = list(accumulate((chunk.length for chunk in chunks[:-1]), initial=0))
        placed = list(zip(first_rows, chunks))
        media = [self._rows(item, chunk, first_row) for first_row, chunk in placed for item in chunk.media()]
        wide = [found for found, features in media if features.shape[1] > self._model.hidden_size]
        described = [(chunk, targets) for chunk in chunks if (targets := _described(chunk))]
        asked = [chunk for chunk in chunks if chunk.samples and chunk.sequence.pooling is None]
        row_of = {id(chunk): row for row, chunk in placed}
        ends = [(chunk, row_of[id(chunk)] + chunk.length) for chunk in asked]
        rows = [row_of[id(chunk)] + i for chunk, targets in described for i in range(len(targets))]
        num_described = len(rows)
        rows += [row for chunk, end in ends for row in range(end - len(chunk.draft) - 1, end)]
        output = self.executor.compute(
            StepInput(
                token_ids=[token for chunk in chunks for token in chunk.token_ids],
                positions=np.concatenate([_positions(chunk) for chunk in chunks], axis=1),
                query_lens=[chunk.length for chunk in chunks],
                context_lens=[chunk.end for chunk in chunks],
                block_tables=[chunk.sequence.block_ids for chunk in chunks],
                slots=self._slots(chunks),
                logit_rows=rows,
                media_rows=[row for found in wide for row in found.tolist()],
            ),
            partial(self._embeds, media),
        )
        pooled = [
            (chunk.sequence, *pool(chunk.sequence, chunk.start, output.hidden[row : row + chunk.length]))
            for row, chunk in placed
            if chunk.sequence.pooling is not None
        ]
        first = 0
        for chunk, targets in described:
            logits = output.logits[first : first + len(targets)]
            num_top = chunk.sequence.params.prompt_logprobs or 0
            tokens = prompt_logprobs(logits, targets, num_top, self.executor.top_k)
            result.prompt_logprobs[chunk.sequence.seq_id] = (chunk.start + 1, tokens)
            first += len(targets)
        if asked:
            self._sample(asked, output.logits[num_described:], result)
        for sequence, state, embedding in pooled:  # once nothing can fail: tried again, a mean would grow
            sequence.pooled = state
            if isinstance(embedding, RequestError):
                result.errors[sequence.seq_id] = embedding
            elif embedding is not None:
                result.embeddings[sequence.seq_id] = embedding

    def _rows(self, item: PlacedMedia, chunk: Chunk, first_row: int) -> tuple[_Rows, Tensor]:
        """Rows of the step that take an item's features, and those features."""
        features = item.mapped.embeds
        if features is None:
            features = self.encoder_cache.get(item.key)
            assert features is not None, "media are encoded before their tokens are computed"
        flags = np.asarray(item.is_embed, dtype=bool)
        begin, end = max(chunk.start, item.start), min(chunk.end, item.end)
        inside = flags[begin - item.start : end - item.start]
        seen = int(flags[: begin - item.start].sum())
        rows = np.flatnonzero(inside) + first_row + begin - chunk.start
        return rows, features[seen : seen + len(rows)]

    def _embeds(self, media: SequenceOf[tuple[_Rows, Tensor]], ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """`opsin.rank.step.Embed`."""
        embeds = self._model.embed(ids)
        width = embeds.shape[1]
        further: list[Tensor] = []
        for rows, features in media:
            wanted = features.to(self._device, self.executor.dtype)
            embeds[torch.from_numpy(rows).to(self._device)] = wanted[:, :width]
            if wanted.shape[1] > width and len(rows):
                further.append(wanted[:, width:])
        return embeds, torch.cat(further) if further else None

    def _slots(self, chunks: SequenceOf[Chunk]) -> list[int]:
        size = self._block_size
        slots: list[int] = []
        for chunk in chunks:
            blocks = chunk.sequence.block_ids
            slots.extend(blocks[i // size] * size + i % size for i in range(chunk.start, chunk.end))
        return slots

    def _sample(self, asked: SequenceOf[Chunk], logits: Tensor, result: StepTokens) -> None:
        sequences, drafts = [chunk.sequence for chunk in asked], [chunk.draft for chunk in asked]
        for sequence, run in zip(sequences, sample_runs(logits, sequences, drafts, self.executor.top_k)):
            if isinstance(run, RequestError):
                result.errors[sequence.seq_id] = run
            else:
                result.sampled[sequence.seq_id] = run


def _described(chunk: Chunk) -> SequenceOf[int]:
    """The prompt tokens that a chunk's first rows predict, if their log-probabilities are wanted.

    The row of token i predicts token i + 1; the prompt's first token is predicted by nothing.
    """
    sequence = chunk.sequence
    if sequence.params.prompt_logprobs is None or sequence.index != 0:
        return ()
    end = min(chunk.end, sequence.num_prompt - 1)
    return sequence.token_ids[chunk.start + 1 : end + 1]


def _isolate(
    work: Callable[[SequenceOf[T]], None], items: SequenceOf[T], what: str
) -> list[tuple[T, RequestError]]:
    """Do work on all items together or, if that fails, one by one; returns those that fail alone, and why."""
    if not items:
        return []
    try:
        work(items)
        return []
    except DeviceLostError:
        raise
    except Exception as error:
        logger.error("%s (%d at once)\n%s", what, len(items), format_exc())
        expected = isinstance(error, RequestError)
        reason = str(error) if expected else f"{what}: {type(error).__name__}: {error}"
    # Here the exception is gone, and with its traceback the device memory that the next attempt needs.
    if len(items) == 1:
        return [(items[0], RequestError(reason))]
    return [failure for item in items for failure in _isolate(work, [item], what)]


def _positions(chunk: Chunk) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """int64 (A, length): the prompt's own positions, then counting on.

    With `Positions.switch_lengths` there is a last row, the variant.
    """
    positions = chunk.sequence.prompt.positions
    if positions is None:
        return np.arange(chunk.start, chunk.end, dtype=np.int64)[None]
    axes, known = positions.prompt.shape
    rows = positions.prompt[:, chunk.start : min(chunk.end, known)]
    if chunk.end > known:
        beyond = np.arange(max(chunk.start, known), chunk.end, dtype=np.int64) + positions.delta
        rows = np.concatenate([rows, np.broadcast_to(beyond, (axes, len(beyond)))], axis=1)
    if positions.switch_lengths:
        rows = np.concatenate([rows, np.full((1, chunk.length), chunk.sequence.variant, np.int64)])
    return rows

"""Step -> tensors -> model -> logits -> tokens."""

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

from opsin.api import (
    AttentionBatch,
    Device,
    ForwardStep,
    KVLayer,
    MediaFeatures,
    Model,
    PlacedMedia,
    PlanAttention,
    TopK,
    WideMedia,
)
from opsin.engine.cache import EncoderCache
from opsin.engine.pooling import pool
from opsin.engine.sampler import prompt_logprobs
from opsin.engine.scheduler import Chunk, Step
from opsin.engine.sequence import SampledToken
from opsin.engine.speculation import sample_runs
from opsin.errors import DeviceLostError, RequestError

T = TypeVar("T")

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
    """Runs steps on one device.

    Attributes:
        kv: the KV cache, layer by layer.
        num_encoded: media items encoded so far.
    """

    model: Model
    device: Device
    kv: SequenceOf[KVLayer]
    plan_attention: PlanAttention
    top_k: TopK
    encoder_cache: EncoderCache
    block_size: int
    dtype: torch.dtype
    num_encoded: int = 0

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

    def _encode_group(self, modality: str, items: SequenceOf[PlacedMedia]) -> None:
        outputs = self.model.encode(modality, [item.mapped for item in items])
        for item, output in zip(items, outputs, strict=True):
            expected = (item.mapped.num_embeds, media_width(self.model))
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
        embeds, media = self._embeds(placed)
        positions = torch.from_numpy(np.concatenate([_positions(chunk) for chunk in chunks], axis=1))
        batch = AttentionBatch(
            query_lens=[chunk.length for chunk in chunks],
            context_lens=[chunk.end for chunk in chunks],
            block_tables=[chunk.sequence.block_ids for chunk in chunks],
            slots=self._slots(chunks),
            block_size=self.block_size,
            device=self.device.torch_device,
        )
        hidden = self.model.forward(
            ForwardStep(
                embeds=embeds,
                positions=positions.to(self.device.torch_device),
                kv=self.kv,
                plan=self.plan_attention(batch),
                media=media,
            )
        )
        if hidden.shape != embeds.shape:
            raise RequestError(f"the model gave {tuple(hidden.shape)} for embeddings {tuple(embeds.shape)}")
        pooled = [
            (chunk.sequence, *pool(chunk.sequence, chunk.start, hidden[row : row + chunk.length]))
            for row, chunk in placed
            if chunk.sequence.pooling is not None
        ]
        for row, chunk in placed:
            if chunk.sequence.params.prompt_logprobs is not None and chunk.sequence.index == 0:
                self._read_prompt_logprobs(chunk, chunk.sequence.params.prompt_logprobs, hidden, row, result)
        self._sample(placed, hidden, result)
        for sequence, state, embedding in pooled:  # once nothing can fail: tried again, a mean would grow
            sequence.pooled = state
            if isinstance(embedding, RequestError):
                result.errors[sequence.seq_id] = embedding
            elif embedding is not None:
                result.embeddings[sequence.seq_id] = embedding

    def _embeds(self, placed: SequenceOf[tuple[int, Chunk]]) -> tuple[Tensor, MediaFeatures | None]:
        """(T, H): token embeddings, with media embeddings in their places; and what else media say."""
        ids = [token for _, chunk in placed for token in chunk.token_ids]
        target = self.device.torch_device
        embeds = self.model.embed(torch.tensor(ids, dtype=torch.int64, device=target))
        width = embeds.shape[1]
        further: list[tuple[Tensor, Tensor]] = []
        for first_row, chunk in placed:
            for item in chunk.media():
                features = item.mapped.embeds
                if features is None:
                    features = self.encoder_cache.get(item.key)
                    assert features is not None, "media are encoded before their tokens are computed"
                flags = np.asarray(item.is_embed, dtype=bool)
                begin, end = max(chunk.start, item.start), min(chunk.end, item.end)
                inside = flags[begin - item.start : end - item.start]
                seen = int(flags[: begin - item.start].sum())
                rows = torch.from_numpy(np.flatnonzero(inside) + first_row + begin - chunk.start)
                wanted = features[seen : seen + len(rows)].to(target, self.dtype)
                rows = rows.to(target)
                embeds[rows] = wanted[:, :width]
                if wanted.shape[1] > width and len(rows):
                    further.append((rows, wanted[:, width:]))
        if not further:
            return embeds, None
        all_rows, columns = (torch.cat(parts) for parts in zip(*further))
        return embeds, MediaFeatures(rows=all_rows, features=columns)

    def _slots(self, chunks: SequenceOf[Chunk]) -> list[int]:
        size = self.block_size
        slots: list[int] = []
        for chunk in chunks:
            blocks = chunk.sequence.block_ids
            slots.extend(blocks[i // size] * size + i % size for i in range(chunk.start, chunk.end))
        return slots

    def _sample(self, placed: SequenceOf[tuple[int, Chunk]], hidden: Tensor, result: StepTokens) -> None:
        rows: list[int] = []
        asked: list[Chunk] = []
        for first_row, chunk in placed:
            if chunk.samples and chunk.sequence.pooling is None:
                end = first_row + chunk.length
                rows += range(end - len(chunk.draft) - 1, end)
                asked.append(chunk)
        if not rows:
            return
        last = hidden.index_select(0, torch.tensor(rows, device=hidden.device))
        sequences, drafts = [chunk.sequence for chunk in asked], [chunk.draft for chunk in asked]
        for sequence, run in zip(sequences, sample_runs(self._logits(last), sequences, drafts, self.top_k)):
            if isinstance(run, RequestError):
                result.errors[sequence.seq_id] = run
            else:
                result.sampled[sequence.seq_id] = run

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden)
        expected = (len(hidden), self.model.vocab_size)
        if tuple(logits.shape) != expected:
            raise RequestError(f"the model gave logits {tuple(logits.shape)}, expected {expected}")
        return logits

    def _read_prompt_logprobs(
        self, chunk: Chunk, num_top: int, hidden: Tensor, row: int, result: StepTokens
    ) -> None:
        sequence = chunk.sequence
        # The row of token i predicts token i + 1; the prompt's first token is predicted by nothing.
        end = min(chunk.end, sequence.num_prompt - 1)
        if chunk.start < end:
            targets = sequence.token_ids[chunk.start + 1 : end + 1]
            logits = self._logits(hidden[row : row + end - chunk.start])
            tokens = prompt_logprobs(logits, targets, num_top, self.top_k)
            result.prompt_logprobs[sequence.seq_id] = (chunk.start + 1, tokens)


def media_width(model: Model) -> int:
    """Columns of what the model's encoder gives."""
    return model.media_width if isinstance(model, WideMedia) else model.hidden_size


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

"""Step -> tensors -> model -> logits -> tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from traceback import format_exc

import numpy as np
import torch
from torch import Tensor

from opsin.api import (
    AttentionBatch,
    Device,
    ForwardStep,
    KVLayer,
    Model,
    PlacedMedia,
    PlanAttention,
    Positions,
    TopK,
)
from opsin.engine.cache import EncoderCache
from opsin.engine.pooling import pool
from opsin.engine.sampler import prompt_logprobs, sample
from opsin.engine.scheduler import Chunk, Step
from opsin.engine.sequence import SampledToken
from opsin.errors import DeviceLostError, RequestError

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StepTokens:
    """What a step gave.

    Attributes:
        sampled: sequence id -> its new token.
        prompt_logprobs: sequence id -> (index of the first prompt token described, one per token).
        embeddings: sequence id -> its embedding, for embedding requests that are complete.
        errors: sequence id -> why this sequence, and only this one, could not be computed.
    """

    sampled: dict[int, SampledToken] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[int, list[SampledToken]]] = field(default_factory=dict)
    embeddings: dict[int, Tensor] = field(default_factory=dict)
    errors: dict[int, RequestError] = field(default_factory=dict)


class Runner:
    """Runs steps on one device."""

    def __init__(
        self,
        *,
        model: Model,
        device: Device,
        kv: SequenceOf[KVLayer],
        plan_attention: PlanAttention,
        top_k: TopK,
        encoder_cache: EncoderCache,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._device = device
        self._kv = kv
        self._plan_attention = plan_attention
        self._top_k = top_k
        self._encoder_cache = encoder_cache
        self._block_size = block_size
        self._dtype = dtype
        self.num_encoded = 0
        """Media items encoded so far."""

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
        self._compute(chunks, result)
        return result

    # ---- media --------------------------------------------------------------------------------

    def _encode(self, items: SequenceOf[PlacedMedia]) -> dict[str, RequestError]:
        failed: dict[str, RequestError] = {}
        for modality in dict.fromkeys(item.modality for item in items):
            group = [item for item in items if item.modality == modality]
            if self._encode_or_explain(modality, group) is not None:
                for item in group:
                    problem = self._encode_or_explain(modality, [item])
                    if problem is not None:
                        failed[item.key] = RequestError(f"the {modality} could not be encoded: {problem}")
        return failed

    def _encode_or_explain(self, modality: str, items: SequenceOf[PlacedMedia]) -> str | None:
        """Encode items together; what went wrong, if something did.

        Neither returned nor logged is the exception itself: its traceback would hold on to device memory that
        the next attempt needs.
        """
        try:
            self._encode_group(modality, items)
        except DeviceLostError:
            raise
        except Exception as error:
            logger.error("encoding %d %s item(s) failed\n%s", len(items), modality, format_exc())
            return _text(error)
        return None

    def _encode_group(self, modality: str, items: SequenceOf[PlacedMedia]) -> None:
        outputs = self._model.encode(modality, [item.mapped for item in items])
        for item, output in zip(items, outputs, strict=True):
            expected = (item.mapped.num_embeds, self._model.hidden_size)
            if tuple(output.shape) != expected:
                raise RequestError(
                    f"the encoder gave {tuple(output.shape)} for one {modality}, expected {expected}"
                )
            # A copy of its own: a view would keep the whole group's output alive.
            self._encoder_cache.store(item.key, output.clone() if len(items) > 1 else output)
            self.num_encoded += 1

    # ---- tokens -------------------------------------------------------------------------------

    def _compute(self, chunks: SequenceOf[Chunk], result: StepTokens) -> None:
        if not chunks or self._computed(chunks, result) or len(chunks) == 1:
            return
        # Writing keys and values again is harmless, so the culprit can be found one by one.
        for chunk in chunks:
            self._computed([chunk], result)

    def _computed(self, chunks: SequenceOf[Chunk], result: StepTokens) -> bool:
        """Compute chunks together; False if that failed. The error of a single chunk is in ``result``.

        When this returns, the failed attempt's tensors are gone: the next one may need their memory.
        """
        try:
            self._compute_batch(chunks, result)
        except DeviceLostError:
            raise
        except Exception as error:
            logger.error("a step of %d sequence(s) failed\n%s", len(chunks), format_exc())
            if len(chunks) == 1:
                result.errors[chunks[0].sequence.seq_id] = (
                    error.with_traceback(None)
                    if isinstance(error, RequestError)
                    else RequestError(f"computing this request failed: {_text(error)}")
                )
            return False
        return True

    def _compute_batch(self, chunks: SequenceOf[Chunk], result: StepTokens) -> None:
        embeds = self._embeds(chunks)
        positions = torch.from_numpy(np.concatenate([_positions(chunk) for chunk in chunks], axis=1))
        batch = AttentionBatch(
            query_lens=[chunk.length for chunk in chunks],
            context_lens=[chunk.end for chunk in chunks],
            block_tables=[chunk.sequence.block_ids for chunk in chunks],
            slots=self._slots(chunks),
            block_size=self._block_size,
            device=self._device.torch_device,
        )
        hidden = self._model.forward(
            ForwardStep(
                embeds=embeds,
                positions=positions.to(self._device.torch_device),
                kv=self._kv,
                plan=self._plan_attention(batch),
            )
        )
        self._pool(chunks, hidden, result)
        self._read_prompt_logprobs(chunks, hidden, result)
        self._sample(chunks, hidden, result)

    def _embeds(self, chunks: SequenceOf[Chunk]) -> Tensor:
        """(T, H): token embeddings, with media embeddings in their places."""
        ids = [token for chunk in chunks for token in chunk.sequence.token_ids[chunk.start : chunk.end]]
        target = self._device.torch_device
        embeds = self._model.embed(torch.tensor(ids, dtype=torch.int64, device=target))
        first_row = 0
        for chunk in chunks:
            for item in chunk.media():
                features = item.mapped.embeds
                if features is None:
                    features = self._encoder_cache.get(item.key)
                    assert features is not None, "media are encoded before their tokens are computed"
                flags = np.asarray(item.is_embed, dtype=bool)
                begin, end = max(chunk.start, item.start), min(chunk.end, item.end)
                inside = flags[begin - item.start : end - item.start]
                seen = int(flags[: begin - item.start].sum())
                rows = torch.from_numpy(np.flatnonzero(inside) + first_row + begin - chunk.start)
                embeds[rows.to(target)] = features[seen : seen + len(rows)].to(
                    device=target, dtype=self._dtype
                )
            first_row += chunk.length
        return embeds

    def _slots(self, chunks: SequenceOf[Chunk]) -> list[int]:
        size = self._block_size
        slots: list[int] = []
        for chunk in chunks:
            blocks = chunk.sequence.block_ids
            slots.extend(blocks[i // size] * size + i % size for i in range(chunk.start, chunk.end))
        return slots

    def _sample(self, chunks: SequenceOf[Chunk], hidden: Tensor, result: StepTokens) -> None:
        rows, sequences, row = [], [], -1
        for chunk in chunks:
            row += chunk.length
            if chunk.samples and chunk.sequence.pooling is None:
                rows.append(row)
                sequences.append(chunk.sequence)
        if not rows:
            return
        last = hidden.index_select(0, torch.tensor(rows, device=hidden.device))
        for sequence, token in zip(
            sequences, sample(self._model.logits(last), sequences, self._top_k), strict=True
        ):
            if isinstance(token, RequestError):
                result.errors[sequence.seq_id] = token
            else:
                result.sampled[sequence.seq_id] = token

    def _pool(self, chunks: SequenceOf[Chunk], hidden: Tensor, result: StepTokens) -> None:
        row = 0
        for chunk in chunks:
            if chunk.sequence.pooling is not None:
                embedding = pool(chunk.sequence, chunk.start, hidden[row : row + chunk.length])
                if embedding is not None:
                    result.embeddings[chunk.sequence.seq_id] = embedding
            row += chunk.length

    def _read_prompt_logprobs(self, chunks: SequenceOf[Chunk], hidden: Tensor, result: StepTokens) -> None:
        row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            wanted = sequence.params.prompt_logprobs
            # The row of token i predicts token i + 1; the prompt's first token is predicted by nothing.
            end = min(chunk.end, sequence.num_prompt - 1)
            if wanted is not None and sequence.index == 0 and chunk.start < end:
                targets = sequence.token_ids[chunk.start + 1 : end + 1]
                logits = self._model.logits(hidden[row : row + end - chunk.start])
                result.prompt_logprobs[sequence.seq_id] = (
                    chunk.start + 1,
                    prompt_logprobs(logits, targets, wanted, self._top_k),
                )
            row += chunk.length


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {error}"


_IntRows = np.ndarray[tuple[int, int], np.dtype[np.int64]]


def _positions(chunk: Chunk) -> _IntRows:
    """int64 (A, length): the positions; and with `Positions.switch_lengths` a last row, the variant."""
    positions = chunk.sequence.positions
    if positions is None:
        return np.arange(chunk.start, chunk.end, dtype=np.int64)[None]
    rows = _axes(chunk, positions)
    if positions.switch_lengths:
        rows = np.concatenate([rows, np.full((1, chunk.length), chunk.sequence.variant, np.int64)])
    return rows


def _axes(chunk: Chunk, positions: Positions) -> _IntRows:
    """int64 (A, length): the prompt's own positions, then counting on."""
    axes, known = positions.prompt.shape
    inside = positions.prompt[:, chunk.start : min(chunk.end, known)]
    if chunk.end <= known:
        return inside
    beyond = np.arange(max(chunk.start, known), chunk.end, dtype=np.int64) + positions.delta
    return np.concatenate([inside, np.broadcast_to(beyond, (axes, len(beyond)))], axis=1)

"""The language model: embeddings, a decoder stack over the paged cache, and the output head."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opsin.api import (
    Activation,
    AllGather,
    BuildContext,
    ForwardStep,
    KernelQuery,
    KVGeometry,
    KVLayer,
    MappedMedia,
    MediaFeatures,
    Modality,
    Parallel,
    WeightForm,
)
from opsin.errors import ConfigError
from opsin.layers.linear import Embedding, Linear, Part, activation, dtype_name
from opsin.layers.module import Module, Slot
from opsin.layers.norm import RMSNorm
from opsin.layers.text import fields

_DECODER_FIELDS: Mapping[str, Any] = {
    "num_key_value_heads": int | None,
    "head_dim": int | None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": bool | None,
    "attention_bias": False,
    "mlp_bias": False,
}


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a positive integer")
    return value


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder whose layers are RMS norm, rotary grouped-query attention and a gated MLP.

    Attributes:
        qkv_bias: whether q, k and v have biases.
        qk_norm: whether each head of q and of k is normalised (RMS) before it is rotated.
        fused: whether the checkpoint stores qkv_proj and gate_up_proj already fused.
        embed_scale: factor on token embeddings; embeddings of media are taken as they are.
        residual_scale: factor on what each attention and MLP adds to the residual stream.
        logit_scale: factor on the final hidden states before the output head.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float
    activation: Activation = "silu"
    qkv_bias: bool = False
    tied: bool = False
    fused: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    qk_norm: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> DecoderConfig:
        """From the fields of a `text_config`; ``changes`` are attributes that the family knows better.

        Raises:
            ValueError: a field cannot be used; the message names it.
        """
        given = fields(config, _DECODER_FIELDS)
        for name in ("attention_bias", "mlp_bias"):
            if given[name]:
                raise ValueError(f"{name} is true; expected false: these decoders have no such biases")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        vocab_size, hidden_size, intermediate_size, num_layers, heads = (
            _positive(name, given.get(name)) for name in sizes
        )
        kv_heads = _positive("num_key_value_heads", given["num_key_value_heads"] or heads)
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        found = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_layers": num_layers,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_size": _positive("head_dim", given["head_dim"] or hidden_size // heads),
            "eps": given["rms_norm_eps"],
            "activation": activation(given["hidden_act"]),
            "tied": bool(given["tie_word_embeddings"]),
        }
        return cls(**{**found, **changes})


def _heads_of_rank(config: DecoderConfig, place: Parallel) -> list[int]:
    """Query heads and key/value heads of a rank.

    Raises:
        ConfigError: the heads cannot be divided among so many ranks; the message names numbers that work.
    """
    heads, kv_heads, world = config.num_heads, config.num_kv_heads, place.world_size
    if not _divides_heads(config, world):
        possible = [str(n) for n in range(2, heads + 1) if _divides_heads(config, n)]
        raise ConfigError(
            f"tensor_parallel_size={world}: {heads} query heads and {kv_heads} key/value heads cannot be "
            f"divided among so many ranks; possible are {', '.join(['1', *possible])}"
        )
    return [place.share(heads)[1], place.share(kv_heads)[1]]


def _divides_heads(config: DecoderConfig, world: int) -> bool:
    """Whether ranks have equally many query heads, and all key/value heads that these read."""
    kv_heads = config.num_kv_heads
    return config.num_heads % world == 0 and (kv_heads % world == 0 or world % kv_heads == 0)


def _mlp_unit(config: DecoderConfig, place: Parallel) -> int:
    """What the MLP's width is cut in multiples of: whole groups of quantised weights, where that can be.

    A width of 29568 = 231 * 128 is no multiple of 8 * 128: ranks then have 29 or 28 times 128.

    Raises:
        ConfigError: there are more ranks than columns.
    """
    wide, world = config.intermediate_size, place.world_size
    for unit in (128, 64, 32, 16, 8, 4, 2, 1):
        if wide % unit == 0 and wide // unit >= world:
            return unit
    raise ConfigError(
        f"tensor_parallel_size={world}: intermediate_size {wide} cannot be divided among so many"
    )


class Attention(Module):
    """Grouped-query attention over the paged cache."""

    def __init__(self, context: BuildContext, config: DecoderConfig) -> None:
        super().__init__()
        size = config.head_size
        [heads, kv_heads] = _heads_of_rank(config, context.parallel)
        self._heads = [heads, kv_heads, kv_heads]
        self._head_size, self._scale = size, 1 / math.sqrt(size)
        kv_width = config.num_kv_heads * size
        self.qkv_proj = Linear(
            context,
            config.hidden_size,
            {"q_proj": config.num_heads * size, "k_proj": kv_width, "v_proj": kv_width},
            bias=config.qkv_bias,
            split="column",
            few_rows=True,
            unit=size,
            fused=config.fused,
        )
        self.o_proj = Linear(
            context,
            config.num_heads * size,
            config.hidden_size,
            bias=False,
            split="row",
            few_rows=True,
            unit=size,
        )
        self.q_norm = RMSNorm(context, size, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(context, size, config.eps) if config.qk_norm else None
        query = KernelQuery(
            op="rotary",
            dtype=dtype_name(context.dtype),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=size,
        )
        self._attend = context.kernels.rotary_paged(query)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv: KVLayer, plan: Any) -> Tensor:
        """x (T, H) -> (T, H); writes this step's keys and values."""
        q, k, v = self.qkv_proj(x).view(len(x), -1, self._head_size).split(self._heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _heads_normed(self.q_norm, q), _heads_normed(self.k_norm, k)
        return self.o_proj(self._attend(q, k, v, cos, sin, kv, plan, self._scale).flatten(1))


def _heads_normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """x (T, N, D), each head normalised by itself."""
    return norm(x.reshape(-1, x.shape[-1]))[0].view(x.shape)


class GatedMLP(Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, context: BuildContext, config: DecoderConfig) -> None:
        super().__init__()
        wide, unit = config.intermediate_size, _mlp_unit(config, context.parallel)
        self.gate_up_proj = Linear(
            context,
            config.hidden_size,
            {"gate_proj": wide, "up_proj": wide},
            bias=False,
            split="column",
            few_rows=True,
            unit=unit,
            fused=config.fused,
        )
        self.down_proj = Linear(
            context, wide, config.hidden_size, bias=False, split="row", few_rows=True, unit=unit
        )
        self._activation: Activation = config.activation
        query = KernelQuery(
            op="gated_act",
            dtype=dtype_name(context.dtype),
            size=self.down_proj.in_features,
            activation=config.activation,
        )
        self._gated_act = context.kernels.gated_act(query)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, H) -> (T, H)."""
        return self.down_proj(self._gated_act(self.gate_up_proj(x), self._activation))


class DecoderLayer(Module):
    """Attention and MLP, each behind a norm, on a residual stream."""

    def __init__(self, context: BuildContext, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(context, config.hidden_size, config.eps)
        self.self_attn = Attention(context, config)
        self.post_attention_layernorm = RMSNorm(context, config.hidden_size, config.eps)
        self.mlp = GatedMLP(context, config)
        self._scale = config.residual_scale

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, kv: KVLayer, plan: Any
    ) -> tuple[Tensor, Tensor]:
        """(branch output, residual stream), both (T, H); the next norm adds them."""
        x, residual = self.input_layernorm(x, residual)
        x = self._scaled(self.self_attn(x, cos, sin, kv, plan))
        x, residual = self.post_attention_layernorm(x, residual)
        return self._scaled(self.mlp(x)), residual

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self._scale == 1 else x * self._scale


class Decoder(Module):
    """Embeddings, layers and final norm: the part of a checkpoint below ``model.``."""

    def __init__(
        self, context: BuildContext, config: DecoderConfig, *, rotary: nn.Module, head: Linear
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(
            context,
            config.vocab_size,
            config.hidden_size,
            tied=head if config.tied else None,
            scale=config.embed_scale,
        )
        self.layers = nn.ModuleList(DecoderLayer(context, config) for _ in range(config.num_layers))
        self.norm = RMSNorm(context, config.hidden_size, config.eps)
        self._rotary = rotary

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        kv: Sequence[KVLayer],
        plan: Any,
        media: MediaFeatures | None = None,
    ) -> Tensor:
        """embeds (T, H), positions (A, T) -> hidden states after the final norm (T, H).

        ``media``: features (R, n * H), of which the i-th H columns are added to the hidden states after layer
        i (DeepStack; Meng et al. 2024).
        """
        cos, sin = self._rotary(positions)
        added = [] if media is None else media.features.split(embeds.shape[1], dim=1)
        x, residual = embeds, None
        for number, (layer, cache) in enumerate(zip(self.layers, kv, strict=True)):
            x, residual = layer(x, residual, cos, sin, cache, plan)
            if media is not None and number < len(added):
                x = x.index_add(0, media.rows, added[number])
        return self.norm(x, residual)[0]


def kv_geometry(config: DecoderConfig, world_size: int) -> KVGeometry:
    """Shape of a decoder's KV cache on one rank."""
    return KVGeometry(
        num_layers=config.num_layers,
        num_kv_heads=_heads_of_rank(config, Parallel(world_size=world_size))[1],
        head_size=config.head_size,
    )


class OutputHead(Linear):
    """hidden -> vocabulary; ranks have a part of the vocabulary each, and gather the logits.

    A tied head is stored all the same in some checkpoints. One that differs from the embeddings is used,
    whatever ``tie_word_embeddings`` says, as in transformers 5.
    """

    def __init__(self, context: BuildContext, config: DecoderConfig) -> None:
        super().__init__(
            context, config.hidden_size, config.vocab_size, bias=False, split="column", few_rows=True
        )
        self._scale = config.logit_scale
        self._vocab_size, self._widths = config.vocab_size, context.parallel.shares(config.vocab_size)
        self._part = Part(0, self._parts[""], 0)
        self._own: Tensor | None = None
        self._table: Tensor | None = None
        self._gather: AllGather | None = None
        if len(self._widths) > 1:
            query = KernelQuery(op="all_gather", dtype=dtype_name(context.dtype), size=config.vocab_size)
            self._gather = context.kernels.all_gather(query)

    def slots(self) -> Iterator[Slot]:
        """The weight (V, H), optional for a tied head."""
        yield Slot(
            "weight",
            (self._vocab_size, self.in_features),
            self._put,
            optional=self.tied,
            put_quantized=partial(self._take_quantized, self._part),
        )

    def adopt(self, weight: Tensor) -> None:
        """See `Linear.adopt`; ``weight`` is the whole table, which rank 0 alone keeps."""
        self._table = weight
        self._settle()

    def _put(self, weight: Tensor) -> None:
        self._own = weight
        if not self.tied or self._table is not None:
            self._settle()

    def rounded_to(self) -> WeightForm | None:
        """See `Linear.rounded_to`."""
        return self._rounding.head

    def _settle(self) -> None:
        stored, table = self._own, self._table
        self._own = None
        if stored is not None and table is not None and torch.equal(stored.to(table), table):
            stored = None
        if stored is not None:
            self._to_come = 1
            self._take(self._part, stored)
        elif table is not None and self._run is None and self._place.rank == 0:
            super().adopt(self._part.rows_of(table))
        elif table is not None and self._run is None:
            self._to_come = 1
            self._take(self._part, table)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H) -> logits (B, V)."""
        logits = super().forward(x if self._scale == 1 else x * self._scale)
        return logits if self._gather is None else self._gather(logits, self._widths, self._place)


def output_head(context: BuildContext, config: DecoderConfig) -> Linear:
    """The layer that turns final hidden states into logits."""
    return OutputHead(context, config)


class LanguageModel(Module):
    """A decoder between its embeddings and its output head: all of `opsin.api.Model` but the encoder.

    A family inherits, adds its encoder under the names that the checkpoint's keys have, and writes `encode`.

    Args:
        context: build context.
        config: the decoder, usually of a `text_config`.
        rotary: int64 positions (A, T) -> cosines and sines (T, D), usually a `RotaryTable`.
        renames: regular expressions -> what replaces them in checkpoint keys, one after another.
        unused: regular expressions of names, after that, whose tensors no computation reads.
        deep_layers: to the hidden states after how many of the first layers media add features. `encode` then
            gives (E, (1 + deep_layers) * H): the embedding, and what is added after each of them.
    """

    def __init__(
        self,
        context: BuildContext,
        config: DecoderConfig,
        *,
        rotary: nn.Module,
        renames: Mapping[str, str] | None = None,
        unused: Sequence[str] = (),
        deep_layers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= deep_layers <= config.num_layers:
            raise ValueError(
                f"media add features after {deep_layers} layers; the decoder has {config.num_layers}"
            )
        self.media_width = (1 + deep_layers) * config.hidden_size
        self._renames, self._unused = renames or {}, tuple(unused)
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.kv_geometry = kv_geometry(config, context.parallel.world_size)
        self.lm_head = output_head(context, config)
        self.model = Decoder(context, config, rotary=rotary, head=self.lm_head)

    def weight_name(self, key: str) -> str | None:
        """See `opsin.api.Model.weight_name`."""
        for pattern, replacement in self._renames.items():
            key = re.sub(pattern, replacement, key)
        return None if any(re.search(pattern, key) for pattern in self._unused) else key

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """See `opsin.api.Model.encode`."""
        raise AssertionError(f"{type(self).__name__} has no encoder, got {len(items)} {modality} items")

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 (T,) -> (T, H)."""
        return self.model.embed_tokens(token_ids)

    def forward(self, step: ForwardStep) -> Tensor:
        """Hidden states after the final norm, (T, H)."""
        return self.model(step.embeds, step.positions, step.kv, step.plan, step.media)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, V)."""
        return self.lm_head(hidden)

"""The public, torch-free vocabulary of opsin: everything a plugin may name.

A plugin returns *specs* (frozen, keyword-only) from its hooks. A spec carries small builder functions
whose heavy imports are local, so that discovering plugins loads neither torch nor transformers.

Shape legend, used in every docstring of the project: T tokens in a step, B sequences, E embeddings of one
media item, H hidden size, N query heads, K key/value heads, D head size, V vocabulary size, A position
axes (1, or 3 for M-RoPE).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from torch import Tensor

    from opsin.kernels import Kernels

API_MAJOR = 1
"""Plugins for another major live in another entry-point group and are reported, never imported."""

API_MINOR = 0
"""Counts compatible additions: a hook, an optional argument, a field with a default."""

ENTRY_POINT_GROUP = f"opsin.v{API_MAJOR}"
CHECKPOINT_GROUP = f"opsin.checkpoints.v{API_MAJOR}"
"""Installed checkpoints: entry-point name is the model id, its object returns the checkpoint's folder."""

Modality = str
"""``"image"`` or ``"video"`` today; a plugin may introduce another name."""

# --------------------------------------------------------------------------------------------------
# Media and prompts: what travels from the user's picture to the model's embeddings
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MediaItem:
    """One picture, one video, or ready-made embeddings, validated and decoded.

    Exactly one of ``pixels`` and ``embeds`` is set.

    Attributes:
        modality: what it is.
        pixels: uint8 RGB, (height, width, 3) for an image, (frames, height, width, 3) for a video.
        embeds: tensors of one item as `InputMapper.split_embeds` returned them.
        digest: hex digest over everything that makes this item what it is: the kind, mode, size and
            bytes of its content. Equal digests mean equal content; caches rely on it.
    """

    modality: Modality
    digest: str
    pixels: np.ndarray[Any, Any] | None = None
    embeds: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class MappedMedia:
    """A media item as tensors the model's encoder takes.

    Attributes:
        num_embeds: how many embeddings (E) the item becomes: as many as its expansion has embed tokens.
        tensors: inputs of `Model.encode`, host memory; empty when ``embeds`` is set.
        embeds: (E, H), finite floating point: finished embeddings, for which the encoder is skipped.
        geometry: whatever the model's own positions, expansion and encoder need to know (a grid, sizes).
            Private to the model; core only carries it.
    """

    num_embeds: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    embeds: Tensor | None = None
    geometry: Any = None


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """The token ids one placeholder becomes.

    Attributes:
        token_ids: ids put in place of the placeholder.
        is_embed: for each id, whether its embedding row comes from the media encoder.
            ``sum(is_embed) == MappedMedia.num_embeds``; core checks it before scheduling.
    """

    token_ids: Sequence[int]
    is_embed: Sequence[bool]


@dataclass(frozen=True, kw_only=True)
class PlacedMedia:
    """A mapped item at its place in the expanded prompt.

    Attributes:
        modality: what it is.
        key: cache key of its embeddings: content digest and processor options.
        mapped: the tensors.
        start: index of the first expansion token in the prompt.
        is_embed: as in `Expansion`; ``len(is_embed)`` tokens belong to the item.
    """

    modality: Modality
    key: str
    mapped: MappedMedia
    start: int
    is_embed: Sequence[bool]

    @property
    def end(self) -> int:
        """Index after the item's last token."""
        return self.start + len(self.is_embed)


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Rotary positions of a prompt, and how they go on.

    Attributes:
        prompt: int64 (A, L), the position of each of the L prompt tokens on each axis.
        delta: position of token ``i >= L`` is ``i + delta`` on every axis.
        switch_lengths: ascending lengths at which the model computes the *whole* sequence differently, e.g.
            with rotary factors for long contexts: a sequence of more than ``switch_lengths[i]`` tokens,
            prompt and output together, is of variant ``i + 1``, a shorter one of variant ``i``. If there are
            any, a step's positions have one more row: the variant of each token's sequence. A sequence that
            grows past a length is computed anew, and cached prefixes of different variants are never mixed.
    """

    prompt: np.ndarray[Any, Any]
    delta: int = 0
    switch_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProcessedPrompt:
    """A prompt ready for the engine: expanded, placed, positioned.

    Attributes:
        token_ids: after expansion.
        media: in order of their start.
        positions: None means 0, 1, 2, ... on one axis.
        text: the prompt as the user wrote it, if it was text.
        salt: extra bytes for the prefix-cache key (requests with different salts never share blocks).
    """

    token_ids: Sequence[int]
    media: Sequence[PlacedMedia] = ()
    positions: Positions | None = None
    text: str | None = None
    salt: str = ""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that core and plugins use."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...


@dataclass(frozen=True, kw_only=True)
class InputContext:
    """What an input mapper or a placeholder is built from.

    Attributes:
        config: the checkpoint's config.json.
        preprocessor: its preprocessor_config.json (empty if it has none).
        tokenizer: its tokenizer.
        options: the user's ``mm_processor_kwargs`` for the whole engine.
    """

    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    tokenizer: Tokenizer
    options: Mapping[str, Any] = field(default_factory=dict)


class InputMapper(Protocol):
    """Turns media items of one modality into model tensors. Called from several threads."""

    option_names: frozenset[str]
    """Names accepted in ``mm_processor_kwargs``; any other name is an error for the request."""

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """Map one item; ``options`` are the engine's merged with the request's.

        Raises:
            ValueError: the item cannot be used; the message is shown to the user.
        """
        ...

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """Split a user's embeddings input (a tensor, a list, a dict) into one mapping per item.

        Raises:
            ValueError: the layout is not one this family accepts.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Placeholder:
    """How one modality is written in a prompt, and what it becomes.

    Attributes:
        text: text of the n-th item (1-based, counted across the whole prompt), e.g. ``<|image_1|>``.
        expand: mapped item and its 1-based number -> the ids that replace the placeholder.
        token_id: the one id among the tokens of ``text`` that is replaced (it may stand between marks
            that stay). The prompt is then tokenized as a whole and each such id is one item.
            None: the prompt is cut at the placeholder texts and each piece tokenized on its own.
        special_tokens_per_chunk: with ``token_id`` None: tokenize every piece with the tokenizer's
            special tokens (a BOS before each), not only the first.
        tokenizes_whole: with ``token_id`` None: ``mm_processor_kwargs`` (the engine's merged with the
            request's) -> whether the prompt is tokenized as a whole after all, and the placeholders are found
            by the ids their texts become. None: never. A ValueError is shown to the user.
        option_names: the ``mm_processor_kwargs`` it reads, accepted beside the input mapper's.
    """

    text: Callable[[int], str]
    expand: Callable[[MappedMedia, int], Expansion]
    token_id: int | None = None
    special_tokens_per_chunk: bool = False
    tokenizes_whole: Callable[[Mapping[str, Any]], bool] | None = None
    option_names: frozenset[str] = frozenset()


# --------------------------------------------------------------------------------------------------
# Devices and kernels
# --------------------------------------------------------------------------------------------------

OpName = Literal[
    "rms_norm",
    "layer_norm",
    "gated_act",
    "rotary",
    "plan_attention",
    "write_kv",
    "paged_attention",
    "dense_attention",
    "prepare_linear",
]
"""The op table. Every op has a reference in `opsin.kernels`; a device may bring its own."""

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class KernelQuery:
    """What a layer is about to ask of an op; a device answers whether it can.

    Only the fields that make sense for ``op`` are set.

    Attributes:
        op: the op.
        dtype: element type of activations, e.g. ``"float32"``.
        size: normalised or feature width (norms, gated_act).
        in_features, out_features: prepare_linear.
        num_heads, num_kv_heads, head_size: attention and rotary.
        activation: gated_act, or fused after a linear layer.
        bias: whether the linear layer has a bias.
    """

    op: OpName
    dtype: str
    size: int | None = None
    in_features: int | None = None
    out_features: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_size: int | None = None
    activation: Activation | None = None
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class KVGeometry:
    """Shape of a model's key/value cache."""

    num_layers: int
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True, kw_only=True)
class KVLayer:
    """Keys and values of one layer, in a layout the device chose.

    Attributes:
        k, v: *logical* views [num_blocks, block_size, K, D]. The memory behind them may be ordered in
            any way (a device keeps e.g. [num_blocks, K, block_size, D] and hands out a permuted view);
            the reference kernels only ever index the logical axes.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """The attention geometry of one flat token batch, on the host. Built once a step.

    Sequences stand one after another in the flat batch, in this order.

    Attributes:
        query_lens: tokens of each sequence in this step.
        context_lens: tokens of each sequence in the KV cache once this step's are written
            (so ``context_len - query_len`` tokens were there before).
        block_tables: block ids of each sequence, at least ``ceil(context_len / block_size)``.
        slots: for each of the T tokens, ``block * block_size + offset`` where its key and value go.
        block_size: tokens per block.
        device: torch device of the step's tensors.
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    slots: Sequence[int]
    block_size: int
    device: str


class RMSNorm(Protocol):
    """y = x / rms(x) * weight over the last axis, accumulated in float32.

    Source: Zhang & Sennrich 2019, eq. 4. With ``residual``: ``h = x + residual`` first; returns
    ``(norm(h), h)``, and may reuse either input's memory. Without: returns ``(norm(x), x)``.
    """

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class LayerNorm(Protocol):
    """Layer normalisation over the last axis, accumulated in float32 (Ba et al. 2016)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor: ...


class GatedAct(Protocol):
    """x (T, 2F) -> act(x[:, :F]) * x[:, F:], (T, F)."""

    def __call__(self, x: Tensor, activation: Activation) -> Tensor: ...


class Rotary(Protocol):
    """Rotate-half rotary embedding (Su et al. 2021, section 3.4.2).

    q (T, N, D), k (T, K, D); cos and sin (T, R) with R <= D, already duplicated over the two halves;
    the first R elements of each head are rotated. Returns the rotated q and k; may work in place.
    """

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...


class PlanAttention(Protocol):
    """Whatever the device wants to compute once a step; handed to write_kv and paged_attention."""

    def __call__(self, batch: AttentionBatch) -> Any: ...


class WriteKV(Protocol):
    """Store k and v (T, K, D) of this step's tokens at the plan's slots."""

    def __call__(self, k: Tensor, v: Tensor, layer: KVLayer, plan: Any) -> None: ...


class PagedAttention(Protocol):
    """Causal attention of q (T, N, D) over the cache -> (T, N, D).

    Query i of a sequence with ``query_len`` q and ``context_len`` c sees keys ``0 .. c - q + i``
    (bottom-right aligned). Softmax is accumulated in float32. Heads are grouped: query head n uses
    key/value head ``n // (N / K)``.
    """

    def __call__(self, q: Tensor, layer: KVLayer, plan: Any, scale: float) -> Tensor: ...


class DenseAttention(Protocol):
    """Full (not causal) attention within each of several segments of a flat batch.

    q (Tq, N, D), k and v (Tk, N, D) -> (Tq, N, D); ``q_lens`` and ``k_lens`` are the segment lengths
    (``k_lens`` None: the same as ``q_lens``).
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lens: Sequence[int],
        k_lens: Sequence[int] | None,
        scale: float,
    ) -> Tensor: ...


LinearFn = Callable[["Tensor"], "Tensor"]
"""x (..., in_features) -> (..., out_features)."""


class PrepareLinear(Protocol):
    """weight (out, in), bias (out) -> a callable computing act(x @ weight.T + bias).

    Called once per layer while loading; may pack, transpose or quantise. If it keeps its own copy, the
    caller drops the original weight unless ``keep_weight`` says that it is also used elsewhere.
    ``few_rows``: the layer also sees single rows, again and again (it decodes). There the time goes into
    reading the weight, and a second form of it may be worth its memory.
    """

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None,
        *,
        keep_weight: bool,
        few_rows: bool = False,
    ) -> LinearFn: ...


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a device can do. Configuration is resolved against it; a device never edits the config.

    Attributes:
        dtypes: supported element types.
        dtype_for: ``dtype="auto"``: the checkpoint's dtype -> the dtype to run it in.
        kv_block_size: tokens per KV block.
        max_tensor_elements: upper bound for one tensor of the KV cache, or None.
        kv_memory_share: share of the free memory the KV cache takes by default, for a device with memory of
            its own; None: a cautious share, as of a host that others use too.
        pinned_memory, graphs: optional mechanisms.
        communication: torch.distributed backend.
        advice: per unsupported dtype, the sentence that says what to pass instead.
    """

    dtypes: tuple[str, ...]
    dtype_for: Mapping[str, str]
    kv_block_size: int = 16
    max_tensor_elements: int | None = None
    kv_memory_share: float | None = None
    pinned_memory: bool = False
    graphs: bool = False
    communication: str = "gloo"
    advice: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MemoryInfo:
    """Bytes of device memory."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Device:
    """An opened device.

    Attributes:
        name: the spec's name.
        torch_device: what tensors are created on, e.g. ``"cpu"``, ``"cuda:0"``.
        capabilities: see there.
        memory: free and total memory now.
        allocate_kv: (num_blocks, block_size, geometry, torch dtype) -> one `KVLayer` per model layer.
            None: core allocates [num_blocks, block_size, K, D].
        kv_row_elements: elements that one token's keys take in one layer of that cache (its values take as
            many), for a device that fills heads up; None: K * D.
        synchronize: wait until queued work is done; None where nothing is queued.
        details: facts for ``opsin doctor`` (threads, driver versions, switches).
    """

    name: str
    torch_device: str
    capabilities: Capabilities
    memory: Callable[[], MemoryInfo]
    allocate_kv: Callable[[int, int, KVGeometry, torch.dtype], Sequence[KVLayer]] | None = None
    kv_row_elements: Callable[[KVGeometry], int] | None = None
    synchronize: Callable[[], None] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Whether a device can be used here, and why.

    Attributes:
        score: 0 means unusable; ``device="auto"`` takes the highest.
        reason: one sentence.
        next_step: what to do about it, or empty.
        details: facts for ``opsin doctor``.
    """

    score: int
    reason: str
    next_step: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This process's place among the tensor-parallel ranks."""

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What a model is built from. Building allocates nothing: core streams the weights in afterwards.

    Attributes:
        config: the checkpoint's config.json.
        kernels: layers bind their ops from it.
        dtype: run dtype of parameters and activations.
        device: torch device of weights and activations.
        parallel: tensor-parallel place.
    """

    config: Mapping[str, Any]
    kernels: Kernels
    dtype: torch.dtype
    device: str = "cpu"
    parallel: Parallel = field(default_factory=Parallel)


@dataclass(frozen=True, kw_only=True)
class ForwardStep:
    """One flat token batch for `Model.forward`.

    Attributes:
        embeds: (T, H) input embeddings, media already in place.
        positions: int64 (A, T), or (A + 1, T) with the variants of `Positions.switch_lengths` last.
        kv: one cache layer per model layer.
        plan: the step's attention plan.
    """

    embeds: Tensor
    positions: Tensor
    kv: Sequence[KVLayer]
    plan: Any


class Model(Protocol):
    """A model. `opsin.layers` has the building blocks; it is an ``nn.Module``."""

    kv_geometry: KVGeometry
    hidden_size: int
    vocab_size: int

    def weight_name(self, key: str) -> str | None:
        """Checkpoint key -> name in this model's tree; None for a tensor that is not used."""
        ...

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """Encode several items of one modality in as few calls as the architecture allows -> (E, H) each."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 (T,) -> (T, H)."""
        ...

    def forward(self, step: ForwardStep) -> Tensor:
        """Hidden states after the final norm, (T, H)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, V)."""
        ...


# --------------------------------------------------------------------------------------------------
# Specs: what hooks return
# --------------------------------------------------------------------------------------------------


PoolingType = Literal["last", "mean", "cls"]
"""Which hidden state stands for a text: the last token's, the mean of all, or the first token's."""


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How an embedding is made of the hidden states after the final norm.

    Attributes:
        type: which of them.
        normalize: divide by the L2 norm.
    """

    type: PoolingType = "last"
    normalize: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One architecture, as ``architectures[0]`` of config.json names it.

    Attributes:
        architecture: the key.
        build: builds the model; raises ValueError for a config.json it cannot follow.
        positions: (config, token ids, placed media) -> rotary positions; None: 0, 1, 2, ...
        default_chat_template: used when the checkpoint has none; config -> template (or None) where
            checkpoints of one architecture differ.
        content_format: how the chat template wants ``message["content"]``; None: detect.
        tasks: what it can do: ``"generate"``, ``"embed"``.
        pooling: how the family's embedding models pool, unless the user says otherwise.
        default_limits: how many items of a modality one prompt may hold unless
            ``limit_mm_per_prompt`` says otherwise; a modality not named is unlimited.
        max_len: config -> longest context; None: ``max_position_embeddings``.
        stop_tokens: tokens that end an answer of this family, for checkpoints whose own settings do not
            name them all; those the tokenizer does not have are passed over.
        load_checkpoint: for other weight containers: folder -> (name, tensor) pairs; None: safetensors.
    """

    architecture: str
    build: Callable[[BuildContext], Model]
    positions: Callable[[Mapping[str, Any], Sequence[int], Sequence[PlacedMedia]], Positions] | None = None
    default_chat_template: str | Callable[[Mapping[str, Any]], str | None] | None = None
    content_format: Literal["openai", "string"] | None = None
    tasks: tuple[str, ...] = ("generate",)
    pooling: Pooling = field(default_factory=Pooling)
    default_limits: Mapping[Modality, int] = field(default_factory=dict)
    max_len: Callable[[Mapping[str, Any]], int] | None = None
    stop_tokens: tuple[str, ...] = ()
    load_checkpoint: Callable[[Path], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class InputMapperSpec:
    """How one architecture takes one modality. Key: (architecture, modality).

    ``build`` returns None for a checkpoint that does not take the modality, where others of the same
    architecture do.
    """

    architecture: str
    modality: Modality
    build: Callable[[InputContext], InputMapper | None]


@dataclass(frozen=True, kw_only=True)
class PlaceholderSpec:
    """How one architecture writes one modality in a prompt. Key: (architecture, modality).

    ``build`` returns None where that of the `InputMapperSpec` does.
    """

    architecture: str
    modality: Modality
    build: Callable[[InputContext], Placeholder | None]


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """A kind of device. Key: name.

    Attributes:
        name: as in ``device="cpu"`` or ``device="cuda:1"`` (the index goes to ``open``).
        torch_type: torch's device type.
        probe: never raises; imports what it must.
        open: index -> an opened device; raises ValueError for an index or a setting that cannot be.
    """

    name: str
    torch_type: str
    probe: Callable[[], Probe]
    open: Callable[[int], Device]


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """A device's own implementation of one op. Key: (device, op).

    Attributes:
        device: a `DeviceSpec` name.
        op: a name of the op table.
        load: imports and returns the kernel; its signature is the op's protocol in this module.
        supports: declines queries it cannot serve; they run on the reference, counted and shown.
    """

    device: str
    op: OpName
    load: Callable[[], Callable[..., Any]]
    supports: Callable[[KernelQuery], bool] = lambda query: True

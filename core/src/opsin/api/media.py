"""What travels from the user's picture to the model's embeddings, and how a plugin maps and places it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Modality = str
"""``"image"`` or ``"video"`` today; a plugin may introduce another name."""


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
        times: of a video, seconds from its beginning at which each frame is shown; None where nobody said
            so. Since 1.1.
    """

    modality: Modality
    digest: str
    pixels: np.ndarray[Any, Any] | None = None
    embeds: Mapping[str, Tensor] | None = None
    times: tuple[float, ...] | None = None


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

    @property
    def num_bytes(self) -> int:
        """Host memory of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), self.embeds) if tensor is not None)


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

    def __post_init__(self) -> None:
        """Raise ValueError where these cannot be positions."""
        shape: tuple[int, ...] = getattr(self.prompt, "shape", ())
        dtype = getattr(self.prompt, "dtype", type(self.prompt).__name__)
        if len(shape) != 2 or shape[0] < 1 or dtype != "int64":
            raise ValueError(f"positions are {dtype} {shape}; expected int64 (axes, tokens)")
        if list(self.switch_lengths) != sorted(set(self.switch_lengths)):
            raise ValueError(f"switch_lengths are {self.switch_lengths}; expected ascending lengths")


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


def _no_image_processor() -> Any:
    raise ValueError("there is no checkpoint here whose image processor could be loaded")


@dataclass(frozen=True, kw_only=True)
class InputContext:
    """What an input mapper or a placeholder is built from.

    Attributes:
        config: the checkpoint's config.json.
        preprocessor: its settings for images: of processor_config.json, or preprocessor_config.json (empty if
            it has neither).
        tokenizer: its tokenizer.
        options: the user's ``mm_processor_kwargs`` for the whole engine.
        video_preprocessor: its settings for videos: of processor_config.json, or
            video_preprocessor_config.json, or those for images. Since 1.1.
        read_json: name -> another JSON file of its folder; empty if there is no such file. Since 1.1.
        load_image_processor: loads transformers' image processor of the checkpoint, in its form without
            torchvision; raises ValueError where there is none. For `opsin.layers.ProcessorMapper`. Since 1.2.
    """

    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    tokenizer: Tokenizer
    options: Mapping[str, Any] = field(default_factory=dict)
    video_preprocessor: Mapping[str, Any] = field(default_factory=dict)
    read_json: Callable[[str], Mapping[str, Any]] = lambda name: {}  # noqa: ARG005 (its name is the protocol's)
    load_image_processor: Callable[[], Any] = _no_image_processor


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


@runtime_checkable
class EmbedCounter(Protocol):
    """What an `InputMapper` may have besides, so that too large media are refused undecoded. Since 1.1."""

    size_option: str | None
    """The ``mm_processor_kwargs`` that makes items smaller, for the error's advice; None: there is none."""

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """``num_embeds`` of what `InputMapper.map` makes of this size in pixels; an image is one frame.

        Raises:
            ValueError: as `InputMapper.map` for that size, or for the options.
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
        option_names: the ``mm_processor_kwargs`` it reads, accepted besides the input mapper's.
        expand_text: for families that write an item into the prompt before it is tokenized, such as a time in
            front of each frame, since these words may share tokens with those around them: mapped item and
            number -> the text that replaces the placeholder. It holds the token ``embed_token_id`` once per
            embedding. The item is the tokens from the first of them to the last; the rest of the text is the
            prompt's. ``expand`` serves prompts that are token ids (see `expand_by_text`). Since 1.2.
        embed_token_id: see ``expand_text``. Since 1.2.
    """

    text: Callable[[int], str]
    expand: Callable[[MappedMedia, int], Expansion]
    token_id: int | None = None
    special_tokens_per_chunk: bool = False
    tokenizes_whole: Callable[[Mapping[str, Any]], bool] | None = None
    option_names: frozenset[str] = frozenset()
    expand_text: Callable[[MappedMedia, int], str] | None = None
    embed_token_id: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for an ``expand_text`` whose embeddings nobody could find."""
        if (self.expand_text is None) != (self.embed_token_id is None):
            raise ValueError(
                f"expand_text is {self.expand_text}, embed_token_id {self.embed_token_id}; expected both or "
                "neither"
            )


def repeat_token(token_id: int) -> Callable[[MappedMedia, int], Expansion]:
    """For `Placeholder.expand`: an item becomes one token as often as it has embeddings."""

    def expand(mapped: MappedMedia, _number: int) -> Expansion:
        return Expansion(token_ids=[token_id] * mapped.num_embeds, is_embed=[True] * mapped.num_embeds)

    return expand


def expand_by_text(
    tokenizer: Tokenizer, expand_text: Callable[[MappedMedia, int], str], token_id: int
) -> Callable[[MappedMedia, int], Expansion]:
    """For `Placeholder.expand`: the tokens of an item's text alone, ``token_id`` once per embedding."""

    def expand(mapped: MappedMedia, number: int) -> Expansion:
        ids = tokenizer.encode(expand_text(mapped, number), add_special_tokens=False)
        return Expansion(token_ids=ids, is_embed=[token == token_id for token in ids])

    return expand

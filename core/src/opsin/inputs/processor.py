"""A prompt -> `ProcessedPrompt`: media mapped, placeholders expanded, positions set."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch

from opsin.api import (
    EmbedCounter,
    Expansion,
    InputMapper,
    MappedMedia,
    MediaItem,
    Modality,
    ModelSpec,
    PlacedMedia,
    Placeholder,
    ProcessedPrompt,
    Tokenizer,
)
from opsin.config import MediaLimits
from opsin.errors import ConfigError, MediaError, PromptTooLongError, RequestError, require_known
from opsin.inputs.cache import ByteLRU, HeldMedia
from opsin.inputs.conversation import check_limits
from opsin.inputs.media import MediaSource, embeds_item, errors_at, is_timed, open_media
from opsin.inputs.placeholders import Marker, PlaceholderFinder
from opsin.inputs.prompt import Prompt, PromptInput

PIECE = 2**16
"""Characters of a long text that are tokenized at a time to find out whether it is too long."""

UNSURE = 128
"""Tokens of each piece that do not count."""


@dataclass(kw_only=True, eq=False)
class PromptProcessor:
    """Turns prompts into `ProcessedPrompt`s, for one model. `process` is thread-safe.

    Attributes:
        model_spec: source of positions and default limits.
        mappers: input mapper of each modality that the model takes.
        placeholders: placeholder of each of them.
        tokenizer: the checkpoint's.
        config: its config.json.
        max_model_len: longest prompt plus output.
        vocab_size: token ids are below it.
        hidden_size: width of embeddings.
        limits: most items of each modality in one prompt, over the family's defaults; a modality not named is
            unlimited.
        options: ``mm_processor_kwargs`` for every prompt.
        media_limits: caps on the size of one item.
        mapped_media: mapped items, by content and options.
        held_media: counts the mapped items of the prompts that are not answered yet.

    Raises:
        ConfigError: a limit or an option has a name this model does not know.
    """

    model_spec: ModelSpec
    mappers: Mapping[Modality, InputMapper]
    placeholders: Mapping[Modality, Placeholder]
    tokenizer: Tokenizer
    config: Mapping[str, Any]
    max_model_len: int
    vocab_size: int
    hidden_size: int
    limits: Mapping[Modality, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    media_limits: MediaLimits = field(default_factory=MediaLimits)
    mapped_media: ByteLRU[MappedMedia] = field(default_factory=lambda: ByteLRU(512 * 2**20))
    held_media: HeldMedia = field(default_factory=lambda: HeldMedia(2**30))

    def __post_init__(self) -> None:
        if set(self.mappers) != set(self.placeholders):
            raise ConfigError(
                f"{self.model_spec.architecture} has input mappers for {sorted(self.mappers)} but "
                f"placeholders for {sorted(self.placeholders)}; its plugin must register both for each"
            )
        require_known("limit_mm_per_prompt", self.limits, self.mappers, ConfigError)
        self.limits = {**self.model_spec.default_limits, **self.limits}
        self._option_names = frozenset[str]().union(
            *(mapper.option_names for mapper in self.mappers.values()),
            *(placeholder.option_names for placeholder in self.placeholders.values()),
        )
        require_known("mm_processor_kwargs", self.options, self._option_names, ConfigError)
        self._finder = PlaceholderFinder(self.tokenizer, self.placeholders)
        self._mapping_now: dict[str, Future[MappedMedia]] = {}
        self._lock = threading.Lock()

    def process(self, prompt: PromptInput | Prompt, *, min_new_tokens: int = 1) -> ProcessedPrompt:
        """Process one prompt.

        Args:
            prompt: see `PromptInput`.
            min_new_tokens: room the context must leave; 0 for an embedding request.

        Raises:
            RequestError: the prompt is malformed, or its placeholders and media do not match.
            MediaError: a media item cannot be used, or there are too many.
            PromptTooLongError: it does not fit into the context once expanded.
        """
        try:
            return self._process(Prompt.parse(prompt), min_new_tokens)
        except RequestError as error:
            # Outputs keep errors; the frames of this one would keep pictures.
            error.__context__ = None
            raise error.with_traceback(None)  # noqa: B904 (it has no other cause)

    def _process(self, parsed: Prompt, min_new_tokens: int) -> ProcessedPrompt:
        require_known("mm_processor_kwargs", parsed.options, self._option_names, RequestError)
        values = self._media(parsed.media)
        counts = {modality: len(of_modality) for modality, of_modality in values.items()}
        check_limits(counts, self.limits)

        options = {**self.options, **parsed.options}
        media = self._opened(values, options)
        # What cannot fit is refused as soon as that is known: by sizes and lengths here, item by item later.
        num_embeds = sum(least for _, least in media.values())
        check_len = partial(self._check_len, min_new_tokens=min_new_tokens, modalities=counts)
        if parsed.token_ids is None:
            num_tokens = _least_tokens(self.tokenizer, parsed.text or "", self.max_model_len)
            check_len(num_tokens + num_embeds, num_embeds, exact=False)
        parts = self._parts(parsed, counts, options)
        token_ids, placed = self._expand(parts, media, options, check_len)

        positions = self.model_spec.positions
        return ProcessedPrompt(
            token_ids=token_ids,
            media=placed,
            positions=positions and positions(self.config, token_ids, placed),
            text=parsed.text,
            salt=parsed.salt,
        )

    def _media(self, data: Mapping[str, Any]) -> dict[Modality, list[Any]]:
        """Modality -> one value per item, not decoded yet: too many items are refused before any work."""
        require_known("multi_modal_data", data, self.mappers, RequestError)
        return {modality: list(self._values(modality, value)) for modality, value in data.items()}

    def _values(self, modality: Modality, value: Any) -> Iterable[Any]:
        if value is None:
            return []
        if _is_embeds(value):
            return self._split_embeds(modality, value)
        if not isinstance(value, (list, tuple)) or (modality == "video" and _is_frames(value)):
            return [value]
        if value and all(isinstance(element, torch.Tensor) and _is_embeds(element) for element in value):
            return self._split_embeds(modality, value)
        return chain.from_iterable(
            self._split_embeds(modality, element) if _is_embeds(element) else [element] for element in value
        )

    def _split_embeds(self, modality: Modality, value: Any) -> list[MediaItem]:
        with errors_at(modality):
            return [embeds_item(modality, part) for part in self.mappers[modality].split_embeds(value)]

    def _parts(
        self, parsed: Prompt, counts: Mapping[Modality, int], options: Mapping[str, Any]
    ) -> list[int | Marker]:
        if parsed.token_ids is None:
            parts = self._finder.in_text(parsed.text or "", counts, options)
        else:
            for token in parsed.token_ids:
                if not 0 <= token < self.vocab_size:
                    expected = f"expected 0 to {self.vocab_size - 1}"
                    raise RequestError(f"token id {token} is out of vocabulary; {expected}")
            parts = self._finder.in_ids(parsed.token_ids, counts)
        if not parts:
            raise RequestError("the prompt is empty; expected at least one token")
        return parts

    def _opened(
        self, values: Mapping[Modality, Sequence[Any]], options: Mapping[str, Any]
    ) -> dict[Marker, tuple[MediaSource, int]]:
        """Each item with its header read, and the least number of its embeddings."""
        opened = {}
        for modality, of_modality in values.items():
            mapper = self.mappers[modality]
            for number, value in enumerate(of_modality, 1):
                with errors_at(f"{modality} {number}"):
                    is_opened = isinstance(value, MediaSource)
                    source = value if is_opened else open_media(modality, value, self.media_limits)
                with errors_at(source.where or f"{modality} {number}"):
                    opened[Marker(modality, number)] = source, _least_embeds(mapper, source, options)
        return opened

    def _expand(
        self,
        parts: Sequence[int | Marker],
        media: Mapping[Marker, tuple[MediaSource, int]],
        options: Mapping[str, Any],
        check_len: Callable[..., None],
    ) -> tuple[list[int], list[PlacedMedia]]:
        """Put the expansion of each marker's item in its place, unless it turns out that they do not fit."""
        token_ids: list[int] = []
        placed: list[PlacedMedia] = []
        mapped_here: list[str] = []
        num_tokens = sum(not isinstance(part, Marker) for part in parts)
        num_embeds = sum(least for _, least in media.values())
        try:
            check_len(num_tokens + num_embeds, num_embeds, exact=not media)
            for part in parts:
                if not isinstance(part, Marker):
                    token_ids.append(part)
                    continue
                source, least = media[part]
                with errors_at(source.where or f"{part.modality} {part.number}"):
                    key, mapped = self._map(source.decode(), options, mapped_here)
                    expansion = self.placeholders[part.modality].expand(mapped, part.number)
                    self._check_embeds(mapped, expansion)
                placed.append(
                    PlacedMedia(
                        modality=part.modality,
                        key=key,
                        mapped=mapped,
                        start=len(token_ids),
                        is_embed=expansion.is_embed,
                    )
                )
                self.held_media.add(placed[-1])
                token_ids += expansion.token_ids
                num_embeds += mapped.num_embeds - least
                num_tokens += len(expansion.token_ids) - mapped.num_embeds
                check_len(num_tokens + num_embeds, num_embeds, exact=len(placed) == len(media))
        except RequestError:
            for key in mapped_here:
                self.mapped_media.discard(key)
            raise
        return token_ids, placed

    def _map(
        self, item: MediaItem, options: Mapping[str, Any], mapped_here: list[str]
    ) -> tuple[str, MappedMedia]:
        """The item's cache key and tensors. Equal items that arrive at the same time are mapped once.

        A key that is new to the cache is added to ``mapped_here``.
        """
        mapper = self.mappers[item.modality]
        mine = _options_of(mapper, options)
        key = item.digest
        if mine:
            key += "-" + hashlib.sha256(repr(mine).encode()).hexdigest()[:16]
        if item.embeds is not None:  # nothing is saved by keeping what the user already has
            return key, mapper.map(item, mine)
        with self._lock:
            known = self.mapped_media.get(key)
            if known is not None:
                return key, known
            own: Future[MappedMedia] = Future()
            running = self._mapping_now.setdefault(key, own)
        if running is not own:
            return key, running.result()
        try:
            mapped = mapper.map(item, mine)
            self.mapped_media.put(key, mapped, mapped.num_bytes)
            mapped_here.append(key)
            own.set_result(mapped)
            return key, mapped
        except BaseException as error:
            own.set_exception(error)
            raise
        finally:
            del self._mapping_now[key], own, running  # which hold the error, whose frames hold them

    def _check_embeds(self, mapped: MappedMedia, expansion: Expansion) -> None:
        """Refuse an item without one embedding per embed token, each as wide as the model."""
        num_rows = mapped.num_embeds
        if mapped.embeds is not None:
            shape = tuple(mapped.embeds.shape)
            if len(shape) != 2 or shape[1] != self.hidden_size:
                raise MediaError(f"the embeddings have shape {shape}; expected (tokens, {self.hidden_size})")
            num_rows = shape[0]
        num_embed_tokens = sum(expansion.is_embed)
        if not num_rows == mapped.num_embeds == num_embed_tokens:
            raise MediaError(f"{num_rows} embeddings for {num_embed_tokens} embed tokens; expected as many")
        if len(expansion.is_embed) != len(expansion.token_ids):
            raise MediaError(
                f"the placeholder expands to {len(expansion.token_ids)} tokens but describes "
                f"{len(expansion.is_embed)}; the plugin of {self.model_spec.architecture} is at fault"
            )

    def _check_len(
        self,
        num_tokens: int,
        num_embeds: int,
        *,
        exact: bool,
        min_new_tokens: int,
        modalities: Iterable[Modality],
    ) -> None:
        if num_tokens + min_new_tokens <= self.max_model_len:
            return
        mappers = [self.mappers[modality] for modality in modalities]
        options = sorted({m.size_option for m in mappers if isinstance(m, EmbedCounter) and m.size_option})
        advice = "Shorten the prompt, use smaller or fewer media, or raise max_model_len"
        if options and num_embeds:
            advice += f"; mm_processor_kwargs with a smaller {' or '.join(options)} makes media smaller"
        of_media = f" ({num_embeds} of them for media)" if num_embeds else ""
        room = f", at least {min_new_tokens} of them for output" if min_new_tokens else ""
        raise PromptTooLongError(
            f"the prompt has {'' if exact else 'at least '}{num_tokens} tokens{of_media}; the context holds "
            f"{self.max_model_len}{room}. {advice}"
        )


def _least_embeds(mapper: InputMapper, source: MediaSource, options: Mapping[str, Any]) -> int:
    """How many embeddings an item has at least, before it is decoded; 0 if nobody knows."""
    if source.size is None or not isinstance(mapper, EmbedCounter):
        return 0
    width, height, frames = source.size
    counts: list[int] = []
    refusals: list[ValueError] = []
    for sides in ((width, height), (height, width)):  # it may be shown turned
        try:
            counts.append(mapper.count_embeds(*sides, frames, _options_of(mapper, options)))
        except ValueError as error:
            refusals.append(error)
    if not counts:
        raise refusals[0]
    return min(counts)


def _options_of(mapper: InputMapper, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sorted(options.items()) if name in mapper.option_names}


def _least_tokens(tokenizer: Tokenizer, text: str, enough: int) -> int:
    """How many tokens a text has at least, tokenizing only as much of a long one as tells ``enough``.

    Long texts are tokenized in pieces. Next to a cut, tokens may be others than in the whole text, so that
    some of each piece do not count.
    """
    if len(text) <= max(PIECE, 8 * enough):  # rarely too long: a token has about four characters
        return 0
    num_tokens = 0
    for start in range(0, len(text), PIECE):
        piece = tokenizer.encode(text[start : start + PIECE], add_special_tokens=False)
        num_tokens += max(0, len(piece) - UNSURE)
        if num_tokens > enough:
            break
    return num_tokens


def _is_embeds(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, torch.Tensor) and value.is_floating_point())


def _is_frames(value: Sequence[Any]) -> bool:
    """Whether a list is one video, rather than a list of videos: every element is a single picture."""
    if is_timed(value):
        return True
    return bool(value) and all(
        hasattr(frame, "convert") or getattr(frame, "ndim", None) in (2, 3) for frame in value
    )

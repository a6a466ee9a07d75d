"""A prompt -> `ProcessedPrompt`: media mapped, placeholders expanded, positions set."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from opsin.errors import (
    ConfigError,
    MediaError,
    OpsinError,
    PromptTooLongError,
    RequestError,
    require_known,
)
from opsin.inputs.cache import ByteLRU, HeldMedia
from opsin.inputs.conversation import check_limits, place_of
from opsin.inputs.media import MediaSource, embeds_item, errors_at, is_timed, open_media
from opsin.inputs.placeholders import Marker, PlaceholderFinder, Written
from opsin.inputs.prompt import Prompt, PromptInput

logger = logging.getLogger(__name__)

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
        media_width: columns of embeddings of media.
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
    media_width: int
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

    def process(
        self, prompt: PromptInput | Prompt, *, min_new_tokens: int = 1, truncate: int | None = None
    ) -> ProcessedPrompt:
        """Process one prompt.

        Args:
            prompt: see `PromptInput`.
            min_new_tokens: room the context must leave; 0 for an embedding request.
            truncate: keep this many of the last tokens; -1: as many as the context holds; None: all.

        Raises:
            RequestError: the prompt is malformed, its placeholders and media do not match, or the model's
                plugin fails on it.
            MediaError: a media item cannot be used, or there are too many.
            PromptTooLongError: it does not fit into the context once expanded.
        """
        try:
            return self._process(Prompt.parse(prompt), min_new_tokens, truncate)
        except RequestError as error:
            # Outputs keep errors; the frames of this one would keep pictures.
            error.__context__ = None
            if error.__cause__ is not None:
                error.__cause__.__traceback__ = error.__cause__.__context__ = None
            raise error.with_traceback(None)  # noqa: B904 (it has no other cause)

    def _process(self, parsed: Prompt, min_new_tokens: int, truncate: int | None) -> ProcessedPrompt:
        require_known("mm_processor_kwargs", parsed.options, self._option_names, RequestError)
        values = self._media(parsed.media)
        counts = {modality: len(of_modality) for modality, of_modality in values.items()}
        check_limits(counts, self.limits)

        options = {**self.options, **parsed.options}
        media = self._opened(values, options)
        # What cannot fit is refused as soon as that is known: by sizes and lengths here, item by item later.
        num_embeds = sum(least for _, least in media.values())
        check_len = partial(self._check_len, min_new_tokens=min_new_tokens, modalities=counts)
        check_early = partial(check_len, whole=truncate is None)
        if parsed.token_ids is None:
            text = parsed.text or ""
            least = _least_tokens(self.tokenizer, text, self.max_model_len) if truncate is None else 0
            check_early(least + num_embeds, num_embeds, exact=False)
            if truncate is not None:
                self._check_text(text)
        parts = self._parts(parsed, counts, options)
        token_ids, placed = self._expand(parts, media, options, check_early)
        if parsed.token_ids is None and any(item.modality in self._finder.writes_text for item in placed):
            token_ids, placed = self._written(parsed, counts, parts, placed)
            check_early(len(token_ids), sum(sum(item.is_embed) for item in placed), exact=True)
        if truncate is not None:
            most = self.max_model_len - min_new_tokens if truncate == -1 else truncate
            token_ids, placed = _truncated(token_ids, placed, most)
            check_len(len(token_ids), sum(sum(item.is_embed) for item in placed), exact=True)
            for item in placed:
                self.held_media.add(item)

        positions = self.model_spec.positions
        with self._plugin("positions", OpsinError):
            rotary = positions and positions(self.config, token_ids, placed)
        if rotary is not None and rotary.prompt.shape[1] != len(token_ids):
            raise RequestError(
                f"{rotary.prompt.shape[1]} positions for {len(token_ids)} tokens; the plugin of "
                f"{self.model_spec.architecture} is at fault"
            )
        return ProcessedPrompt(
            token_ids=token_ids,
            media=placed,
            positions=rotary,
            text=parsed.text,
            salt=parsed.salt,
        )

    @contextmanager
    def _plugin(self, what: str, meant: type[Exception] = ValueError) -> Iterator[None]:
        """Turn errors of the model's plugin into a `RequestError`, but for those that are ``meant``."""
        try:
            yield
        except (meant, OpsinError):
            raise
        except Exception as error:
            logger.exception("%s failed in the plugin of %s", what, self.model_spec.architecture)
            raise RequestError(
                f"{what}: the plugin of {self.model_spec.architecture} failed with "
                f"{type(error).__name__}: {error}"
            ) from error

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
        with errors_at(modality), self._plugin("split_embeds"):
            return [embeds_item(modality, part) for part in self.mappers[modality].split_embeds(value)]

    def _parts(
        self, parsed: Prompt, counts: Mapping[Modality, int], options: Mapping[str, Any]
    ) -> list[int | Marker]:
        if parsed.token_ids is None:
            parts = self._finder.in_text(parsed.guarded or parsed.text or "", counts, options)
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
                is_opened = isinstance(value, MediaSource)
                where = (is_opened and value.where) or place_of(f"{modality} {number}", value)
                with errors_at(where):
                    source = value if is_opened else open_media(modality, value, self.media_limits)
                    with self._plugin("count_embeds"):
                        least = _least_embeds(mapper, source, options)
                opened[Marker(modality, number)] = replace(source, where=where), least
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
                with errors_at(source.where):
                    item = source.decode()
                    with self._plugin("map"):
                        key, mapped = self._map(item, options, mapped_here)
                    with self._plugin("expand"):
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

    def _written(
        self,
        parsed: Prompt,
        counts: Mapping[Modality, int],
        parts: Sequence[int | Marker],
        placed: Sequence[PlacedMedia],
    ) -> tuple[list[int], list[PlacedMedia]]:
        """The prompt tokenized with the items' text in it; ``placed`` are the items of the parts' markers."""
        items = dict(zip((part for part in parts if isinstance(part, Marker)), placed, strict=True))
        mapped = {marker: item.mapped for marker, item in items.items()}
        token_ids: list[int] = []
        moved: list[PlacedMedia] = []
        with self._plugin("expand_text"):
            written = self._finder.written(parsed.guarded or parsed.text or "", counts, mapped)
        for part in written:
            if isinstance(part, int):
                token_ids.append(part)
                continue
            marker = part.marker if isinstance(part, Written) else part
            item = items[marker]
            if isinstance(part, Written):
                expansion = part.expansion
            else:
                expansion = self.placeholders[marker.modality].expand(item.mapped, marker.number)
            moved.append(replace(item, start=len(token_ids), is_embed=expansion.is_embed))
            self.held_media.add(moved[-1])
            token_ids += expansion.token_ids
        return token_ids, moved

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
            if len(shape) != 2 or shape[1] != self.media_width:
                raise MediaError(f"the embeddings have shape {shape}; expected (tokens, {self.media_width})")
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
        whole: bool = True,
    ) -> None:
        """Refuse a prompt that does not fit; if it is not kept ``whole``, only media that do not fit."""
        if not whole:
            num_tokens = num_embeds
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

    def _check_text(self, text: str) -> None:
        most = max(2**20, 64 * self.max_model_len)  # a token rarely has more characters than 64
        if len(text) > most:
            raise PromptTooLongError(
                f"the prompt has {len(text)} characters; one that is to be truncated may have {most} for the "
                f"{self.max_model_len} tokens of the context. Cut it before"
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


def _truncated(
    token_ids: list[int], placed: list[PlacedMedia], most: int
) -> tuple[list[int], list[PlacedMedia]]:
    """The last ``most`` tokens.

    Raises:
        RequestError: a media item would be cut off.
    """
    cut = max(0, len(token_ids) - most)
    if placed and placed[0].start < cut:
        raise RequestError(
            f"truncate_prompt_tokens: keeping {most} of {len(token_ids)} tokens would cut off "
            f"{placed[0].modality} 1, which begins at {placed[0].start}; leave it out, or keep more"
        )
    return token_ids[cut:], [replace(item, start=item.start - cut) for item in placed]


def _is_embeds(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, torch.Tensor) and value.is_floating_point())


def _is_frames(value: Sequence[Any]) -> bool:
    """Whether a list is one video, rather than a list of videos: every element is a single picture."""
    if is_timed(value):
        return True
    return bool(value) and all(
        hasattr(frame, "convert") or getattr(frame, "ndim", None) in (2, 3) for frame in value
    )

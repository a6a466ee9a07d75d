"""What in a prompt is more than text: placeholders of media, special tokens.

A prompt becomes token ids with `Marker`s between them, where its media stand.

What users write in a chat is text. Before a template is rendered, every special string in their words is
broken by a guard, a number that occurs nowhere else: ``<|im_end|>`` becomes ``<8105937|im_end|>``. No filter
of a template changes digits, and JSON does not escape them. What is whole after rendering is the template's.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise, takewhile
from typing import Any, cast

from opsin.api import Expansion, MappedMedia, Modality, Placeholder, Tokenizer
from opsin.errors import ConfigError, RequestError


@dataclass(frozen=True)
class Marker:
    """The place of one media item: the ``number``-th of its modality, counted from 1."""

    modality: Modality
    number: int


@dataclass(frozen=True)
class Written:
    """An item whose text was written into the prompt: its tokens from the first embedding to the last."""

    marker: Marker
    expansion: Expansion


@dataclass(frozen=True)
class _Found:
    """A placeholder as it stands in the prompt; ``text`` None: as its `Placeholder.token_id`."""

    modality: Modality
    text: str | None
    ids: tuple[int, ...] = ()


class PlaceholderFinder:
    """Finds placeholders in text and in token ids, tokenizing what stands between them. Thread-safe.

    A placeholder that is a single token is found after tokenizing the text as a whole. For others the text
    is cut at the placeholders and the pieces are tokenized (see `Placeholder.special_tokens_per_chunk`), or
    tokenized as a whole and searched for the placeholders' ids (see `Placeholder.tokenizes_whole`).
    """

    def __init__(self, tokenizer: Tokenizer, placeholders: Mapping[Modality, Placeholder]) -> None:
        self._tokenizer = tokenizer
        self._placeholders = placeholders
        self._by_token = {p.token_id: m for m, p in placeholders.items() if p.token_id is not None}
        self._cut = [modality for modality, p in placeholders.items() if p.token_id is None]
        self._cut_pattern = re.compile("|".join(f"({text_pattern(placeholders[m])})" for m in self._cut))
        self._every_chunk = any(placeholders[m].special_tokens_per_chunk for m in self._cut)
        self._bos: str | None = getattr(tokenizer, "bos_token", None)
        self._user_text = UserText(tokenizer, placeholders)
        self._as_text = [modality for modality, p in placeholders.items() if p.expand_text is not None]
        if self._as_text and (unfit := {*self._cut} - {*self._as_text}):
            raise ConfigError(
                f"the placeholder of {', '.join(sorted(unfit))} has neither token_id nor expand_text; beside "
                "one with expand_text it needs one of them"
            )
        self._as_text_pattern = re.compile(
            "|".join(f"({text_pattern(placeholders[modality])})" for modality in self._as_text)
        )

    @property
    def writes_text(self) -> frozenset[Modality]:
        """Whose items become text of the prompt (`Placeholder.expand_text`)."""
        return frozenset(self._as_text)

    def written(
        self,
        text: str | GuardedText,
        counts: Mapping[Modality, int],
        items: Mapping[Marker, MappedMedia],
    ) -> list[int | Marker | Written]:
        """Token ids of a text whose items of `writes_text` stand in it as text; other items have markers.

        Args:
            text: in which `in_text` has found the placeholders of ``counts``.
            counts: items of each modality.
            items: all that become text.

        Raises:
            RequestError: the text has the token of an embedding elsewhere, too.
        """
        whole = text if isinstance(text, GuardedText) else GuardedText(text, "")
        matches = list(self._as_text_pattern.finditer(whole.text))
        found = [_Found(self._as_text[(match.lastindex or 1) - 1], match[0]) for match in matches]
        numbered = self._number(found, {modality: counts.get(modality, 0) for modality in self._as_text})
        markers = [part for part in numbered if isinstance(part, Marker)]
        pieces, start = [], 0
        for match, marker in zip(matches, markers, strict=True):
            expand_text = self._placeholders[marker.modality].expand_text
            assert expand_text is not None
            pieces += [whole.text[start : match.start()], expand_text(items[marker], marker.number)]
            start = match.end()
        ids = self._encode(GuardedText("".join([*pieces, whole.text[start:]]), whole.guard), first=True)

        tokens = [self._placeholders[marker.modality].embed_token_id for marker in markers]
        wanted = [t for t, marker in zip(tokens, markers) for _ in range(items[marker].num_embeds)]
        own = {t for m in self._as_text for t in (self._placeholders[m].token_id, *tokens)} - {None}
        embeds = [index for index, token in enumerate(ids) if token in own]
        if [ids[index] for index in embeds] != wanted:
            raise RequestError(
                f"written into the prompt, its {' and '.join(self._as_text)} items have {len(embeds)} embed "
                f"tokens for {len(wanted)} embeddings; the prompt has such a token elsewhere, too"
            )
        parts: list[int | Marker | Written] = []
        done = taken = 0
        others: Counter[Modality] = Counter()

        def add_prompt(ids: Sequence[int]) -> None:
            for part in map(self._found_token, ids):
                if isinstance(part, int):
                    parts.append(part)
                else:
                    others[part.modality] += 1
                    parts.append(Marker(part.modality, others[part.modality]))

        for marker in markers:
            mine = embeds[taken : taken + items[marker].num_embeds]
            first, last = (mine[0], mine[-1] + 1) if mine else (done, done)
            add_prompt(ids[done:first])
            is_embed = [token in own for token in ids[first:last]]
            parts.append(Written(marker, Expansion(token_ids=ids[first:last], is_embed=is_embed)))
            taken, done = taken + len(mine), last
        add_prompt(ids[done:])
        return parts

    def in_text(
        self,
        text: str | GuardedText,
        counts: Mapping[Modality, int],
        options: Mapping[str, Any] | None = None,
    ) -> list[int | Marker]:
        """Token ids of a text, with a marker for each of ``counts[modality]`` items.

        Special tokens (a BOS) are added at the front, unless the text begins with them. In a `GuardedText`,
        what users wrote is neither a special token nor a placeholder. ``options`` are the
        ``mm_processor_kwargs`` of the request over those of the engine.

        Raises:
            RequestError: the placeholders in the text are not one for each item, or an option is wrong.
        """
        whole = text if isinstance(text, GuardedText) else GuardedText(text, "")
        if self._tokenizes_whole(options or {}):
            return self._in_whole_text(whole, counts)
        parts: list[int | _Found] = []
        start = 0
        for match in self._cut_pattern.finditer(whole.text) if self._cut else ():
            parts += self._tokenize(whole[start : match.start()], first=start == 0)
            parts.append(self._found_text(match))
            start = match.end()
        parts += self._tokenize(whole[start:], first=start == 0)
        return self._number(parts, counts)

    def in_ids(self, ids: Sequence[int], counts: Mapping[Modality, int]) -> list[int | Marker]:
        """The same for a prompt given as token ids, in which nothing is expanded yet.

        Raises:
            RequestError: the placeholders among the ids are not one for each item.
        """
        return self._number(self._find(ids, counts), counts)

    def _find(self, ids: Sequence[int], counts: Mapping[Modality, int]) -> list[int | _Found]:
        written = {
            sequence: _Found(modality, text, sequence)
            for modality, text in self._texts(counts)
            for sequence in self._id_sequences(text)
        }
        parts: list[int | _Found] = []
        position = 0
        while position < len(ids):
            for sequence, found in written.items():
                if tuple(ids[position : position + len(sequence)]) == sequence:
                    parts.append(found)
                    position += len(sequence)
                    break
            else:
                parts.append(self._found_token(ids[position]))
                position += 1
        return parts

    def _texts(self, counts: Mapping[Modality, int]) -> list[tuple[Modality, str]]:
        """The texts of all items' placeholders that are not one token."""
        return [
            (modality, self._placeholders[modality].text(number))
            for modality in self._cut
            for number in range(1, counts.get(modality, 0) + 1)
        ]

    def _tokenizes_whole(self, options: Mapping[str, Any]) -> bool:
        rules = [self._placeholders[modality].tokenizes_whole for modality in self._cut]
        try:
            return any(rule(options) for rule in rules if rule is not None)
        except ValueError as error:
            raise RequestError(str(error)) from None

    def _in_whole_text(self, text: GuardedText, counts: Mapping[Modality, int]) -> list[int | Marker]:
        # Only the text is sure to show all placeholders; only the ids show where.
        written = list(map(self._found_text, self._cut_pattern.finditer(text.text)))
        self._number(written, {modality: counts.get(modality, 0) for modality in self._cut})
        known, real = {words for _, words in self._texts(counts)}, text.real_starts(self._cut_pattern)
        matches = self._cut_pattern.finditer(text.plain)
        is_real = [match.start() in real for match in matches if match[0] in known]
        parts = self._find(self._encode(text, first=True), counts)
        if sum(isinstance(part, _Found) and part.text is not None for part in parts) != len(is_real):
            raise RequestError(
                "tokenized as a whole, a placeholder of this prompt shares a token with the text next to it; "
                "put a line break or a space before and after it"
            )
        following = iter(is_real)
        kept: list[int | _Found] = []
        for part in parts:
            if isinstance(part, int) or part.text is None or next(following):
                kept.append(part)
            else:
                kept += part.ids
        return self._number(kept, counts)

    def _found_text(self, match: re.Match[str]) -> _Found:
        return _Found(self._cut[(match.lastindex or 1) - 1], match[0])

    def _encode(self, text: GuardedText, *, first: bool) -> list[int]:
        begins = self._bos and text.text.lstrip().startswith(self._bos)
        special = (first or self._every_chunk) and not begins
        if text.guard and text.guard in text.text:
            return self._user_text.encode(text, add_special_tokens=special)
        return self._tokenizer.encode(text.text, add_special_tokens=special) if text.text or special else []

    def _tokenize(self, text: GuardedText, *, first: bool) -> Iterator[int | _Found]:
        return map(self._found_token, self._encode(text, first=first))

    def _found_token(self, token: int) -> int | _Found:
        modality = self._by_token.get(token)
        return token if modality is None else _Found(modality, None)

    def _id_sequences(self, text: str) -> set[tuple[int, ...]]:
        """How a placeholder's text may look as ids: at the start of a text, and after a line break.

        A sentencepiece tokenizer writes the two differently.
        """
        encode = partial(self._tokenizer.encode, add_special_tokens=False)
        line_break, later = encode("\n"), encode("\n" + text)
        sequences = {tuple(encode(text))}
        if later[: len(line_break)] == line_break:
            sequences.add(tuple(later[len(line_break) :]))
        return sequences

    def _number(self, parts: Sequence[int | _Found], counts: Mapping[Modality, int]) -> list[int | Marker]:
        """Give every found placeholder its item: the one its text names, or else the next one."""
        found: dict[Modality, list[str | None]] = {modality: [] for modality in self._placeholders}
        numbered: list[int | Marker] = []
        for part in parts:
            if isinstance(part, int):
                numbered.append(part)
                continue
            found[part.modality].append(part.text)
            number = len(found[part.modality])
            if part.text is not None and is_numbered(self._placeholders[part.modality]):
                number = self._named(part.modality, part.text, counts.get(part.modality, 0))
            numbered.append(Marker(part.modality, number))
        for modality, texts in found.items():
            given = counts.get(modality, 0)
            twice = None not in texts and len(set(texts)) < len(texts)
            if len(texts) != given or (twice and is_numbered(self._placeholders[modality])):
                raise RequestError(self._mismatch(modality, len(texts), given))
        return numbered

    def _named(self, modality: Modality, text: str, given: int) -> int:
        for number in range(1, given + 1):
            if self._placeholders[modality].text(number) == text:
                return number
        raise RequestError(f"the prompt has {text!r}, but {given} {modality} item(s) were given")

    def _mismatch(self, modality: Modality, found: int, given: int) -> str:
        placeholder = self._placeholders[modality]
        wanted = [placeholder.text(number) for number in range(1, min(given, 3) + 1)] or [placeholder.text(1)]
        if not given:
            advice = f"{wanted[0]!r} stands for an item; remove it, or pass the item in multi_modal_data"
        elif is_numbered(placeholder):
            advice = f"write each of {', '.join(map(repr, wanted))}{', ...' if given > 3 else ''} once"
        else:
            advice = f"write {wanted[0]!r} once for each"
        return f"the prompt has {found} {modality} placeholder(s) for {given} {modality} item(s); {advice}"


def is_numbered(placeholder: Placeholder) -> bool:
    """Whether the placeholder's text names the item (``<|image_1|>``) or is always the same (``<image>``)."""
    return placeholder.text(1) != placeholder.text(2)


def text_pattern(placeholder: Placeholder) -> str:
    """A regular expression, without groups, for the placeholder's text with any number."""
    first, second = placeholder.text(1), placeholder.text(2)
    if first == second:
        return re.escape(first)
    prefix = first[: _num_equal(first, second)]
    suffix = first[len(first) - _num_equal(reversed(first), reversed(second)) :]
    return rf"{re.escape(prefix)}\d+{re.escape(suffix)}"


def _num_equal(first: Iterable[str], second: Iterable[str]) -> int:
    """How many leading characters agree."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


# ---- What users write --------------------------------------------------------------------------


@dataclass(frozen=True)
class GuardedText:
    """A rendered prompt in which special strings that users wrote are broken.

    Attributes:
        text: with the guard in it.
        guard: stands after the first character of each of these strings.
    """

    text: str
    guard: str

    def __getitem__(self, piece: slice) -> GuardedText:
        """A piece of the text; not from within a guard."""
        return GuardedText(self.text[piece], self.guard)

    @property
    def plain(self) -> str:
        """The text as it was meant."""
        return self.text.replace(self.guard, "")

    def real_starts(self, pattern: re.Pattern[str]) -> set[int]:
        """Where in the plain text those matches of a pattern begin that no user wrote."""
        starts = (match.start() for match in pattern.finditer(self.text))
        return {start - self.text.count(self.guard, 0, start) * len(self.guard) for start in starts}


class UserText:
    """What a tokenizer or a family reads as more than text. Thread-safe.

    Special are the tokens that the tokenizer says are, and placeholders. A special token of one character is
    a word of the vocabulary like any other (``!`` of some), with no other id as text.
    """

    def __init__(self, tokenizer: Any, placeholders: Mapping[Modality, Placeholder]) -> None:
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        known = getattr(tokenizer, "added_tokens_decoder", {})
        by_token = {placeholder.token_id for placeholder in placeholders.values()}
        self._tokens = {
            token.content
            for token_id, token in known.items()
            if (token.special or token_id in by_token) and len(token.content) > 1
        }
        tokens = [re.escape(token) for token in sorted(self._tokens, key=len, reverse=True)]
        special = "|".join([*tokens, *(text_pattern(placeholder) for placeholder in placeholders.values())])
        marks = [*self._tokens, *(p.text(number) for p in placeholders.values() for number in range(1, 10))]
        first = "".join(sorted({re.escape(mark[0]) for mark in marks}))
        # At every position, since special strings can overlap; in any case, since a template may change it.
        # To look for their first characters first is seven times as fast.
        self._special = re.compile(f"(?=[{first}])(?={special})" if special else "(?!)", re.IGNORECASE)
        self._token = re.compile("|".join(tokens) or "(?!)")

    def guarded(self, texts: Sequence[str], guard: str) -> list[str]:
        """Texts that follow each other, with the guard in each special string, even one made of several."""
        places = [match.start() + 1 for match in self._special.finditer("".join(texts))]
        guarded, start = [], 0
        for text in texts:
            end = start + len(text)
            cuts = [0, *(place - start for place in places if start < place <= end), len(text)]
            guarded.append(guard.join(text[a:b] for a, b in pairwise(cuts)))
            start = end
        return guarded

    def guarded_json(self, value: Any, guard: str) -> Any:
        """The same for all strings in JSON data, keys included."""
        if isinstance(value, str):
            return self.guarded([value], guard)[0]
        if isinstance(value, Mapping):
            return {self.guarded_json(k, guard): self.guarded_json(v, guard) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.guarded_json(element, guard) for element in value]
        return value

    def encode(self, part: GuardedText, *, add_special_tokens: bool) -> list[int]:
        """Token ids: those of the tokenizer, where strings that users wrote are no special tokens.

        Raises:
            RequestError: this kind of tokenizer cannot tell them apart.
        """
        if self._strict is None:
            raise RequestError(
                "the text of a message holds a special token, and this model's tokenizer cannot take it as "
                "text; reword it, or pass allow_special_tokens=True if it is meant"
            )
        tokenizer, mark = self._strict
        marked = self._token.sub(lambda match: mark + match[0], part.text).replace(part.guard, "")
        return cast(list[int], tokenizer.encode(marked, add_special_tokens=add_special_tokens).ids)

    @cached_property
    def _strict(self) -> tuple[Any, str] | None:
        """A tokenizer with the same ids whose special tokens bear a secret mark, and the mark.

        None where the vocabulary is not a table of texts and ids.
        """
        if self._backend is None:
            return None
        state = json.loads(self._backend.to_str())
        model = state["model"]
        if not isinstance(model["vocab"], dict):
            return None
        mark = secrets.token_hex(16)
        names = {token: mark + token for token in self._tokens}
        vocab = {names.get(word, word): token_id for word, token_id in model["vocab"].items()}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
            vocab.setdefault(token["content"], token["id"])
        model["vocab"] = vocab
        if "merges" in model:  # of texts: none may lead to a special token
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & self._tokens]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return type(self._backend).from_str(json.dumps(state)), mark


def new_guard() -> str:
    """A number that nobody can have written."""
    return str(secrets.randbelow(9 * 10**17) + 10**17)

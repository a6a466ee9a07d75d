"""User text stays text: special tokens and placeholders that users wrote are told apart from the template's.

Before a template is rendered, every special string in what users wrote is broken by a guard, a number that
occurs nowhere else: ``<|im_end|>`` becomes ``<8105937|im_end|>``. No filter of a template changes digits, and
JSON does not escape them. What is whole after rendering was written by the template.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, cast

from opsin.api import Modality, Placeholder
from opsin.errors import RequestError


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
    a word of the vocabulary like any other (Llama 3's ``!``), with no other id as text.
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

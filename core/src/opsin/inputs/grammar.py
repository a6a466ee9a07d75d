"""Constrained output: which tokens may come next. Why llguidance: docs/decisions/0050."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opsin.errors import RequestError
from opsin.params import StructuredOutput

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as json.dumps writes it. Free white space would let a model write it forever."""


MAX_KEPT = 32
"""Most compiled constraints that are kept."""

MAX_CHARACTERS = 200_000
"""Longest schema, expression or grammar."""

MAX_PROPERTIES = 1_000
"""Most properties of one object: the time to compile them grows with their square (4 s for 5,000)."""


class Grammar:
    """One sequence's constraint, and how many of its tokens it has seen."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._num_taken = 0

    def allowed(self, output_ids: Sequence[int], vocab_size: int) -> Tensor:
        """bool (vocab_size,), the tokens that may follow ``output_ids``.

        Raises:
            RequestError: the constraint cannot be followed any further.
        """
        self._go_to(output_ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise RequestError(f"the output constraint failed: {_first_line(self._matcher.get_error())}")
        return torch.from_numpy(np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_))

    def num_valid(self, output_ids: Sequence[int], draft: Sequence[int]) -> int:
        """How many tokens of ``draft`` may follow ``output_ids``, one after the other."""
        self._go_to(output_ids)
        # In an error state none may; `allowed` says why.
        return 0 if self._matcher.is_error() else int(self._matcher.validate_tokens(list(draft)))

    def _go_to(self, output_ids: Sequence[int]) -> None:
        """Take new tokens, or give back those that are no longer there: a step may be tried again."""
        if len(output_ids) < self._num_taken:
            self._matcher.rollback(self._num_taken - len(output_ids))
        else:
            self._matcher.consume_tokens(list(output_ids[self._num_taken :]))
        self._num_taken = len(output_ids)


class GrammarCompiler:
    """Makes grammars for one tokenizer, and keeps the latest. Thread-safe.

    The tokenizer's tables are built on first use.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tables: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._known_lock = threading.Lock()

    def compile(self, wanted: StructuredOutput) -> Grammar:
        """A fresh grammar, at its beginning: a copy of the one that was compiled from an equal constraint.

        Raises:
            RequestError: the schema, expression or grammar is not valid, or too large; or the library is
                missing.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError("constrained output needs llguidance; pip install llguidance") from None
        try:
            source = _source(wanted)
        except ValueError as error:
            raise RequestError(f"the output constraint is not valid: {_first_line(str(error))}") from None
        with self._known_lock:
            matcher = self._known.pop(source, None)
            if matcher is not None:
                self._known[source] = matcher
        if matcher is None:
            matcher = LLMatcher(self._load_tables(), source, log_level=0)
            if matcher.is_error():
                raise RequestError(f"the output constraint is not valid: {_first_line(matcher.get_error())}")
            matcher.compute_bitmask()  # the first one builds what copies then share
            with self._known_lock:
                self._known[source] = matcher
                if len(self._known) > MAX_KEPT:
                    self._known.popitem(last=False)
        return Grammar(matcher.deep_copy())

    def _load_tables(self) -> LLTokenizer:
        from llguidance import hf

        with self._lock:
            if self._tables is None:
                self._tables = hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None
                )
            return self._tables


def _source(wanted: StructuredOutput) -> str:
    """llguidance's form of a constraint.

    Raises:
        RequestError: it is too large.
        ValueError: it is not JSON.
    """
    from llguidance import LLMatcher

    schema = {"type": "object"} if wanted.json_object else wanted.json
    if schema is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        _check_length(text)
        _check_properties(json.loads(text))
        return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_STYLE)
    if wanted.regex is not None:
        _check_length(wanted.regex)
        return LLMatcher.grammar_from_regex(wanted.regex)
    text = wanted.grammar or "start: " + " | ".join(map(json.dumps, wanted.choice or ()))
    _check_length(text)
    return LLMatcher.grammar_from_lark(_as_lark(text))


def _as_lark(text: str) -> str:
    """A grammar in Lark's notation, from it or from GBNF; what has ``::=`` is GBNF.

    Raises:
        ValueError: it is GBNF, and not valid.
    """
    from llguidance import gbnf_to_lark

    if gbnf_to_lark.is_lark_syntax(text):
        return text
    try:
        return str(gbnf_to_lark.gbnf_to_lark(text))
    except Exception as error:  # the converter's own errors have no common class
        raise ValueError(f"GBNF: {error}") from None


def _check_length(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise RequestError(
            f"the output constraint is too large: {len(text)} characters; "
            f"at most {MAX_CHARACTERS} are accepted"
        )


def _check_properties(schema: Any) -> None:
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            properties = node.get("properties")
            if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
                raise RequestError(
                    f"the output constraint is too large: an object of {len(properties)} properties; at most "
                    f"{MAX_PROPERTIES} are accepted"
                )
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "unknown error"

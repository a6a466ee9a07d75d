"""`Logprob`s -> the forms that OpenAI and vLLM give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from opsin.results import Logprob
from opsin.server.schema.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""

Entries = Mapping[int, Logprob]
"""Token id -> its place; the chosen token comes first."""


def chat_logprobs(tokens: Iterable[Entries], num_top: int) -> ChatLogprobs:
    """The form of chat answers, with ``num_top`` alternatives each."""

    def described(entry: Logprob) -> dict[str, Any]:
        text = entry.decoded_token or ""
        return {"token": text, "logprob": _number(entry), "bytes": list(text.encode("utf-8", "replace"))}

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **described(next(iter(entries.values()))),
                top_logprobs=[TopLogprob(**described(entry)) for entry in _best(entries, num_top)],
            )
            for entries in tokens
        ]
    )


def completion_logprobs(
    tokens: Sequence[Entries | None], num_top: int, offset: int = 0, *, unpredicted: str = ""
) -> CompletionLogprobs:
    """The form of completions.

    Args:
        tokens: None for a token that nothing predicts.
        num_top: alternatives each.
        offset: characters before the first token.
        unpredicted: text of the tokens that nothing predicts.
    """
    chosen = [next(iter(entries.values())) if entries else None for entries in tokens]
    texts = [unpredicted if entry is None else entry.decoded_token or "" for entry in chosen]
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[None if entry is None else _number(entry) for entry in chosen],
        top_logprobs=[
            {entry.decoded_token or "": _number(entry) for entry in _best(entries, num_top)}
            if entries
            else None
            for entries in tokens
        ],
        text_offset=list(accumulate(map(len, texts), initial=offset))[:-1],
    )


def prompt_logprobs(
    tokens: Sequence[Entries | None] | None,
) -> list[dict[str, dict[str, Any]] | None] | None:
    """vLLM's form: one entry per prompt token, by token id."""
    if tokens is None:
        return None
    return [
        None
        if entries is None
        else {
            str(token): {"logprob": _number(e), "rank": e.rank, "decoded_token": e.decoded_token}
            for token, e in entries.items()
        }
        for entries in tokens
    ]


def _best(entries: Entries, count: int) -> list[Logprob]:
    """The most probable ones, with or without the token itself."""
    return sorted(entries.values(), key=lambda entry: -entry.logprob)[:count]


def _number(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST)

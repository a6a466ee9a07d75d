"""`Logprob`s -> the forms that OpenAI and vLLM give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opsin.results import Logprob
from opsin.server.schema.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON has no number for."""

Entries = Mapping[int, Logprob]
"""Token id -> its place, the token itself first."""


def chat_logprobs(tokens: Iterable[Entries], num_top: int) -> ChatLogprobs:
    """The form of chat answers, with ``num_top`` alternatives each."""
    content = []
    for entries in tokens:
        chosen = next(iter(entries.values()))
        token = _top(chosen)
        content.append(
            TokenLogprob(
                token=token.token,
                logprob=token.logprob,
                bytes=token.bytes,
                top_logprobs=[_top(entry) for entry in _best(entries, num_top)],
            )
        )
    return ChatLogprobs(content=content)


def completion_logprobs(
    tokens: Sequence[Entries | None], texts: Sequence[str], num_top: int, offset: int
) -> CompletionLogprobs:
    """The form of completions.

    Args:
        tokens: None for a token that nothing predicts.
        texts: of the tokens.
        num_top: alternatives each.
        offset: characters before the first of them.
    """
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return CompletionLogprobs(
        tokens=list(texts),
        token_logprobs=[
            None if entries is None else _number(next(iter(entries.values()))) for entries in tokens
        ],
        top_logprobs=[
            None
            if entries is None
            else {entry.decoded_token or "": _number(entry) for entry in _best(entries, num_top)}
            for entries in tokens
        ],
        text_offset=offsets,
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
    """The most probable ones; the token itself may be among them or not."""
    return sorted(entries.values(), key=lambda entry: -entry.logprob)[:count]


def _top(entry: Logprob) -> TopLogprob:
    text = entry.decoded_token or ""
    return TopLogprob(token=text, logprob=_number(entry), bytes=list(text.encode("utf-8", "replace")))


def _number(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST)

"""From tokens to text: incremental detokenisation, stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from opsin.api import Tokenizer

REPLACEMENT = "\ufffd"
"""What tokenizers decode bytes to that are not UTF-8, half a character among them."""

MAX_HALF = 3
"""Most replacement characters that half a character decodes to: a UTF-8 character has up to 4 bytes."""


class Detokenizer:
    """Turns token ids into text piece by piece, in constant time per token.

    Each token is decoded after a few earlier ones, because tokenizers decode the first token of a text
    differently (sentencepiece drops its leading space). The joined pieces equal the text decoded at once;
    docs/decisions/0031-detokenisation.md names the one case where they cannot.

    Args:
        tokenizer: with ``clean_up_tokenization_spaces`` off.
        prompt_ids: what the text follows; only the last few matter.
        skip_special_tokens: leave special tokens out.
    """

    WINDOW = 4
    """Tokens of context kept; it grows to twice as many before it is cut back."""

    MAX_HELD = 16
    """Most tokens held back while no complete character comes (only garbage does that)."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        # transformers' wrapper takes 5 times as long.
        self._decoder: Tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []
        self._text = ""
        self._shown = 0
        self._adopt(prompt_ids)

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that it completes, never ending in half a character."""
        held = self._held
        held.append(token_id)
        text = self._decode_held()
        if text and text[-1] != REPLACEMENT:
            piece = text[self._shown :]
            self._settle(text)
            return piece
        # The last few replacement characters may be half a character; what precedes them is final.
        stable = max(len(text.rstrip(REPLACEMENT)), len(text) - MAX_HALF)
        piece = text[self._shown : stable]
        self._text, self._shown = text, max(self._shown, stable)
        if len(held) > self.MAX_HELD:
            self._drop_oldest_held()
        return piece

    def flush(self) -> str:
        """The text still held back, with half a character as U+FFFD. Call it once, at the end."""
        piece = self._text[self._shown :]
        self._held, self._text, self._shown = [], "", 0
        return piece

    def token_text(self, token_id: int) -> str:
        """Text of one token as it reads after other text; special tokens included."""
        context = self._decoder.decode(self._context, skip_special_tokens=False)
        both = self._decoder.decode([*self._context, token_id], skip_special_tokens=False)
        return both[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        return self._decoder.decode(ids, skip_special_tokens=self._skip)

    def _decode_held(self) -> str:
        """Text of the held tokens after the context."""
        text = self._decode(self._context + self._held)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # The context ends in byte tokens, and sentencepiece decodes a run of them as a whole: bytes that are
        # not a character (yet) spoil it. It has been shown; what is held begins with bytes and needs none.
        return self._decode(self._held)

    def _adopt(self, prompt_ids: Sequence[int]) -> None:
        """Take the longest short suffix of the prompt that reads as whole characters as context."""
        tail = list(prompt_ids[-2 * self.WINDOW - MAX_HALF :])
        for num_held in range(MAX_HALF + 1):  # a prompt of token ids may end in half a character
            end = len(tail) - num_held
            for start in range(max(0, end - 2 * self.WINDOW), end):
                text = self._decode(tail[start:end])
                if text and REPLACEMENT not in text:
                    self._context, self._context_text = tail[start:end], text
                    self._held = tail[end:]
                    return

    def _settle(self, text: str) -> None:
        """All held tokens are final: go on after them."""
        if len(self._held) == 1 or not self._context:
            self._context += self._held
            self._context_text += text
            if len(self._context) > 2 * self.WINDOW:
                shorter = self._context[-self.WINDOW :]
                shorter_text = self._decode(shorter)
                if shorter_text and REPLACEMENT not in shorter_text:
                    self._context, self._context_text = shorter, shorter_text
        # A character of several tokens does not become context: cut in its middle it would be garbage.
        self._held, self._text, self._shown = [], "", 0

    def _drop_oldest_held(self) -> None:
        """Limit garbage; what was not shown yet stays."""
        unshown = len(self._text) - self._shown
        self._held = self._held[-(self.MAX_HELD - self.WINDOW) :]
        self._text = self._decode_held()
        self._shown = max(0, len(self._text) - unshown)


class StopStrings:
    """Finds stop strings in growing text, and how much of its end may still become one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._prefixes = {string[:size] for string in strings for size in range(1, len(string))}
        self._longest = max(map(len, self._prefixes), default=0)

    def find(self, text: str, num_old: int) -> tuple[int, str] | None:
        """The first stop string to be complete, if it ends after the ``num_old`` characters already searched.

        Returns:
            Where it starts, and the string. Of several that end together, the longest.
        """
        found: tuple[int, int, str] | None = None
        for string in self._strings:
            start = text.find(string, max(0, num_old - len(string) + 1))
            if start >= 0 and (found is None or (start + len(string), start) < found[:2]):
                found = (start + len(string), start, string)
        return None if found is None else (found[1], found[2])

    def num_pending(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self._prefixes:
                return size
        return 0

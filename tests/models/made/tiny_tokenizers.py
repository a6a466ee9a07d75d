"""Small byte-level BPE tokenizers, trained here, that split text as the published ones do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[3]

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer splits text before merging."""


def gpt2_splitter() -> pre_tokenizers.PreTokenizer:
    """As SmolLM2's tokenizer: single digits, then GPT-2's pattern."""
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(parts)


def qwen_splitter() -> pre_tokenizers.PreTokenizer:
    """As Qwen2's tokenizer."""
    parts = [
        pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


def trained(
    splitter: pre_tokenizers.PreTokenizer,
    corpus: Sequence[str],
    special: Sequence[str],
    named: Mapping[str, Any],
    vocab_size: int = 480,
) -> PreTrainedTokenizerFast:
    """A tokenizer of ``vocab_size`` words and the ``special`` tokens.

    Args:
        splitter: pre-tokenizer.
        corpus: texts to learn from, besides the licence.
        special: special tokens, which get the ids after the words.
        named: attributes of the tokenizer, such as ``bos_token``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [*corpus, (ROOT / "LICENSE").read_text(encoding="utf-8")[:6000]]
    tokenizer.train_from_iterator(texts, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    whole.add_special_tokens(
        {"additional_special_tokens": [token for token in special if token not in named.values()]}
    )
    return whole

"""The tokenizer in a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

from opsin.api import Tokenizer
from opsin.checkpoint.files import read_json
from opsin.errors import CheckpointError


class ChatTokenizer(Tokenizer, Protocol):
    """The part of a transformers tokenizer that renders chats, in transformers' own sandbox."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def load_tokenizer(path: Path) -> ChatTokenizer:
    """The tokenizer in a checkpoint's folder.

    Of the class that transformers ships for its model type, otherwise as tokenizer.json describes it. A class
    that the folder brings as Python code is never used.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = read_json(path / "config.json", needed=False)
    settings = read_json(path / "tokenizer_config.json", needed=False)
    brings_code = "auto_map" in config or "auto_map" in settings
    known = config.get("model_type") in CONFIG_MAPPING_NAMES and not brings_code
    if not known and not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path} has no tokenizer.json, and its tokenizer class is not one that transformers ships "
            f"(tokenizer_class {settings.get('tokenizer_class')!r}); code from a checkpoint is never run. "
            "Add a tokenizer.json made from its tokenizer"
        )
    loader = AutoTokenizer if known else PreTrainedTokenizerFast
    try:
        tokenizer = loader.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # the many readers behind this raise anything for a malformed file
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {reason:.300}") from error
    return cast(ChatTokenizer, tokenizer)

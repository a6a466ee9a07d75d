"""opsin's demonstration model, as a folder laid out like a repository of the Qwen2-VL family."""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder that holds the configuration, tokenizer and weights."""
    return Path(__file__).resolve().parent / "model"

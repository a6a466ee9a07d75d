"""A demonstration model of opsin, as a folder laid out like a repository of Phi-3.5-vision."""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder that holds the configuration, tokenizer and weights."""
    return Path(__file__).resolve().parent / "model"

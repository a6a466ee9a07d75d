"""A model of 2 billion parameters, from disk, through `LLM`: right answers, memory, times (``pytest -s``)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from tokenizers import Tokenizer

from opsin_device_cpu.device import copy_bytes
from tests.models.full_size.hub_layout import GOLDEN, hub_shapes, published_config
from tests.models.full_size.on_disk import write_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
NAME = "Qwen2-VL-2B-Instruct"
PICTURE = GOLDEN / "images" / "coffee_320x213.png"
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is shown in this image?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PROMPT_IDS = [
    *(151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 151652, 151655),
    *(151653, 3838, 374, 6839, 304, 419, 2168, 30, 151645, 198, 151644, 77091, 198),
]
"""What the published tokenizer gives (recorded), the picture as one token."""
NUM_TOKENS = 16

MACHINE_BYTES = 24 * 10**9
SLACK_BYTES = 2 * 2**30
"""For libraries, the tokenizer, activations, and freed memory that the allocator keeps."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The checkpoint, deleted afterwards: 4.4 GB."""
    with TemporaryDirectory(prefix="opsin-full-size-") as name:
        num_bytes = write_checkpoint(Path(name), NAME)
        assert num_bytes == 4_417_971_200, "total_size in the published index"
        yield Path(name)


def run(**asked: Any) -> dict[str, Any]:
    """`tests.models.full_size.run_once` in a process of its own."""
    command = [sys.executable, "-m", "tests.models.full_size.run_once", json.dumps(asked)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def test_the_vocabulary_is_the_published_one(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 151657
    assert tokenizer.encode(PROMPT).ids == PROMPT_IDS
    text = "这张图片里有什么？ Größe ¿qué? 日本語 한국어 🚀"
    assert tokenizer.encode(text).ids[:5] == [108893, 45930, 69249, 104139, 11319]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_it_answers_as_transformers_within_its_memory(folder: Path, dtype: str, tolerance: float) -> None:
    """Random weights, so the logits are flat; the log-probabilities of what was chosen are compared."""
    here = {"folder": str(folder), "picture": str(PICTURE), "num_tokens": NUM_TOKENS}
    ours = run(dtype=dtype, prompt=PROMPT, **here)
    collapsed = [
        token for token, same in groupby(ours["prompt_token_ids"]) for _ in (same if token != 151655 else [0])
    ]
    assert collapsed == PROMPT_IDS
    assert len(ours["prompt_token_ids"]) == len(PROMPT_IDS) - 1 + 88, "308x224 pixels, 28x28 each"

    theirs = run(dtype="float32", token_ids=ours["prompt_token_ids"] + ours["token_ids"], **here)
    pairs = zip(ours["logprobs"], theirs["logprobs"], strict=True)
    assert max(abs(mine - other) for mine, other in pairs) < tolerance
    if dtype == "float32":
        assert ours["token_ids"] == theirs["token_ids"]

    weights = sum(map(prod, hub_shapes(published_config(NAME)).values())) * (4 if dtype == "float32" else 2)
    known = weights + copy_bytes() + 256 * 2**20  # and the KV cache
    assert weights < ours["resident_bytes"] <= ours["peak_bytes"] < known + SLACK_BYTES
    assert ours["peak_with_files_bytes"] < MACHINE_BYTES
    print(
        f"\n{NAME} in {dtype}: private memory {_gib(ours['peak_bytes'])} at the peak, "
        f"{_gib(ours['load_peak_bytes'])} while loading (weights {_gib(weights)}); "
        f"{_gib(ours['peak_with_files_bytes'])} with mapped files"
    )
    prompt, answer = len(ours["prompt_token_ids"]), NUM_TOKENS - 1
    for clock in ("wall_s", "processor_s"):
        load, prefill, decode = (ours[stage][clock] for stage in ("load", "prefill", "decode"))
        print(
            f"{clock}: load {load:.0f}; "
            f"{prompt} prompt tokens with the picture {prefill:.1f} ({prompt / prefill:.1f} tokens/s); "
            f"{answer} more tokens {decode:.1f} ({answer / decode:.2f} tokens/s)"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

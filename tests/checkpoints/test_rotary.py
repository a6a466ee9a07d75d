"""Rotary tables of every type, against the formulas of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, Qwen2VLTextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from opsin import LLM, SamplingParams
from opsin.layers import RotaryTable, inverse_frequencies, text_config
from tests.models.golden import GOLDEN, recorded_logits

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096}
HEAD = 64
FACTORS = {
    "short_factor": [1.0 + 0.01 * i for i in range(HEAD // 2)],
    "long_factor": [1.0 + i for i in range(HEAD // 2)],
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 7.5},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 40.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
    {**LLAMA3, "original_max_position_embeddings": 1024},
    {**LLAMA3, "factor": 32.0, "high_freq_factor": 2.0},
    {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 1024},
    {"rope_type": "longrope", **FACTORS, "factor": 16.0, "original_max_position_embeddings": 512},
    {"rope_type": "longrope", **FACTORS, "attention_factor": 1.1, "original_max_position_embeddings": 1024},
]


def name_of(value: object) -> str | None:
    return str(value["rope_type"]) if isinstance(value, dict) else None


def turned(inverse: Tensor, factor: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions.float()[:, None] * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * factor, angles.sin() * factor


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS, ids=name_of)
def test_a_table_has_the_values_of_transformers(scaling: dict[str, Any], theta: float) -> None:
    theirs = LlamaConfig(**SIZES, rope_parameters={**scaling, "rope_theta": theta})
    ours = RotaryTable.from_config(
        text_config({**SIZES, "rope_theta": theta, "rope_scaling": scaling}), HEAD, "cpu"
    )
    original = scaling.get("original_max_position_embeddings", SIZES["max_position_embeddings"])
    lengths = [16, original, original + 1, 4 * original]
    if scaling["rope_type"] == "dynamic":
        lengths = lengths[:2]  # as far as the context goes
    for length in lengths:
        positions = torch.tensor([0, 1, length // 2, length - 1])
        inverse, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu", seq_len=length)
        variant = torch.full_like(positions, int(length > original))
        given = ours(torch.stack([positions, variant]))
        for got, wanted in zip(given, turned(inverse, factor, positions)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=2e-3 if length > 5000 else 5e-4)
    if scaling["rope_type"] != "longrope":
        inverse, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu", seq_len=original)
        torch.testing.assert_close(ours._inverse[0], inverse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, *SCALINGS], ids=name_of)
def test_sections_go_with_every_type(scaling: dict[str, Any]) -> None:
    rope = {**scaling, "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    theirs = Qwen2VLRotaryEmbedding(Qwen2VLTextConfig(**SIZES, rope_parameters=dict(rope)))
    text = text_config({"text_config": {**SIZES, "rope_parameters": rope}})
    ours = RotaryTable.from_config(text, HEAD, "cpu", mrope=True)
    positions = torch.tensor([[0, 5, 9, 300], [0, 7, 2, 300], [0, 3, 11, 300]])
    wanted = theirs(torch.zeros(1), positions[:, None])
    for got, one in zip(ours(torch.cat([positions, torch.zeros(1, 4).long()])), wanted):
        torch.testing.assert_close(got, one[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "architecture", "rope"),
    [
        ("qwen2vl", "Qwen2VL", {"type": "yarn", "mrope_section": [2, 3, 3], "factor": 4.0}),
        ("llava15", "Llava", {**LLAMA3, "original_max_position_embeddings": 32}),
        ("llava15", "Llava", {"rope_type": "linear", "factor": 3.0}),
        (
            "llava15",
            "Llava",
            {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1] * 4,
                "long_factor": [2.0, 4.0] * 4,
                "original_max_position_embeddings": 32,
            },
        ),
    ],
    ids=["yarn with sections", "llama3", "linear", "longrope"],
)
def test_a_whole_model_answers_as_in_transformers(
    tmp_path: Path, family: str, architecture: str, rope: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / family / "model", folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config))
    theirs = getattr(transformers, f"{architecture}ForConditionalGeneration").from_pretrained(folder).eval()
    for length in (20, 60):  # on both sides of the length it was trained with
        ids = [7 + i % 500 for i in range(length)]
        params = SamplingParams(temperature=0, max_tokens=1)
        with LLM(str(folder), dtype="float32", kv_cache_memory=2**22) as llm, recorded_logits(llm) as logits:
            llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
        with torch.inference_mode():
            wanted = theirs(input_ids=torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(logits[-1][-1], wanted, rtol=0, atol=1e-4)


def test_variants_without_a_row_of_them_are_refused() -> None:
    rope = {"type": "longrope", **FACTORS, "original_max_position_embeddings": 1024}
    table = RotaryTable.from_config(text_config({**SIZES, "rope_scaling": rope}), HEAD, "cpu")
    with pytest.raises(ValueError, match="positions have 1 rows, expected 2: .* switch_lengths"):
        table(torch.zeros(1, 3).long())


def test_without_scaling_the_frequencies_are_the_plain_ones() -> None:
    table = RotaryTable.from_config(text_config({**SIZES, "rope_theta": 500.0}), HEAD, "cpu")
    assert torch.equal(table._inverse[0], inverse_frequencies(HEAD, 500.0))

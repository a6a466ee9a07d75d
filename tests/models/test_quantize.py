"""``opsin quantize``: what it writes is what is made at each start, and loads without the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsin import LLM, SamplingParams
from opsin.cli import main
from opsin.layers import round_weight
from tests.models.families import FAMILIES
from tests.models.golden import GOLDEN, cases

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def quantize(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["quantize", *arguments])
    return int(done.value.code or 0)


def answers(folder: Path, family: str, **settings: Any) -> tuple[list[Any], dict[str, int]]:
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**24, **settings) as llm:
        prompts = [case.prompt() for case in cases(family)[:2]]
        outputs = [llm.generate(prompt, PARAMS, use_tqdm=False)[0] for prompt in prompts]
        return [output.outputs[0].token_ids for output in outputs], dict(llm.engine.stats().weight_forms)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_written_answers_as_what_is_rounded_at_each_start(
    tmp_path: Path, family: str, bits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = GOLDEN / family / "model", tmp_path / "out"
    assert quantize(str(source), str(out), "--to", bits, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["saved_bytes"] > 0
    assert all(0 < layer["error"] < (0.02 if layer["form"] == "int8" else 0.2) for layer in report["layers"])
    stored, forms = answers(out, family, quantization=bits)
    expected, expected_forms = answers(source, family, quantization=bits)
    assert stored == expected
    assert forms == expected_forms
    plain = answers(out, family)[1]
    assert any(form.startswith("int") for form in plain)


def test_codes_are_the_nearest(tmp_path: Path) -> None:
    source, out = GOLDEN / "qwen2vl" / "model", tmp_path / "out"
    assert quantize(str(source), str(out), "--to", "int4", "--group-size", "64") == 0
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    module = "model.layers.0.mlp.up_proj"
    from opsin.api import WeightForm

    nearest = round_weight(before[f"{module}.weight"], WeightForm(kind="int4", group_size=64))
    assert torch.equal(after[f"{module}.weight_packed"].view(torch.uint8), nearest.codes)
    assert torch.equal(after[f"{module}.weight_scale"], nearest.scales)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_nothing_half_done_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for file in (GOLDEN / "qwen2vl" / "model").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    assert quantize(str(source), str(out), "--to", "int8") == 1
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    out.mkdir()
    assert quantize(str(GOLDEN / "qwen2vl" / "model"), str(out), "--to", "int8") == 1
    assert "nothing is written over" in capsys.readouterr().err


def test_what_is_quantised_is_not_rounded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(str(GOLDEN / "qwen2vl" / "model"), str(tmp_path / "once"), "--to", "int8") == 0
    assert quantize(str(tmp_path / "once"), str(tmp_path / "twice"), "--to", "int4") == 1
    assert "quantised already" in capsys.readouterr().err

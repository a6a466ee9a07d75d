"""Checkpoints saved again by several versions of transformers answer as before.

The recorded folders (``resaved/VERSION/NAME``, made by ``resave.py``) hold what such a version writes; the
weights are those of the original, under the names that it gives them. `make test-resaved` makes the folders
anew, with each version in an environment of its own (``.resaved/VERSION``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from opsin import LLM, SamplingParams
from tests.models.golden import GOLDEN

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORDED = HERE / "resaved"
ENVIRONMENTS = ROOT / ".resaved"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


ORIGINALS = {folder.parent.name: folder for folder in sorted(GOLDEN.glob("*/model"))} | {
    folder.parent.name.removeprefix("opsin_"): folder
    for folder in sorted(ROOT.glob("demo/checkpoints/*/src/*/model"))
}
VERSIONS = sorted(folder.name for folder in RECORDED.iterdir())
SINCE = {"smolvlm": "4.50", "internvl": "4.52", "qwen25vl": "4.49", "qwen3vl": "4.57"}
"""Families that came to transformers later than the oldest of these versions."""
RESAVED = [
    (version, name)
    for name in sorted(ORIGINALS)
    for version in VERSIONS
    if _numbers(version) >= _numbers(SINCE.get(name, "4.0"))
]


def built(record: Path, original: Path, folder: Path) -> Path:
    """A whole checkpoint of what was recorded."""
    shutil.copytree(record, folder)
    resaved = json.loads((folder / "resaved.json").read_text())
    for name in resaved["same_files"]:
        shutil.copyfile(original / name, folder / name)
    old_names = {old: key for key, old in resaved["renamed"].items()}
    tensors = load_file(original / "model.safetensors")
    save_file(
        {old_names.get(key, key): tensor for key, tensor in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "resaved.json").unlink()
    return folder


def answer(folder: Path) -> tuple[Any, ...]:
    """Prompt and tokens of a question about a picture, and what decides about longer ones."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**24) as llm:
        [output] = llm.chat([{"role": "user", "content": parts}], params, use_tqdm=False)
        info, ends = llm.engine.info, llm.engine.frontend.eos_token_ids
        return output.prompt_token_ids, output.outputs[0].token_ids, info.max_model_len, ends


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[Any, ...]]:
    return {name: answer(folder) for name, folder in ORIGINALS.items()}


@pytest.mark.parametrize(("version", "name"), RESAVED)
def test_a_checkpoint_saved_again_answers_as_before(
    answers: dict[str, tuple[Any, ...]], tmp_path: Path, version: str, name: str
) -> None:
    folder = built(RECORDED / version / name, ORIGINALS[name], tmp_path / "model")
    assert answer(folder) == answers[name]


@pytest.mark.resaved
@pytest.mark.parametrize(("version", "name"), RESAVED)
def test_the_recorded_folders_are_what_the_version_writes(tmp_path: Path, version: str, name: str) -> None:
    python = ENVIRONMENTS / version / "bin" / "python"
    assert python.exists(), f"no transformers {version} in {ENVIRONMENTS}: make test-resaved installs it"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), str(HERE / "resave.py"), str(ORIGINALS[name]), str(tmp_path / "made")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    recorded = RECORDED / version / name
    assert {file.name for file in (tmp_path / "made").iterdir()} == {file.name for file in recorded.iterdir()}
    for file in recorded.iterdir():
        made = (tmp_path / "made" / file.name).read_text()
        if file.suffix == ".json":
            assert json.loads(made) == json.loads(file.read_text()), file.name
        else:
            assert made == file.read_text(), file.name

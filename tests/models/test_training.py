"""The training networks of demo/training are a second implementation of every family: opsin agrees."""

from __future__ import annotations

import random
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from opsin import LLM

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
sys.path.insert(0, str(Path(__file__).parents[2] / "demo/training"))

from agree import difference, orders
from camera import Camera
from data import BatchMaker
from families import FAMILIES
from hints import HintHeads, hint_words
from scenes import TRAINING_SEEDS
from towers import Tower

APART = {"phi3v": 0.02}
"""Training looks at Phi-3.5-vision's enlarged pictures shrunk to whole grey levels."""


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_network_of_random_weights_says_what_opsin_says(name: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    family = FAMILIES[name]
    words = Tokenizer.from_file(str(family.folder / "tokenizer.json"))
    network = family.network(words)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # biases and norms are zeros and ones
            parameter.copy_(parameter.half().float())  # what the file will hold
    shutil.copytree(family.folder, tmp_path, dirs_exist_ok=True)
    family.export(network, words, tmp_path)
    with LLM(str(tmp_path), dtype="float32", kv_cache_memory=2**26) as llm:
        for scene in family.scenes:
            if scene == "talk":
                continue
            for seed, text_first in product(range(3), orders(family)):
                apart = difference(family, network, words, llm, scene, seed, text_first)
                assert apart < APART.get(name, 1e-4), (scene, seed, text_first)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_step_lowers_the_loss_of_its_batch(name: str) -> None:
    torch.manual_seed(7)
    family = FAMILIES[name]
    words = Tokenizer.from_file(str(family.folder / "tokenizer.json"))
    network = family.network(words)
    hidden = network.text.embed_tokens.embedding_dim
    heads = HintHeads(Tower.DIM, hidden, hint_words(words), words.token_to_id(family.nothing))
    optimiser = torch.optim.AdamW([*network.parameters(), *heads.parameters()], lr=1e-3)
    batch = BatchMaker(family, words, TRAINING_SEEDS, 64).batch("objects", random.Random(3))
    losses = []
    for _ in range(3):
        logits, targets, _ = network(batch, heads)
        loss = torch.nn.functional.cross_entropy(logits, targets) + heads.loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[2] < losses[1] < losses[0]


def test_a_camera_takes_pictures_of_a_folder(tmp_path: Path) -> None:
    """Parts of whole photographs, and what was cut out on backgrounds; in the size that is asked for."""
    Image.new("RGB", (64, 48), (250, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGBA", (40, 20), (0, 250, 0, 128)).save(tmp_path / "green.png")
    palette = Image.new("P", (8, 8))
    palette.save(tmp_path / "palette.png", transparency=0)
    (tmp_path / "notes.txt").write_text("no picture")
    camera, rng = Camera(tmp_path), random.Random(2)
    taken = [camera.picture(rng, (56, 84)) for _ in range(40)]
    assert {picture.size for picture in taken} == {(56, 84)}
    assert {picture.mode for picture in taken} == {"RGB"}
    assert any(picture.getextrema() == ((250, 250), (0, 0), (0, 0)) for picture in taken), "the photograph"
    assert len({picture.tobytes() for picture in taken}) > 10
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no JPEG or PNG"):
        Camera(tmp_path / "empty")

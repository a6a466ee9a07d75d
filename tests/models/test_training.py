"""The training networks of demo/training are a second implementation of every family: opsin agrees."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from opsin import LLM

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
sys.path.insert(0, str(Path(__file__).parents[2] / "demo/training"))

from agree import difference
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
            for seed in range(3):
                apart = difference(family, network, words, llm, scene, seed)
                assert apart < APART.get(name, 1e-4), (scene, seed)


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

"""Asks opsin and the training network the same, and prints how far their log-probabilities are apart.

The two share no code: the network knows whole batches of equal pictures, opsin cuts pictures, expands
placeholders and schedules as it does for everybody. It needs the trainer's state file.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from batch import collate
from data import BatchMaker, as_planned
from families import FAMILIES
from family import Family
from network import Network
from run import conversation
from scenes import VALIDATION_SEEDS, Question, make_scene

from opsin import LLM, SamplingParams


@torch.no_grad()
def difference(
    family: Family,
    network: Network,
    words: Tokenizer,
    llm: LLM,
    name: str,
    seed: int,
    text_first: bool = False,
) -> float:
    """Of the five likeliest first tokens of the answer to one question about one scene.

    `text_first`: the question stands before the pictures. It is then asked in two branches, and the second is
    looked at, whose pictures are shown for the second time.
    """
    rng = random.Random(seed)
    plan = family.draw(name, rng)
    sizes = [family.size_for(shape, name, rng) for shape in plan.shapes]
    sizes, drawn = as_planned(name, plan, sizes)
    scene = make_scene(name, VALIDATION_SEEDS[0] + seed, sizes[0], **drawn)
    views = family.look(scene, plan, sizes)
    del scene.questions[1:]
    branches = 2 if text_first else 1
    maker = BatchMaker(family, words, VALIDATION_SEEDS, 1)
    tokens = maker.conversation(scene, plan, rng, branches, plain=True, text_first=text_first)
    pixels = [torch.from_numpy(view.pixels.copy())[None] for view in views]
    hints = [torch.from_numpy(view.hints)[None] for view in views]
    logits, targets, _ = network(collate(name, [tokens], pixels, [view.shape for view in views], hints))
    learned = len(targets) // branches
    ours = logits[-learned].log_softmax(-1)

    question = Question(*scene.questions[0], tuple(scene.images), tuple(scene.frames))
    first = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    output = llm.chat(
        conversation(question, text_first), first, use_tqdm=False, mm_processor_kwargs=dict(family.options)
    )[0]
    seen = [
        token for token, branch in zip(tokens.ids, tokens.branches, strict=True) if branch in (0, branches)
    ]
    prompt = seen[: len(seen) - learned + 1]
    if list(output.prompt_token_ids) != prompt:
        raise SystemExit(f"{name} {seed}: opsin's prompt is {output.prompt_token_ids}, training's {prompt}")
    theirs = output.outputs[0].logprobs[0]
    return max(abs(float(ours[token]) - value.logprob) for token, value in theirs.items())


def orders(family: Family) -> list[bool]:
    """Whether questions may stand before their pictures: no, and where the family has it, yes."""
    return [False, True] if "text first" in family.forms else [False]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=list(FAMILIES), required=True)
    parser.add_argument("--state", type=Path, required=True, help="state file of the training run")
    parser.add_argument("--scenes", type=int, default=10, help="of every kind (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    family = FAMILIES[args.family]
    words = Tokenizer.from_file(str(family.folder / "tokenizer.json"))
    network = family.network(words)
    network.load_state_dict(torch.load(args.state, weights_only=True)["model"])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.half().float())  # what the file will hold
        shutil.copytree(family.folder, folder, dirs_exist_ok=True)
        family.export(network, words, Path(folder))
        llm = LLM(folder, dtype="float32", trust_remote_code=True)
        for name in family.scenes:
            if name != "talk":
                for order in orders(family):
                    scenes = range(args.scenes)
                    apart = max(difference(family, network, words, llm, name, i, order) for i in scenes)
                    print(f"{name:8} {'text first' if order else '':10} {apart:.1e}")


if __name__ == "__main__":
    main()

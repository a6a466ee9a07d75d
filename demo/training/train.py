"""Trains a demonstration model on one processor core within a time budget, and exports it."""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from ctypes import c_double
from pathlib import Path
from queue import Empty, Full

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from batch import Batch
from camera import Camera
from data import BatchMaker
from families import FAMILIES
from hints import HintHeads, hint_words
from muon import Muon
from network import Network
from scenes import TRAINING_SEEDS, VALIDATION_SEEDS
from towers import Tower
from warm import warm_start


def draw_forever(
    name: str, folder: Path, photographs: Path | None, seed: int, patches: int, weights: object, queue: object
) -> None:
    """Body of the drawing process: pictures are drawn while the trainer computes."""
    os.nice(5)
    torch.set_num_threads(1)
    family, rng = FAMILIES[name], random.Random(seed)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    maker = BatchMaker(family, words, TRAINING_SEEDS, patches, Camera(photographs) if photographs else None)
    parent = os.getppid()
    while os.getppid() == parent:
        batch = maker.batch(rng.choices(list(family.scenes), list(weights))[0], rng)
        with contextlib.suppress(Full):
            queue.put(batch, timeout=60)


def exact(model: Network, batch: Batch) -> Iterator[tuple[str, bool]]:
    """For every question of a batch, whether greedy decoding would give exactly the answer.

    Greedy decoding gives the answer if and only if every token of it is the best one after the right ones
    before it, so one pass is enough.
    """
    logits, targets, _ = model(batch)
    right = torch.ones_like(batch.targets, dtype=torch.bool)
    right[batch.targets >= 0] = logits.argmax(-1) == targets
    for row, kinds in enumerate(batch.kinds):
        for branch, kind in enumerate(kinds, start=0 if batch.name == "talk" else 1):
            yield kind, bool(right[row][batch.branches[row] == branch].all())


def validate(model: Network, batches: list[Batch]) -> dict[str, tuple[float, int]]:
    """Per kind of question: the share answered exactly, and how many were asked.

    Gradients stay switched on, for compiled layers would be compiled anew without them.
    """
    scores: dict[str, list[bool]] = defaultdict(list)
    for batch in batches:
        for kind, right in exact(model, batch):
            scores[kind].append(right)
    return {kind: (sum(s) / len(s), len(s)) for kind, s in scores.items()}


def scene_weights(
    model: Network, batches: list[Batch], first_weights: Mapping[str, float]
) -> dict[str, float]:
    """How often each scene shall come next: the worse its answers, the more often."""
    weights = {}
    for scene, first in first_weights.items():
        scores = validate(model, [b for b in batches if b.name == scene])
        errors = [1 - share for share, _ in scores.values()] or [0.0]
        weights[scene] = first * (0.25 + math.sqrt(max(errors)))
    return weights


def optimisers(model: Network, heads: HintHeads, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, patch embedding included; AdamW for token embeddings, norms and biases.

    AdamW does badly at the patch embedding: the pixels of a patch are so alike that equal steps for all of
    them add up to a leap in brightness and colour, under which finer detail is lost.
    """
    inside = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in n]
    other = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed_tokens" in n]
    other += list(heads.parameters())
    muon = Muon(inside, lr=rate)
    adam = torch.optim.AdamW(other, lr=0.4 * rate, weight_decay=0.01, betas=(0.9, 0.98))
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["base"] = group["lr"]
    return [muon, adam]


def schedule(done: float) -> float:
    """Learning rate over the time budget: warm-up, then half a cosine."""
    warm = 0.02
    if done < warm:
        return 0.05 + 0.95 * done / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm) / (1 - warm))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=80, help="time budget, which also sets the learning rate"
    )
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--patches", type=int, default=1600, help="work in one batch")
    parser.add_argument("--accumulate", type=int, default=3, help="batches in one step")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen2vl")
    parser.add_argument(
        "--from-checkpoint", action="store_true", help="start from the family's own exported weights"
    )
    parser.add_argument("--hints", type=float, default=0.4, help="share of the hints in the loss at first")
    parser.add_argument(
        "--from-family", choices=list(FAMILIES), help="start from what another family's network has learned"
    )
    parser.add_argument(
        "--from-state", type=Path, help="its state file; qwen2vl's checkpoint does without one"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--validate-every", type=float, default=5, help="minutes")
    parser.add_argument(
        "--compile", action="store_true", help="fuse the layers: minutes at first, then faster"
    )
    parser.add_argument("--resume", type=Path, help="state file of an earlier run")
    parser.add_argument(
        "--elapsed", type=float, help="with --resume: minutes counted as spent, which sets the rate"
    )
    parser.add_argument(
        "--state", type=Path, default=Path("training-state.pt"), help="where the state is kept"
    )
    parser.add_argument(
        "--photographs",
        type=Path,
        help="folder of photographs: pictures without a shape, beside those of noise",
    )
    parser.add_argument(
        "--more",
        nargs="+",
        default=[],
        metavar="SCENE=TIMES",
        help="scenes that shall come so much more often",
    )
    parser.add_argument("--folder", type=Path, help="where the checkpoint is exported")
    args = parser.parse_args()
    family = FAMILIES[args.family]
    folder = args.folder or family.folder

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = family.network(words)
    if args.from_family:
        source = FAMILIES[args.from_family].folder
        old = Tokenizer.from_file(str(source / "tokenizer.json"))
        if args.from_state:
            state = torch.load(args.from_state, weights_only=True)["model"]
        else:
            state = load_file(source / "model.safetensors")
        print("not in the other model:", ", ".join(warm_start(model, words, state, old)))
    if args.from_checkpoint:
        family.load(model, family.folder)
    hidden = model.text.embed_tokens.embedding_dim
    heads = HintHeads(Tower.DIM, hidden, hint_words(words), words.token_to_id(family.nothing))
    optims = optimisers(model, heads, args.rate)
    step, seen, before = 0, 0, 0.0
    if args.resume:
        state = torch.load(args.resume, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        for optimiser, saved in zip(optims, state.get("optimisers", []), strict=False):
            bases = [group["base"] for group in optimiser.param_groups]
            optimiser.load_state_dict(saved)
            for group, base in zip(optimiser.param_groups, bases, strict=True):
                group["base"] = base
        step, seen, before = state["step"], state["seen"], state["minutes"]
        if args.elapsed is not None:
            before = args.elapsed
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    if args.compile:
        torch._dynamo.config.cache_size_limit = 64  # noqa: SLF001 (the setting has no public name)
        for block in model.blocks():
            block.compile(dynamic=True)
    shares = dict(family.scenes)
    for scene, _, times in (more.partition("=") for more in args.more):
        if scene not in shares:
            raise SystemExit(f"--more {scene}: {args.family} learns {', '.join(shares)}")
        shares[scene] *= float(times)
    scenes = list(shares)
    maker, rng = BatchMaker(family, words, VALIDATION_SEEDS, args.patches), random.Random(0)
    checks = [maker.batch(name, rng, 32, plain=i < 3) for name in scenes if name != "talk" for i in range(6)]
    checks.append(maker.batch("talk", rng, 16))
    weights = multiprocessing.Array(c_double, list(shares.values()))
    if args.resume:
        weights[:] = list(scene_weights(model, checks, shares).values())
    queue: multiprocessing.Queue = multiprocessing.Queue(maxsize=24)
    order = (
        family.name,
        folder,
        args.photographs,
        args.seed * 1_000_003 + step,
        args.patches,
        weights,
        queue,
    )
    artist = multiprocessing.Process(target=draw_forever, args=order, daemon=True)
    artist.start()

    start = last_check = last_line = time.monotonic()
    if args.resume:
        print(f"resumed at {before:.1f} min, step {step}", flush=True)
    waited, pictures, loss_sums = 0.0, 0, defaultdict(list)
    finished = False
    while not finished:
        minutes = before + (time.monotonic() - start) / 60
        factor = schedule(minutes / args.minutes)
        for optimiser in optims:
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * factor
        hint_share = max(0.03, args.hints * min(1.0, 1.6 - 2.5 * minutes / args.minutes))
        for _ in range(args.accumulate):
            moment = time.monotonic()
            try:
                batch = queue.get(timeout=60)
            except Empty as empty:
                raise SystemExit("the drawing process has stopped") from empty
            waited += time.monotonic() - moment
            logits, targets, share = model(batch, heads)
            losses = F.cross_entropy(logits, targets, reduction="none")
            loss = (losses * share).sum() / share.sum()
            ((loss + hint_share * heads.loss) / args.accumulate).backward()
            loss_sums[batch.name].append(loss.item())
            if batch.pixels:
                loss_sums["~" + batch.name].append(heads.loss.item())
            seen += len(batch.ids)
            pictures += len(batch.ids)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optims:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        now = time.monotonic()
        minutes = before + (now - start) / 60
        finished = minutes >= args.minutes
        if now - last_line > 30:
            means = " ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in sorted(loss_sums.items()))
            print(
                f"{minutes:6.1f} min step {step} seen {seen} ({pictures / (now - last_line):.0f} scenes/s, "
                f"waited {waited:.1f} s) rate {factor:.3f} loss: {means}",
                flush=True,
            )
            last_line, pictures, waited = now, 0, 0.0
            loss_sums.clear()
        if finished or now - last_check > args.validate_every * 60:
            scores = validate(model, checks)
            table = ", ".join(f"{kind} {100 * share:.1f}" for kind, (share, _) in scores.items())
            print(f"{minutes:6.1f} min VALIDATION {table}", flush=True)
            weights[:] = list(scene_weights(model, checks, shares).values())
            state = {
                "model": model.state_dict(),
                "heads": heads.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optims],
                "step": step,
                "seen": seen,
                "minutes": minutes,
            }
            torch.save(state, args.state)
            family.export(model, words, folder)
            last_check = last_line = time.monotonic()
    artist.terminate()


if __name__ == "__main__":
    main()

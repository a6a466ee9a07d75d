"""Averages the networks of runs that went on from one state with other scenes, and exports the result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from families import FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("states", type=Path, nargs="+", help="state files of the runs")
    parser.add_argument("--family", choices=list(FAMILIES), required=True)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is exported")
    args = parser.parse_args()
    family = FAMILIES[args.family]
    folder = args.folder or family.folder
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    networks = [torch.load(path, weights_only=True)["model"] for path in args.states]
    network = family.network(words)
    network.load_state_dict({name: sum(n[name] for n in networks) / len(networks) for name in networks[0]})
    family.export(network, words, folder)


if __name__ == "__main__":
    main()

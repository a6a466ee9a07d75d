"""``python -m peers``: prepare the peers, take turns, write the report."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import report
import synthetic
import worker
from report import RESULTS, positive_number
from tokenizers import Tokenizer
from workloads import Workload, quick

from peers import machine, table
from peers.catalogue import PEERS, ROWS, WORKLOADS, Row
from peers.environments import LOGS, NotToBeHadError, python_of, run_logged
from peers.exports import BENCHMARKS, exported
from peers.store import Store, sources_digest
from peers.turns import Turn, take

NAMES = [workload.name for workload in WORKLOADS]


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="make bench-peers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare opsin with other engines on one synthetic checkpoint, at equal bits.",
        epilog=(
            "Peers are installed into .peers/ the first time (llama.cpp is compiled: 15 minutes), and\n"
            "the model is exported for each (8 GB in benchmarks/.cache). A full run of three rounds takes\n"
            "one to two hours on two cores; leave the machine alone meanwhile. What was measured is kept: a\n"
            "run that was stopped goes on, and a row that is there already is not measured again.\n\n"
            "  make bench-peers quick=1                         does everything work?\n"
            '  make bench-peers peers="openvino llamacpp"       only these (opsin is always one of them)\n'
            '  make bench-peers workloads="latency shared"      only these\n'
            '  make bench-peers options="--rounds 1 --fresh"    anything else\n'
        ),
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="besides opsin (all)")
    parser.add_argument("--rows", nargs="+", default=[], help='only these rows, such as "opsin int8" (all)')
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=NAMES, help="to run (all)")
    parser.add_argument("--rounds", type=positive_number, default=3, help="turns of each row (%(default)s)")
    parser.add_argument(
        "--retries", type=int, default=1, help="of a disturbed sample, in a turn (%(default)s)"
    )
    parser.add_argument(
        "--threads", type=positive_number, default=worker.usable_cores(), help="(%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="few requests and tokens: to try it out")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--max-turns", type=int, help="stop after so many turns; the next run goes on")
    parser.add_argument("--prepare", action="store_true", help="install and export, measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the report (%(default)s)")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.rows) - {row.name for row in ROWS}:
        parser.error(
            f"no such row: {', '.join(sorted(unknown))}; there are: {', '.join(row.name for row in ROWS)}"
        )
    return asked


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    asked = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the engine's process ends, too
    workloads = [quick(w) if asked.quick else w for w in WORKLOADS if w.name in asked.workloads]
    model = synthetic.checkpoint("bfloat16")
    rows = [
        row
        for row in ROWS
        if row.peer in {*asked.peers, "opsin"} and (not asked.rows or row.name in asked.rows)
    ]
    facts = worker.call(report.machine, threads=asked.threads)
    key = {"cpu": facts["cpu"], "threads": asked.threads, "quick": asked.quick, "model": model.name}
    name = "peers-quick.json" if asked.quick else "peers.json"
    store = Store.opened(synthetic.CACHE / name, key, fresh=asked.fresh)
    try:
        ready = prepare(rows, model, store)
        if asked.prepare:
            print("\n".join(f"{row.name}: {why}" for row, why in store.refused.items()) or "all is there")
            return 0
        finished = measure(ready, model, store, workloads, asked)
        kept = [row for row in ROWS if any(turn.row == row.name for turn in store.turns)]
        everything = [quick(w) if asked.quick else w for w in WORKLOADS]
        text = table.write(
            table.Report(
                rows=kept,
                turns=store.turns,
                refused=store.refused,
                machine=machine.Machine.best(store.floors),
                facts=facts,
                workloads=everything,
                threads=asked.threads,
                quick=asked.quick,
            ),
            asked.results,
        )
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, and the next run goes on", file=sys.stderr)
        return 130
    print("\n" + text if finished else "more turns are to be taken: run it again")
    return 0


def prepare(rows: Sequence[Row], model: Path, store: Store) -> dict[str, tuple[Row, str, Path]]:
    """Install and export; gives rows with interpreter and model. What cannot be had is refused by name."""
    pythons: dict[str, str] = {}
    ready: dict[str, tuple[Row, str, Path]] = {}
    missing: dict[str, str] = {}
    for row in rows:
        if row.peer in missing:
            store.refused[row.name] = missing[row.peer]
            continue
        try:
            if row.peer not in pythons:
                pythons[row.peer] = python_of(row.peer)
        except NotToBeHadError as error:
            missing[row.peer] = store.refused[row.name] = str(error)
            continue
        python = pythons[row.peer]
        try:
            if row.only_with_bfloat16 and _default_precision(python) in ("f32", "<unknown>"):
                continue  # the row before it is the same
            folder = exported(row.peer, row.export, model, python) if row.export else model
        except NotToBeHadError as error:
            store.refused[row.name] = str(error)
            continue
        ready[row.name] = (row, python, folder)
    for name, why in store.refused.items():
        print(f"{name}: {why}", file=sys.stderr)
    return ready


def measure(
    ready: dict[str, tuple[Row, str, Path]],
    model: Path,
    store: Store,
    workloads: Sequence[Workload],
    asked: argparse.Namespace,
) -> bool:
    """Take the turns that are not there yet; whether all are there now."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    digest = sources_digest()
    left = asked.max_turns
    for dtype in machine.DTYPES:
        if dtype not in store.floors and not asked.quick:
            print(f"the machine's floors, {dtype}", file=sys.stderr, flush=True)
            store.add_floors(dtype, machine.measure(dtype, asked.threads))
    for number in range(asked.rounds):
        for row, python, folder in ready.values():
            if row.peer == "opsin":
                store.drop_other_versions(row.name, digest)
            missing = [w for w in workloads if not store.has(row.name, number, w.name)]
            if not missing or row.name in store.refused:
                continue
            if left is not None and left <= 0:
                return False
            left = None if left is None else left - 1
            names = " ".join(workload.name for workload in missing)
            print(f"round {number + 1} of {asked.rounds}: {row.name}: {names}", file=sys.stderr, flush=True)
            try:
                for turn in take(
                    row, number, python, folder, tokenizer, missing, asked.threads, asked.retries
                ):
                    store.add(turn)
                    print("  " + _in_a_line(turn), file=sys.stderr, flush=True)
            except worker.WorkerError as error:
                store.refused[row.name] = why = str(error).strip().splitlines()[-1]
                LOGS.mkdir(parents=True, exist_ok=True)
                log = LOGS / f"{row.name.replace(' ', '-')}-failed.txt"
                log.write_text(str(error))
                print(f"  {why} ({log})", file=sys.stderr, flush=True)
    for dtype in machine.DTYPES:
        if len(store.floors.get(dtype, [])) == 1 and not asked.quick:
            # Once more: a shared machine may be faster now, and a floor is the best it can do.
            store.add_floors(dtype, machine.measure(dtype, asked.threads))
    return True


def _in_a_line(turn: Turn) -> str:
    name, samples = list(turn.samples.items())[-1]
    times = ", ".join(f"{sample['seconds']:.1f}" for sample in samples)
    worst = max(sample["disturbance"] or 0.0 for sample in samples)
    return f"ready {turn.usage['loading_s']:.1f} s; {name} {times} s (disturbed {worst:.0%})"


def _default_precision(python: str) -> str:
    log = run_logged("openvino-precision", [python, "-m", "peers.engines.in_openvino"], {}, BENCHMARKS)
    if log.failed:
        raise NotToBeHadError(f"OpenVINO does not tell its precision: {log.lines[-1]}")
    return log.lines[-1].strip()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())

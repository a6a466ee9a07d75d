"""The comparison with other engines: what is measured is kept, judged and told as it is."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules, imported as ``python -m peers`` in benchmarks/ does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    from peers import __main__ as main
    from peers import catalogue, chart, environments, figures, machine, store, table, turns
    from peers.engines import gguf_names

    yield SimpleNamespace(
        main=main,
        catalogue=catalogue,
        chart=chart,
        environments=environments,
        names=gguf_names,
        figures=figures,
        machine=machine,
        store=store,
        table=table,
        turns=turns,
    )
    for name in set(sys.modules) - before:
        module: ModuleType | None = sys.modules[name]
        if getattr(module, "__file__", None) and str(BENCHMARKS) in str(module.__file__):
            del sys.modules[name]


def turn(peers: SimpleNamespace, row: str, scale: float = 1.0, number: int = 0, **samples: Any) -> Any:
    """A turn in which every time is ``scale`` times another's."""
    sample = {
        "seconds": 3.0 * scale,
        "token_times": [1.0 * scale, 1.1 * scale, 1.3 * scale, 1.4 * scale],
        "num_prompt_tokens": 300,
        "num_output_tokens": 4,
        "first_ids": [1, 2, 3, 4],
        "disturbance": 0.0,
    }
    names = ("latency", "throughput", "shared", "system")
    return peers.turns.Turn(
        row=row,
        round=number,
        usage={"loading_s": 2.0 * scale, "private_bytes": int(1e9 * scale)},
        about={"version": "1", "computes in": "float32"},
        samples={name: [{**sample, **samples}] for name in names},
    )


def rows(peers: SimpleNamespace, *names: str) -> list[Any]:
    """Rows of the catalogue."""
    return [row for row in peers.catalogue.ROWS if row.name in names]


def report(peers: SimpleNamespace, **changes: Any) -> Any:
    """A report of two rows of 8 bits; opsin is twice as fast."""
    made = peers.table.Report(
        rows=rows(peers, "opsin int8", "OpenVINO int8"),
        turns=[turn(peers, "opsin int8"), turn(peers, "OpenVINO int8", 2.0)],
        refused={"llama.cpp Q8_0": "pip could not install it: no compiler"},
        machine=peers.machine.Machine(
            bandwidth=30e9, rates={"float32": 300e9, "bfloat16": 600e9, "int8": 1200e9}
        ),
        facts={
            "cpu": "A <processor>",
            "cores": 2,
            "memory bytes": 2**34,
            "instruction sets": ["avx2"],
            "system": "Linux",
            "python": "3",
            "torch": "2",
        },
        workloads=peers.catalogue.WORKLOADS,
        threads=2,
        quick=False,
    )
    return replace(made, **changes)


def test_rows_have_names_of_their_own_and_workloads_too(peers: SimpleNamespace) -> None:
    names = [row.name for row in peers.catalogue.ROWS]
    assert len(set(names)) == len(names)
    assert {row.group for row in peers.catalogue.ROWS} == set(peers.catalogue.GROUPS)
    assert {row.peer for row in peers.catalogue.ROWS} == set(peers.catalogue.PEERS)
    for group in peers.catalogue.GROUPS:
        assert {row.peer for row in peers.catalogue.ROWS if row.group == group} >= {
            "opsin",
            "openvino",
            "llamacpp",
        }


def test_disturbed_samples_count_only_when_there_are_no_others(peers: SimpleNamespace) -> None:
    column = peers.figures.COLUMNS[0]
    clean, disturbed = turn(peers, "x"), turn(peers, "x", 5.0, 1, disturbance=0.5)
    both = peers.figures.figure(column, [clean, disturbed])
    assert (both.values, both.num_taken, both.clean) == ([1.0], 2, True)
    only = peers.figures.figure(column, [disturbed])
    assert (only.values, only.clean) == ([5.0], False)
    assert peers.table.shown(column, only).startswith("~")
    assert peers.figures.figure(column, []) is None


def test_the_report_has_every_figure_its_ratio_and_who_is_missing(peers: SimpleNamespace) -> None:
    text = peers.table.markdown(report(peers))
    assert "| OpenVINO int8 | **2.00** (n1) |" in text
    assert "| OpenVINO int8 | 2.00x | 2.00x | 2.00x | 2.00x | 2.00x | 2.00x | 2.00x |" in text
    assert "- llama.cpp Q8_0: pip could not install it: no compiler" in text
    assert "30.0 GB/s" in text
    assert "quick run" not in text
    assert "quick run" in peers.table.markdown(report(peers, quick=True))


def test_files_of_the_report(peers: SimpleNamespace, tmp_path: Path) -> None:
    peers.table.write(report(peers), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["peers.json", "peers.md", "peers.svg"]
    drawn = ET.parse(tmp_path / "peers.svg").getroot()
    bars = [float(bar.attrib["width"]) for bar in drawn.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(bars) == 2 * len(peers.chart.SHOWN)
    assert bars[len(bars) // 2 :] == pytest.approx([2 * width for width in bars[: len(bars) // 2]], abs=0.2)


def test_floors_are_bytes_over_bandwidth_and_operations_over_rate(peers: SimpleNamespace) -> None:
    machine = report(peers).machine
    int8, float32, int4 = rows(peers, "opsin int8", "opsin float32", "opsin int4")[:3]
    by_name = {row.name: row for row in (int8, float32, int4)}
    # 494 M weights are read per token; keys and values of one request are small beside them.
    assert machine.token_s(by_name["opsin float32"]) == pytest.approx(494e6 * 4 / 30e9, rel=0.02)
    assert machine.token_s(by_name["opsin int8"]) == pytest.approx(494e6 / 30e9, rel=0.02)
    assert machine.token_s(by_name["opsin int4"]) == pytest.approx((358e6 * 4.5 / 8 + 136e6) / 30e9, rel=0.02)
    # 375 GFLOP of a prompt, attention (36) among them.
    assert machine.first_token_s(by_name["opsin float32"]) == pytest.approx(375 / 300, rel=0.03)
    assert machine.first_token_s(by_name["opsin int8"]) == pytest.approx(339 / 1200 + 36 / 300, rel=0.05)
    default = rows(peers, "opsin default")[0]
    assert machine.first_token_s(default, "bfloat16") == pytest.approx(375 / 600, rel=0.03)


def test_agreement_counts_tokens_before_the_first_difference(peers: SimpleNamespace) -> None:
    reference = [turn(peers, "r")]
    assert peers.figures.agreement([turn(peers, "x")], reference) == 1
    assert peers.figures.agreement([turn(peers, "x", first_ids=[1, 9, 3, 4])], reference) == 0.25
    assert peers.figures.agreement([turn(peers, "x", number=1)], reference) is None, "other requests"


def test_a_stopped_run_goes_on_where_it_was(peers: SimpleNamespace, tmp_path: Path) -> None:
    key = {"cpu": "a", "threads": 2}
    path = tmp_path / "sub" / "peers.json"
    store = peers.store.Store.opened(path, key, fresh=False)
    store.drop_other_versions("x", "one")
    first = turn(peers, "x")
    first.samples = {"latency": first.samples["latency"]}
    store.add(first)
    again = peers.store.Store.opened(path, key, fresh=False)
    assert again.has("x", 0, "latency")
    assert not again.has("x", 0, "shared")
    later = turn(peers, "x")
    later.samples = {"shared": later.samples["shared"]}
    again.add(later)
    assert len(again.turns) == 1
    assert set(again.turns[0].samples) == {"latency", "shared"}
    assert not peers.store.Store.opened(path, key, fresh=True).turns
    assert not peers.store.Store.opened(path, {**key, "cpu": "b"}, fresh=False).turns
    again.drop_other_versions("x", "two")
    assert not again.turns, "figures of other code are no longer those of this one"


def test_what_cannot_be_installed_is_skipped_by_name(
    peers: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environments = peers.environments
    wanted = environments.Environment(requirements=("./no-such-package-here",), takes="a moment")
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"openvino": wanted})
    monkeypatch.setattr(environments, "PEERS", tmp_path)
    monkeypatch.setattr(environments, "LOGS", tmp_path / "logs")
    store = peers.store.Store(tmp_path / "peers.json", {})
    asked = rows(peers, "transformers float32", "OpenVINO int8")
    ready = peers.main.prepare(asked, tmp_path, store)
    assert set(ready) == {"transformers float32"}
    assert "pip could not install it" in store.refused["OpenVINO int8"]
    assert "no-such-package-here" in store.refused["OpenVINO int8"]


def test_a_turn_measures_a_real_model_in_a_process_of_its_own(peers: SimpleNamespace) -> None:
    import synthetic

    row = rows(peers, "opsin float32")[0]
    workload = replace(peers.catalogue.WORKLOADS[0], new_tokens=4)
    [taken] = peers.turns.take(
        row,
        0,
        sys.executable,
        Path("opsin/tiny-qwen2vl"),
        synthetic.synthetic_tokenizer(),
        [workload],
        1,
        0,
    )
    samples = taken.samples["latency"]
    assert len(samples) == peers.catalogue.LATENCY_SAMPLES
    for sample in samples:
        assert sample["num_output_tokens"] == len(sample["token_times"]) == len(sample["first_ids"]) == 4
        assert sample["token_times"] == sorted(sample["token_times"])
        assert sample["token_times"][-1] <= sample["seconds"]
    assert taken.usage["loading_s"] > 0
    assert taken.about["computes in"] == "float32"


def test_a_side_that_cannot_be_made_says_why(peers: SimpleNamespace) -> None:
    import worker

    row = replace(rows(peers, "opsin float32")[0], settings={"dtype": "float3"})
    process = peers.turns.Process(row, sys.executable, Path("opsin/tiny-qwen2vl"), 1)
    with process, pytest.raises(worker.WorkerError, match="float3"):
        process.receive()


def test_gguf_names_cover_every_tensor_once(peers: SimpleNamespace) -> None:
    import synthetic

    named = [
        new for name, _ in synthetic.weight_shapes(synthetic.CONFIG) for new in peers.names.gguf_names(name)
    ]
    assert len(set(named)) == len(named)
    assert {
        "token_embd.weight",
        "output_norm.weight",
        "blk.23.attn_output.weight",
        "blk.0.attn_q.bias",
    } <= set(named)
    assert {"v.patch_embd.weight.1", "v.blk.11.attn_v.bias", "v.post_ln.weight", "mm.2.bias"} <= set(named)

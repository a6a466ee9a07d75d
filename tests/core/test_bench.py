"""``opsin bench`` on a model in this process, and what its requests and figures are made of."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opsin.bench import summary
from opsin.bench.prompts import Prompts
from opsin.bench.serving import arrival_times
from opsin.bench.settings import PromptSettings, ResultSettings, ServeSettings
from opsin.bench.summary import Results, Timing
from opsin.cli import main
from opsin.errors import ConfigError

MODEL = "opsin/tiny-qwen2vl"
SMALL = ("--image-size", "56", "--input-len", "8", "--output-len", "6")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_throughput_counts_every_request_and_token(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "sub" / "found.json"
    status, out, _ = run(
        capsys, "throughput", MODEL, *SMALL, "--num-prompts", "5", "--json", "--output-json", str(file)
    )
    assert status == 0
    found = json.loads(out)
    assert found == json.loads(file.read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (5, 0, 30)
    assert found["total_input_tokens"] > 5 * 8
    assert found["output_throughput"] == pytest.approx(30 / found["duration"])
    assert 0 < found["median_ttft_ms"] <= found["p99_ttft_ms"] <= found["p99_e2el_ms"]
    assert found["settings"]["num_prompts"] == 5


def test_latency_watches_a_single_request_token_by_token(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--num-iters", "2", "--num-iters-warmup", "0", "--json")
    status, out, _ = run(capsys, "latency", MODEL, *SMALL, *arguments)
    assert status == 0
    found = json.loads(out)
    assert found["completed"] == 2
    # n tokens are n - 1 gaps, so that both means are of the same time.
    assert found["mean_itl_ms"] == pytest.approx(found["mean_tpot_ms"], rel=0.2)
    assert found["mean_batch_ms"] == pytest.approx(found["mean_e2el_ms"], rel=0.2)


def test_latency_of_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--num-iters", "2", "--num-iters-warmup", "1", "--batch-size", "3")
    status, out, _ = run(capsys, "latency", MODEL, *SMALL, *arguments)
    assert status == 0
    assert "whole batch" in out
    assert "answered              6" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("throughput", MODEL, "--image-folder", "/no/such"), "no such folder"),
        (("throughput", MODEL, "--image-size", "0"), "640x480"),
        (("throughput", MODEL, "--dataset-name", "folder"), "--image-folder PATH"),
        (("latency", MODEL, "--plot", "chart.bmp"), ".svg"),
        (("serve", "--request-rate", "-1"), "above 0"),
        (("serve", "--base-url", "somewhere"), "http://HOST:PORT"),
        (("latency", MODEL, "--num-iter", "2"), "--num-iters"),
    ],
)
def test_settings_that_cannot_be_are_usage_errors(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert words in err


def test_no_server_is_said_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "serve", "--port", "1")
    assert status == 1
    assert "opsin serve MODEL" in err
    assert "--base-url" in err


def test_requests_are_drawn_from_seed_and_number() -> None:
    settings = PromptSettings(image_size="40x20", input_len=5)
    one, again, other = (Prompts(settings, seed) for seed in (1, 1, 2))
    assert one.conversation(3, as_urls=True) == again.conversation(3, as_urls=True)
    assert one.conversation(3, as_urls=True) != one.conversation(4, as_urls=True)
    assert one.conversation(3, as_urls=True) != other.conversation(3, as_urls=True)
    picture, text = one.conversation(0)[0]["content"]
    assert picture["image_pil"].size == (40, 20)
    assert len(text["text"].split()) == 5


def test_questions_have_the_length_asked_for_in_the_models_own_tokens() -> None:
    prompts = Prompts(
        PromptSettings(input_len=20, prefix_len=30, num_images=0), 0, lambda text: len(text) // 3
    )
    prefix, question = prompts.conversation(0)
    assert prefix["role"] == "system"
    assert len(prefix["content"]) // 3 >= 30
    length = len(question["content"][0]["text"]) // 3
    assert 20 <= length <= 24, "no more than the last word too long"


def test_pictures_of_a_folder_come_in_turn(tmp_path: Path) -> None:
    for name, colour in (("b.png", "red"), ("a.PNG", "blue"), ("notes.txt", None)):
        if colour:
            Image.new("RGB", (4, 4), colour).save(tmp_path / name, "png")
        else:
            (tmp_path / name).write_text("no picture")
    prompts = Prompts(PromptSettings(image_folder=str(tmp_path)), 0)
    seen = [prompts.conversation(i)[0]["content"][0]["image_url"]["url"] for i in range(3)]
    files = [(tmp_path / name).read_bytes() for name in ("a.PNG", "b.png", "a.PNG")]
    assert [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in seen] == files
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no picture in it"):
        PromptSettings(image_folder=str(tmp_path / "empty"))


def test_same_image_shares_pictures_not_questions() -> None:
    prompts = Prompts(PromptSettings(same_image=True, image_size="8"), 0)
    (first, question), (second, other) = (prompts.conversation(i, as_urls=True)[0]["content"] for i in (0, 1))
    assert first == second
    assert question != other


def test_arrivals_have_the_rate_and_the_burstiness_asked_for() -> None:
    for burstiness in (0.25, 1.0, 4.0):
        load = ServeSettings(num_prompts=20_001, request_rate="50", burstiness=burstiness)
        gaps = np.diff(arrival_times(load))
        assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
        # A gamma distribution's coefficient of variation is 1 / sqrt(shape).
        assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)
    assert arrival_times(ServeSettings(num_prompts=3)) == [0.0, 0.0, 0.0]


def test_figures_are_those_of_the_timings() -> None:
    timings = [
        Timing(
            arrival=0.0,
            first_token=0.1 * i,
            gaps=[0.01, 0.03],
            total=0.1 * i + 0.04,
            num_prompt_tokens=10,
            num_output_tokens=3,
        )
        for i in range(1, 11)
    ]
    results = Results(
        kind="serve", model="m", settings={}, duration=2.0, timings=timings, failures=["a", "b", "a"]
    )
    found = summary.as_json(results)
    assert found["p50_ttft_ms"] == pytest.approx(550)
    assert found["p90_ttft_ms"] == pytest.approx(910)
    assert found["mean_tpot_ms"] == pytest.approx(20)
    assert found["p99_itl_ms"] == pytest.approx(30)
    assert found["total_token_throughput"] == pytest.approx(65)
    assert found["errors"] == {"a": 2, "b": 1}


def test_a_single_token_has_no_time_per_token() -> None:
    one = Timing(arrival=0, first_token=0.1, gaps=(), total=0.1, num_prompt_tokens=1, num_output_tokens=1)
    assert one.per_token is None
    results = Results(kind="serve", model="m", settings={}, duration=1.0, timings=[one])
    assert set(results.series) == {"ttft", "e2el"}


def test_results_are_saved_under_a_name_of_their_own(tmp_path: Path) -> None:
    one = Timing(arrival=0, first_token=0.1, gaps=(), total=0.1, num_prompt_tokens=1, num_output_tokens=1)
    results = Results(kind="serve", model="org/my-model", settings={}, duration=1.0, timings=[one])
    [file] = summary.write(results, ResultSettings(save_result=True, result_dir=str(tmp_path / "new")))
    assert file.parent == tmp_path / "new"
    assert file.name.startswith("opsin-serve-my-model-")
    assert json.loads(file.read_text())["model"] == "org/my-model"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        summary.write(results, ResultSettings(output_json=str(tmp_path / "file" / "x.json")))


def test_a_chart_without_matplotlib_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"opsin\[plot\]"):
        ResultSettings(plot="chart.svg")


def test_pictures_of_a_folder_are_asked_about(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"no picture")
    arguments = ("--image-folder", str(tmp_path), "--num-prompts", "4", "--num-warmups", "0", "--json")
    status, out, _ = run(capsys, "throughput", MODEL, *SMALL, *arguments)
    assert status == 0
    found = json.loads(out)
    assert (found["completed"], found["failed"]) == (2, 2), "a bad picture fails its own requests"


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_chart_is_drawn(tmp_path: Path, kind: str) -> None:
    from opsin.bench.chart import draw

    one = Timing(arrival=0, first_token=0.1, gaps=(0.1,), total=0.2, num_prompt_tokens=1, num_output_tokens=2)
    file = tmp_path / "new" / f"chart.{kind}"
    draw(Results(kind="serve", model="m", settings={}, duration=1.0, timings=[one]), file)
    assert file.stat().st_size > 1000

"""The command line: what it prints, how it fails, and what it does not load."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import opsin
from opsin.api import Capabilities, Device, DeviceSpec, MemoryInfo, ModelSpec, Probe
from opsin.cli import main, plugins, printing
from opsin.errors import RequestError
from opsin.hookspecs import hookimpl
from opsin.params import SamplingParams
from opsin.plugins import discovery
from opsin.results import CompletionOutput, RequestOutput
from tests.models.golden import GOLDEN


class Result(SimpleNamespace):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def run(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        return Result(status=ended.value.code or 0, out=captured.out, err=captured.err)

    return run


# --------------------------------------------------------------------------------------------------
# Help, version, usage
# --------------------------------------------------------------------------------------------------


def test_help_names_the_commands_and_shows_examples(run: Run) -> None:
    top = run("--help")
    assert top.status == 0
    assert all(command in top.out for command in ("generate", "plugins", "doctor"))
    generate = run("generate", "--help")
    assert "Examples:" in generate.out
    assert "--image" in generate.out


def test_version(run: Run) -> None:
    assert run("--version").out == f"opsin {opsin.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "model", "question", "--no-such-option"],
        ["generate", "model", "question", "--max-tokens", "none"],
        ["generate", "model", "question", "--max-tokens", "0"],
        ["generate", "model", "question", "--mm-processor-kwargs", "{"],
        ["generate", "model", "question", "--mm-processor-kwargs", "[1]"],
        ["no-such-command"],
    ],
)
def test_usage_errors_have_status_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.status == 2
    assert result.out == ""
    assert "Usage" in result.err


# --------------------------------------------------------------------------------------------------
# generate
# --------------------------------------------------------------------------------------------------


class FakeLLM:
    """Stands where `opsin.LLM` does: remembers what it was asked and answers in pieces."""

    pieces = ("a red", "a red circle")
    error: BaseException | None = None

    def __init__(self, model: str, **settings: Any) -> None:
        FakeLLM.made = (model, settings)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.7, top_k=5)

    def stream_chat(self, messages: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        FakeLLM.asked = (messages, params)
        for number, text in enumerate(self.pieces, 1):
            last = number == len(self.pieces)
            answer = CompletionOutput(
                index=0,
                text=text,
                token_ids=list(range(number)),
                finish_reason="stop" if last else None,
            )
            yield RequestOutput(
                request_id="0",
                prompt=None,
                prompt_token_ids=[1, 2, 3],
                prompt_logprobs=None,
                outputs=[answer],
                finished=last,
            )
            if self.error is not None:
                raise self.error


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    monkeypatch.setattr(opsin, "LLM", FakeLLM)
    monkeypatch.setattr(FakeLLM, "error", None)
    return FakeLLM


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.new("RGB", (4, 3), "red").save(path)
    return str(path)


def test_generate_streams_the_answer(run: Run, llm: Any, picture: str) -> None:
    result = run("generate", "some/model", "--image", picture, "--image", picture, "What is it?")
    assert (result.status, result.out, result.err) == (0, "a red circle\n", "")
    messages, params = llm.asked
    assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]
    assert messages[0]["content"][0]["image"].pixels.shape == (3, 4, 3)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.7, 5, 512)


def test_generate_takes_its_options(run: Run, llm: Any, tmp_path: Path, picture: str) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(3):
        Image.new("RGB", (2, 2)).save(frames / f"{number}.png")
    result = run(
        *("generate", "some/model", "Which way?", "--video", str(frames), "--system", "Be brief."),
        *(
            "--temperature",
            "0",
            "--seed",
            "7",
            "--max-tokens",
            "9",
            "--device",
            "cpu:0",
            "--dtype",
            "float32",
        ),
        *("--max-model-len", "100", "--mm-processor-kwargs", '{"max_pixels": 5}'),
    )
    assert result.status == 0, result.err
    assert llm.made == (
        "some/model",
        {
            "device": "cpu:0",
            "dtype": "float32",
            "max_model_len": 100,
            "mm_processor_kwargs": {"max_pixels": 5},
        },
    )
    messages, params = llm.asked
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1]["content"][0]["video"].pixels.shape == (3, 2, 2, 3)
    assert (params.temperature, params.seed, params.max_tokens) == (0, 7, 9)


def test_generate_json(run: Run, llm: Any, picture: str) -> None:
    result = run("generate", "some/model", "--image", picture, "What is it?", "--json")
    report = json.loads(result.out)
    timings = report.pop("timings")
    assert report == {
        "model": "some/model",
        "text": "a red circle",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 2,
    }
    assert set(timings) == {"load_s", "first_token_s", "total_s"}


def test_generate_reads_the_question_from_standard_input(
    run: Run, llm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "question").write_text("How many?\n")
    with (tmp_path / "question").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        run("generate", "some/model", "-")
    assert llm.asked[0][0]["content"] == [{"type": "text", "text": "How many?"}]


def test_generate_answers_lines_in_their_order(
    run: Run, llm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, picture: str
) -> None:
    """As a pipe has them, without those that are empty; answers come as they are ready."""

    def chat_iter(self: Any, chats: Any, params: Any) -> Iterator[tuple[int, RequestOutput]]:
        outputs = [next(iter(self.stream_chat(chat, params))) for chat in chats]
        FakeLLM.asked = (chats, params)
        for index in (2, 0, 1):
            answer = replace(outputs[index].outputs[0], text=f"answer\n{index}")
            yield index, replace(outputs[index], outputs=[answer])

    monkeypatch.setattr(FakeLLM, "chat_iter", chat_iter, raising=False)
    for options in ([], ["--json"]):
        (tmp_path / "questions").write_text("One?\n\n  Two?\nThree?")
        with (tmp_path / "questions").open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            result = run("generate", "some/model", "--lines", "--image", picture, *options)
        assert result.status == 0
        assert [chat[-1]["content"][1]["text"] for chat in llm.asked[0]] == ["One?", "Two?", "Three?"]
        if options:
            lines = [json.loads(line) for line in result.out.splitlines()]
            assert [(x["question"], x["text"]) for x in lines] == [
                ("One?", "answer\n0"),
                ("Two?", "answer\n1"),
                ("Three?", "answer\n2"),
            ]
        else:
            assert result.out == "answer 0\nanswer 1\nanswer 2\n"
    result = run("generate", "some/model", "What?", "--lines")
    assert result.status == 1
    assert "leave QUESTION out" in result.err


def test_a_temperature_without_effect_is_said(run: Run, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("generate", "some/model", "What?", "--temperature", "0.5").err == ""
    best = SamplingParams(temperature=0.01, top_k=1)
    monkeypatch.setattr(FakeLLM, "get_default_sampling_params", lambda self: best)
    assert run("generate", "some/model", "What?").err == ""
    assert "no effect" in run("generate", "some/model", "What?", "--temperature", "0.5").err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_flags(run: Run, shell: str) -> None:
    script = run("completion", shell).out
    assert "serve" in script
    assert "quantization" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize("option", ["--image", "--video"])
def test_missing_file_fails_before_the_model_is_loaded(run: Run, llm: Any, option: str) -> None:
    FakeLLM.made = None  # type: ignore[attr-defined]
    result = run("generate", "some/model", option, "absent.png", "What?")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"opsin: {option} absent.png: cannot read the file")
    assert result.err.count("\n") == 1
    assert llm.made is None


def test_limits_hold_for_the_media_of_generate(run: Run, llm: Any, picture: str) -> None:
    result = run("generate", "some/model", "--image", picture, "What?", "--max-image-pixels", "11")
    assert result.status == 1
    assert "12 pixels" in result.err or "at most 11" in result.err


def test_settings_of_the_engine_reach_the_model_of_generate(run: Run, llm: Any) -> None:
    assert (
        run("generate", "some/model", "What?", "--no-enable-prefix-caching", "--max-num-seqs", "2").status
        == 0
    )
    assert llm.made == ("some/model", {"enable_prefix_caching": False, "max_num_seqs": 2})


def test_error_is_one_line_and_a_traceback_with_debug(run: Run, llm: Any) -> None:
    llm.error = RequestError("it does not fit:\n  too long")
    result = run("generate", "some/model", "What?")
    assert result.status == 1
    assert result.err == "opsin: it does not fit: too long\n"
    result = run("generate", "some/model", "What?", "--debug")
    assert "Traceback" in result.err
    assert result.err.endswith("opsin: it does not fit: too long\n")


def test_unexpected_error_says_so(run: Run, llm: Any) -> None:
    llm.error = ZeroDivisionError("division by zero")
    result = run("generate", "some/model", "What?")
    assert result.status == 1
    assert result.err == "opsin: unexpected ZeroDivisionError: division by zero (--debug shows where)\n"


def test_interruption_is_quiet(run: Run, llm: Any) -> None:
    llm.error = KeyboardInterrupt()
    result = run("generate", "some/model", "What?")
    assert (result.status, result.out, result.err) == (130, "a red", "")


# --------------------------------------------------------------------------------------------------
# plugins and doctor
# --------------------------------------------------------------------------------------------------


def opened(index: int) -> Device:
    return Device(
        name="chip",
        torch_device=f"chip:{index}",
        capabilities=Capabilities(dtypes=("float32", "bfloat16"), dtype_for={}),
        memory=lambda: MemoryInfo(free_bytes=2**30, total_bytes=2**31),
        details={"driver": "1.2"},
    )


@hookimpl
def opsin_register_models() -> list[ModelSpec]:
    return [ModelSpec(architecture="Toy", build=lambda context: None)]  # type: ignore[arg-type, return-value]


@hookimpl
def opsin_register_devices() -> list[DeviceSpec]:
    good = Probe(score=5, reason="found", details={"cores": 3})
    bad = Probe(score=0, reason="no driver", next_step="install the driver")
    return [
        DeviceSpec(name="chip", torch_type="chip", probe=lambda: good, open=opened),
        DeviceSpec(name="other", torch_type="other", probe=lambda: bad, open=opened),
    ]


THIS_MODULE = EntryPoint(name="toys", value=f"{__name__}_plugin", group="opsin.v1")
BROKEN = EntryPoint(name="broken", value="a_module_nobody_has", group="opsin.v1")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make entry points look installed."""
    monkeypatch.setitem(sys.modules, f"{__name__}_plugin", sys.modules[__name__])

    def installed(*entries: EntryPoint) -> None:
        monkeypatch.setattr(discovery, "_installed", lambda: list(entries))
        monkeypatch.setattr(plugins, "entry_points", lambda group: [])  # no checkpoints

    return installed


def test_plugins_shows_who_owns_what(run: Run, installed: Any) -> None:
    installed(THIS_MODULE, BROKEN)
    out = run("plugins").out
    assert "\n  model   Toy    toys\n" in out
    assert "\n  device  chip   toys\n" in out
    assert "No module named 'a_module_nobody_has'" in out
    report = json.loads(run("plugins", "--json").out)
    assert {"kind": "model", "key": "Toy", "plugin": "toys"} in report["provides"]
    assert report["failures"][0]["name"] == "broken"
    assert report["advice"] == []


def test_plugins_without_any_says_what_to_install(run: Run, installed: Any) -> None:
    installed()
    result = run("plugins")
    assert result.status == 0
    assert "Plugins: none" in result.out
    assert "no plugin provides a model; install one of opsin-models-internvl," in result.out
    assert "no plugin provides a device; install one of opsin-device-cpu," in result.out


def test_plugin_error_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSIN_PLUGINS", "absent")
    result = run("plugins")
    assert result.status == 1
    assert result.err.startswith("opsin: plugin 'absent' was asked for and is not installed")
    assert result.err.count("\n") == 1


def test_doctor_on_a_working_machine(run: Run, installed: Any) -> None:
    installed(THIS_MODULE)
    result = run("doctor")
    assert result.status == 0
    assert "chip   5      found" in result.out
    assert "other  0      no driver  install the driver" in result.out
    assert "cores  3" in result.out
    assert re.search(r"chip +rms_norm +reference", result.out)
    assert "device=chip:0 is what a model would run on." in result.out
    assert "Everything is in order." in result.out


def test_doctor_json_and_opening_a_device(run: Run, installed: Any) -> None:
    installed(THIS_MODULE)
    report = json.loads(run("doctor", "--json", "--device", "chip:1").out)
    assert report["device"] == "chip:1"
    assert report["opened"] == {
        "torch device": "chip:1",
        "free memory": "1.0 GiB of 2.0 GiB",
        "dtypes": "float32, bfloat16",
        "communication": "gloo",
        "mechanisms": "none",
        "driver": "1.2",
    }
    assert report["devices"][1] == {
        "name": "other",
        "score": 0,
        "reason": "no driver",
        "next_step": "install the driver",
        "details": {},
    }
    assert report["packages"]["torch"].startswith("2.")
    assert report["advice"] == []


def test_doctor_with_a_device_that_cannot_be_used(run: Run, installed: Any) -> None:
    installed(THIS_MODULE)
    result = run("doctor", "--device", "other")
    assert result.status == 1
    assert "- device 'other' cannot be used: no driver; install the driver" in result.out


def test_doctor_advises_on_failures_and_what_is_missing(run: Run, installed: Any) -> None:
    installed(BROKEN)
    result = run("doctor")
    assert result.status == 1
    assert "- plugin broken (entry point a_module_nobody_has) failed: ModuleNotFoundError" in result.out
    assert "- no plugin provides a model" in result.out
    assert "- no plugin provides a device" in result.out


def test_doctor_reports_plugins_in_conflict(run: Run, installed: Any) -> None:
    installed(THIS_MODULE, EntryPoint(name="toys", value="another_module", group="opsin.v1"))
    result = run("doctor")
    assert result.status == 1
    assert "- 2 plugins have the name 'toys'" in result.out
    assert "torch" in result.out


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def test_table_in_a_pipe_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    printing.print_table("Things", ("name", "value"), [["long name", "1"], ["b", "[red]2"]])
    printing.print_table("Empty", ("name",), [])
    expected = "Things:\n  name       value\n  long name  1\n  b          [red]2\n\nEmpty: none\n\n"
    assert capsys.readouterr().out == expected


def test_table_on_a_terminal_is_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    printing.print_table("Things", ("name", "value"), [["b", "[red]2"]])
    printing.print_table("Empty", ("name",), [])
    out = capsys.readouterr().out
    assert "─" in out
    assert "[red]2" in out
    assert "none" in out


# --------------------------------------------------------------------------------------------------
# As a process of its own
# --------------------------------------------------------------------------------------------------


def process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plugins"], ["plugins", "--json"], ["generate", "--help"]]
)
def test_light_commands_load_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = f"""
import sys
from opsin.cli import main
try:
    main({arguments!r})
except SystemExit as exit:
    assert not exit.code, exit.code
heavy = {{"torch", "transformers", "numpy", "PIL", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = process(code)
    assert result.returncode == 0, result.stderr


def test_running_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "opsin", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"opsin {opsin.__version__}\n"


def test_reader_that_goes_away() -> None:
    """``opsin plugins | true`` says nothing on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from opsin.cli import main; main()", "plugins"]
    try:
        result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert result.stderr == ""
    assert result.returncode == 1


def test_doctor_holds_a_checkpoint_against_the_contract(run: Run, tmp_path: Path) -> None:
    folder = str(GOLDEN / "qwen2vl" / "model")
    result = run("doctor", "--model", folder, "--json")
    report = json.loads(result.out)
    assert result.status == 0, report["advice"]
    results = {check["check"]: check["result"] for check in report["model"]}
    assert results["batched"] == results["encoder"] == "passed"
    assert "failed" not in results.values()
    empty = run("doctor", "--model", str(tmp_path), "--json")
    assert empty.status == 1
    assert "config.json" in json.loads(empty.out)["advice"][-1]

"""The command line of ``opsin serve``: every syntax leads to the same settings."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from opsin import EngineConfig
from opsin.cli import app
from opsin.cli import serve as command
from opsin.server import run as run_module
from opsin.server.run import Listen
from opsin.server.settings import RequestLimits, ServerSettings

Parsed = tuple[EngineConfig, ServerSettings, Listen]
Parse = Callable[..., Parsed]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """What a command line asks for, without serving it."""
    for name in ("OPSIN_API_KEY", "VLLM_API_KEY", "OPSIN_IMAGE_FETCH_TIMEOUT", "VLLM_IMAGE_FETCH_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)

    def parse(*arguments: str) -> Parsed:
        asked: list[Parsed] = []
        monkeypatch.setattr(run_module, "serve", lambda *given: asked.append(given) or 0)
        with pytest.raises(SystemExit) as ended:
            app(["serve", *arguments])
        assert ended.value.code == 0, "a usage error"
        return asked[0]

    return parse


def test_defaults(parse: Parse) -> None:
    engine, settings, listen = parse("some/model")
    assert engine == EngineConfig(model="some/model"), "the library's own defaults"
    assert settings == ServerSettings()
    assert (listen.host, listen.port) == ("127.0.0.1", 8000)


def test_the_page_item_by_item(parse: Parse) -> None:
    """The command lines that users of the reference have in their notes."""
    engine, *_ = parse(
        *("some/model", "--task", "generate", "--trust-remote-code", "--max-model-len", "4096"),
        *("--limit-mm-per-prompt", "image=2"),
    )
    assert engine == EngineConfig(
        model="some/model", trust_remote_code=True, max_model_len=4096, limit_mm_per_prompt={"image": 2}
    )
    engine, *_ = parse("some/model", "--task", "embedding", "--chat-template", "t.jinja")
    assert (engine.task, engine.chat_template) == ("embed", "t.jinja")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--limit-mm-per-prompt", "image=2"], {"image": 2}),
        (["--limit-mm-per-prompt=image=2"], {"image": 2}),
        (["--limit-mm-per-prompt", "image=2,video=1"], {"image": 2, "video": 1}),
        (["--limit-mm-per-prompt", '{"image": 2}'], {"image": 2}),
        (["--limit-mm-per-prompt", '{"image": {"count": 2, "width": 512}}'], {"image": 2}),
        (["--limit-mm-per-prompt.image", "2"], {"image": 2}),
        (["--limit-mm-per-prompt.image=2", "--limit-mm-per-prompt.video", "0"], {"image": 2, "video": 0}),
        (["--limit_mm_per_prompt.image", "2"], {"image": 2}),
        (["--limit-mm-per-prompt", "image=1", "--limit-mm-per-prompt", "image=2"], {"image": 2}),
    ],
)
def test_limits_in_every_syntax(parse: Parse, arguments: list[str], expected: dict[str, int]) -> None:
    assert parse("m", *arguments)[0].limit_mm_per_prompt == expected
    assert parse(*arguments, "m")[0].limit_mm_per_prompt == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mm-processor-kwargs", '{"max_pixels": 5, "name": "x"}'],
        ["--mm-processor-kwargs", "max_pixels=5,name=x"],
        ["--mm-processor-kwargs.max_pixels", "5", "--mm-processor-kwargs.name", "x"],
    ],
)
def test_options_in_every_syntax(parse: Parse, arguments: list[str]) -> None:
    assert parse("m", *arguments)[0].mm_processor_kwargs == {"max_pixels": 5, "name": "x"}


@pytest.mark.parametrize(
    ("arguments", "task"),
    [
        ([], "generate"),
        (["--task", "auto"], "generate"),
        (["--task", "embed"], "embed"),
        (["--task", "embedding"], "embed"),
        (["--runner", "pooling"], "embed"),
        (["--runner", "generate"], "generate"),
        (["--runner", "pooling", "--task", "embed"], "embed"),
    ],
)
def test_task_and_runner(parse: Parse, arguments: list[str], task: str) -> None:
    assert parse("m", *arguments)[0].task == task


def test_every_flag_arrives(parse: Parse, tmp_path: Path) -> None:
    engine, settings, listen = parse(
        *("m", "--served-model-name", "a", "--served-model-name", "b", "--revision", "r", "--tokenizer", "t"),
        *("--device", "cpu:0", "--dtype", "half", "--seed", "-5", "--load-format", "safetensors"),
        *("--chat-template-content-format", "string", "--trust-request-chat-template"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--pooling-type", "mean", "--no-normalize", "--allowed-local-media-path", str(tmp_path)),
        *("--allowed-media-domains", "x.example", "--allow-loopback-media", "--enable-mm-embeds"),
        *("--image-fetch-timeout", "2.5", "--max-media-bytes", "11", "--max-request-media-bytes", "12"),
        *("--max-image-pixels", "13", "--max-video-pixels", "14", "--max-video-frames", "15"),
        *("--sampled-video-frames", "16", "--max-num-seqs", "17", "--max-num-batched-tokens", "18"),
        *("--max-encoder-tokens", "19", "--no-enable-prefix-caching", "--kv-cache-memory", "20"),
        *("--encoder-cache-memory", "21", "--media-cache-memory", "22", "--preprocess-threads", "23"),
        *("--host", "::1", "--port", "24", "--uds", "/s", "--root-path", "/p", "--ssl-keyfile", "k"),
        *("--ssl-certfile", "c", "--ssl-keyfile-password", "w", "--ssl-ca-certs", "d", "--no-ui"),
        *(
            "--shutdown-timeout",
            "1.5",
            "--api-key",
            "k1",
            "--api-key",
            "k2",
            "--allowed-origins",
            "https://o",
        ),
        *("--max-body-bytes", "25", "--max-parts", "26", "--max-inputs", "27", "--max-n", "28"),
        *("--max-stop", "0", "--max-logprobs", "5", "--max-waiting", "0"),
    )
    assert engine == EngineConfig(
        model="m",
        revision="r",
        tokenizer="t",
        device="cpu:0",
        dtype="float16",
        seed=-5,
        chat_template_content_format="string",
        pooling_type="mean",
        normalize=False,
        max_media_bytes=11,
        max_image_pixels=13,
        max_video_pixels=14,
        max_video_frames=15,
        sampled_video_frames=16,
        max_num_seqs=17,
        max_num_batched_tokens=18,
        max_encoder_tokens=19,
        enable_prefix_caching=False,
        kv_cache_memory=20,
        encoder_cache_memory=21,
        media_cache_memory=22,
        preprocess_threads=23,
    )
    assert settings.served_model_names == ("a", "b")
    assert settings.api_keys == ("k1", "k2")
    assert settings.limits == RequestLimits(
        body_bytes=25, parts=26, inputs=27, n=28, stop=0, logprobs=5, waiting=0
    )
    fetch = settings.fetch
    assert (fetch.timeout_s, fetch.timeout_variable) == (2.5, "--image-fetch-timeout")
    assert (fetch.max_bytes, fetch.max_request_bytes) == (11, 12)
    assert (fetch.allow_loopback, fetch.accept_embeds, fetch.local_root) == (True, True, tmp_path)
    assert list(fetch.allowed_domains or ()) == ["x.example"]
    assert (settings.trust_request_chat_template, settings.ui) == (True, False)
    assert (settings.root_path, settings.allowed_origins) == ("/p", ("https://o",))
    assert settings.shutdown_timeout_s == 1.5
    assert listen == Listen(
        host="::1",
        port=24,
        uds="/s",
        ssl_keyfile="k",
        ssl_certfile="c",
        ssl_keyfile_password="w",
        ssl_ca_certs="d",
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument"),
        (["m", "--no-such-flag"], "No such option"),
        (["m", "--max-model-le", "5"], "--max-model-len"),
        (["m", "--task", "classify"], "generate"),
        (["m", "--task", "generate", "--runner", "pooling"], "contradict"),
        (["m", "--limit-mm-per-prompt", "image"], "name=value"),
        (["m", "--limit-mm-per-prompt", "image=two"], "expected a number"),
        (["m", "--limit-mm-per-prompt", "image=-1"], "expected a number"),
        (["m", "--limit-mm-per-prompt", "{"], "not JSON"),
        (["m", "--limit-mm-per-prompt.image"], "expected a value"),
        (["m", "--load-format", "pt"], "safetensors"),
        (["m", "--tool-call-parser", "pythonic"], "hermes"),
        (["m", "--config", "absent.yaml"], "cannot read"),
    ],
)
def test_usage_errors(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["serve", *arguments])
    assert ended.value.code == 2
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert says in words


# --------------------------------------------------------------------------------------------------
# The file and the environment
# --------------------------------------------------------------------------------------------------

FILE = """
model: from/file
max-model-len: 100
max_num_seqs: 3
limit-mm-per-prompt: {image: 2}
mm-processor-kwargs:
  max_pixels: 5
served-model-name: [a, b]
api-key: secret
enable-prefix-caching: false
ui: no
"""


def test_config_file(parse: Parse, tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(FILE)
    engine, settings, _ = parse("--config", str(path))
    assert engine == EngineConfig(
        model="from/file",
        max_model_len=100,
        max_num_seqs=3,
        limit_mm_per_prompt={"image": 2},
        mm_processor_kwargs={"max_pixels": 5},
        enable_prefix_caching=False,
    )
    assert settings.served_model_names == ("a", "b")
    assert settings.api_keys == ("secret",)
    assert settings.ui is False


def test_flags_over_environment_over_file(
    parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(FILE)
    monkeypatch.setenv("OPSIN_MAX_MODEL_LEN", "200")
    monkeypatch.setenv("OPSIN_MAX_NUM_SEQS", "4")
    engine, *_ = parse("from/flag", "--max-model-len", "300", "--config", str(path))
    assert (engine.model, engine.max_model_len, engine.max_num_seqs) == ("from/flag", 300, 4)
    monkeypatch.setenv("OPSIN_CONFIG", str(path))
    assert parse()[0].model == "from/file"


def test_keys_and_deadline_from_the_environment(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "old")
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "7")
    _, settings, _ = parse("m")
    assert settings.api_keys == ("old",)
    assert (settings.fetch.timeout_s, settings.fetch.timeout_variable) == (7, "VLLM_IMAGE_FETCH_TIMEOUT")
    monkeypatch.setenv("OPSIN_API_KEY", "new")
    monkeypatch.setenv("OPSIN_IMAGE_FETCH_TIMEOUT", "8")
    _, settings, _ = parse("m")
    assert settings.api_keys == ("new",)
    assert (settings.fetch.timeout_s, settings.fetch.timeout_variable) == (8, "OPSIN_IMAGE_FETCH_TIMEOUT")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("max-model-length: 5", "did you mean 'max-model-len'"),
        ("- a\n- b", "flags as keys"),
        ("a: [", "not YAML"),
        ("max-model-len: many", "--max-model-len"),
        ("config: other.yaml", "unknown flag"),
        ("model: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_bad_files(content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        app(["serve", "m", "--config", str(path)])
    assert ended.value.code == 2
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert says in words


# --------------------------------------------------------------------------------------------------
# Help, and what is missing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 200])
def test_help_is_grouped_and_shows_flags_and_defaults_in_full(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        app(["serve", "--help"])
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= min(columns, 110)
    topics: dict[str, list[str]] = {}
    for parameter in typer.main.get_command(app).commands["serve"].params:  # type: ignore[attr-defined]
        if parameter.rich_help_panel is not None:
            flags = topics.setdefault(parameter.rich_help_panel, [])
            flags += [*parameter.opts, *parameter.secondary_opts]
    assert list(topics) == [
        command.MODEL,
        command.CHAT,
        command.MEDIA,
        command.ENGINE,
        command.HTTP,
        command.SECURITY,
        command.LIMITS,
    ]
    _, *sections = re.split(rf"^({'|'.join(topics)}):$", text, flags=re.M)
    assert sections[::2] == list(topics)
    for flags, section in zip(topics.values(), sections[1::2]):
        assert set(flags) <= set(re.findall(r"(?<!\S)--[a-z-]+(?!\S)", section))
    assert "opsin serve ./model --host 0.0.0.0" in text
    for flag, default in (("--port", "8000"), ("--max-n", "64"), ("--max-image-pixels", "67108864")):
        about = text[text.index(f"  {flag} ") :].split("\n  --")[0]
        assert f"[default: {default}" in " ".join(about.split())


def test_missing_packages_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = command.importlib.util.find_spec

    def without_fastapi(name: str, *arguments: Any) -> Any:
        return None if name in ("fastapi", "prometheus_client") else found(name, *arguments)

    monkeypatch.setattr(command.importlib.util, "find_spec", without_fastapi)
    with pytest.raises(SystemExit) as ended:
        app(["serve", "m"])
    assert ended.value.code == 1
    expected = "opsin: opsin serve needs fastapi, prometheus-client; pip install 'opsin[serve]'\n"
    assert capsys.readouterr().err == expected


def test_help_loads_nothing_heavy() -> None:
    import subprocess

    code = """
import sys
from opsin.cli import app
try:
    app(["serve", "--help"])
except SystemExit:
    pass
heavy = {"torch", "transformers", "fastapi", "uvicorn", "prometheus_client", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

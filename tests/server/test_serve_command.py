"""The command line of ``opsin serve``: every syntax leads to the same settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from opsin import LLM, EngineConfig
from opsin.cli import app, main
from opsin.cli.flags import described
from opsin.config import SpeculativeConfig
from opsin.errors import ConfigError
from opsin.fetch.settings import FetchSettings
from opsin.server.settings import Listen, RequestLimits, ServerSettings
from tests.server.conftest import Parse


def test_defaults(parse: Parse) -> None:
    engine, settings, listen = parse("some/model")
    assert engine == EngineConfig(model="some/model"), "the library's own defaults"
    assert settings == ServerSettings()
    assert (listen.host, listen.port) == ("127.0.0.1", 8000)


@pytest.mark.parametrize(
    "value",
    [
        '{"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 5}',
        "method=ngram,num_speculative_tokens=8,prompt_lookup_max=5",
    ],
)
def test_speculation(parse: Parse, value: str) -> None:
    engine, *_ = parse("some/model", "--speculative-config", value)
    assert engine.speculative == SpeculativeConfig(num_speculative_tokens=8, prompt_lookup_max=5)


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
    key, certificate, authorities = (str(tmp_path / name) for name in ("k", "c", "d"))
    for file in (key, certificate, authorities):
        Path(file).touch()
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
        *("--host", "::1", "--port", "24", "--uds", "/s", "--root-path", "/p", "--ssl-keyfile", key),
        *(
            "--ssl-certfile",
            certificate,
            "--ssl-keyfile-password",
            "w",
            "--ssl-ca-certs",
            authorities,
            "--no-ui",
        ),
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
        load_format="safetensors",
        seed=-5,
        chat_template_content_format="string",
        tool_call_parser="hermes",
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
    assert settings.served_model_name == ["a", "b"]
    assert settings.api_key == ["k1", "k2"]
    assert settings.limits == RequestLimits(
        max_body_bytes=25, max_parts=26, max_inputs=27, max_n=28, max_stop=0, max_logprobs=5, max_waiting=0
    )
    assert settings.fetch == FetchSettings(
        image_fetch_timeout=2.5,
        max_media_bytes=11,
        max_request_media_bytes=12,
        allow_loopback_media=True,
        enable_mm_embeds=True,
        allowed_local_media_path=tmp_path,
        allowed_media_domains=["x.example"],
    )
    assert (settings.trust_request_chat_template, settings.ui) == (True, False)
    assert (settings.root_path, settings.allowed_origins) == ("/p", ["https://o"])
    assert settings.shutdown_timeout == 1.5
    assert listen == Listen(
        host="::1",
        port=24,
        uds="/s",
        ssl_keyfile=key,
        ssl_certfile=certificate,
        ssl_keyfile_password="w",
        ssl_ca_certs=authorities,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "MODEL requires an argument"),
        (["m", "--no-such-flag"], "Unknown option"),
        (["m", "--max-model-le", "5"], "--max-model-len"),
        (["m", "--task", "classify"], "generate"),
        (["m", "--task", "generate", "--runner", "pooling"], "contradict"),
        (["m", "--limit-mm-per-prompt", "image"], "name=value"),
        (["m", "--limit-mm-per-prompt", "image=two"], "expected an integer"),
        (["m", "--limit-mm-per-prompt", "image=-1"], "expected an integer"),
        (["m", "--limit-mm-per-prompt", "{"], "not JSON"),
        (["m", "--limit-mm-per-prompt.image"], "requires an argument"),
        (["m", "--load-format", "pt"], "safetensors"),
        (["m", "--tool-call-parser", "pythonic"], "hermes"),
        (["m", "--config", "absent.yaml"], "cannot read"),
    ],
)
def test_usage_errors(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    words = " ".join(capsys.readouterr().err.split())
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
    assert settings.served_model_name == ["a", "b"]
    assert settings.api_key == ["secret"]
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
    assert settings.api_key == ["old"]
    assert settings.fetch.image_fetch_timeout == 7
    monkeypatch.setenv("OPSIN_API_KEY", "new")
    monkeypatch.setenv("OPSIN_IMAGE_FETCH_TIMEOUT", "8")
    _, settings, _ = parse("m")
    assert settings.api_key == ["new"]
    assert settings.fetch.image_fetch_timeout == 8


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("OPSIN_UI", "no", "ui", False),
        ("OPSIN_TRUST_REMOTE_CODE", "1", "trust_remote_code", True),
        ("OPSIN_LIMIT_MM_PER_PROMPT", "image=2,video=1", "limit_mm_per_prompt", {"image": 2, "video": 1}),
        (
            "OPSIN_LIMIT_MM_PER_PROMPT",
            '{"image": 2, "video": 1}',
            "limit_mm_per_prompt",
            {"image": 2, "video": 1},
        ),
        ("OPSIN_CHAT_TEMPLATE", "two words", "chat_template", "two words"),
        ("OPSIN_SERVED_MODEL_NAME", "a b", "served_model_name", ["a", "b"]),
        ("OPSIN_MAX_MODEL_LEN", "", "max_model_len", None),
    ],
)
def test_environment(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, field: str, expected: Any
) -> None:
    monkeypatch.setenv(variable, value)
    engine, settings, _ = parse("m")
    assert getattr(engine if hasattr(engine, field) else settings, field) == expected


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_deadline_that_is_none(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", value)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "m"])
    assert ended.value.code == (2 if value == "soon" else 1)
    assert re.search("image.fetch.timeout", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("max-model-length: 5", "did you mean 'max-model-len'"),
        ("- a\n- b", "flags as keys"),
        ("a: [", "not YAML"),
        ("max-model-len: many", "--max-model-len"),
        ("config: other.yaml", "unknown 'config'"),
        ("model: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_bad_files(content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "m", "--config", str(path)])
    assert ended.value.code == 2
    words = " ".join(capsys.readouterr().err.split())
    assert says in words


# --------------------------------------------------------------------------------------------------
# One truth
# --------------------------------------------------------------------------------------------------

BY_PYTHON_ONLY = {"local_media", "host_shares"}
"""Fields of `EngineConfig` that are no flag, as its docstring says."""


def test_every_setting_of_the_engine_is_a_flag_and_a_keyword_with_one_default() -> None:
    flags = {a.field_info.name: a.field_info.default for a in app["serve"].assemble_argument_collection()}
    of_generate = {
        a.field_info.name: a.field_info.default for a in app["generate"].assemble_argument_collection()
    }
    keywords = inspect.signature(LLM).parameters
    for name, parameter in inspect.signature(EngineConfig).parameters.items():
        default = keywords[name].default
        assert default == {"local_media": True}.get(name, vars(EngineConfig).get(name, default)), name
        if name not in BY_PYTHON_ONLY:
            assert flags[name] == of_generate[name] == default, name
        assert keywords[name].kind is (
            parameter.KEYWORD_ONLY if name != "model" else parameter.POSITIONAL_OR_KEYWORD
        )
    own = {"plugins", "fetch_urls"}
    assert set(keywords) == {*inspect.signature(EngineConfig).parameters, *own}
    assert BY_PYTHON_ONLY.isdisjoint(flags)


@pytest.mark.parametrize("cls", [EngineConfig, ServerSettings, RequestLimits, FetchSettings, Listen])
def test_every_setting_is_described_once(cls: type) -> None:
    topics = [(topic, name) for topic, name, text in described(cls) if text]
    assert sorted(name for _, name in topics) == sorted(field.name for field in dataclasses.fields(cls))
    if cls is EngineConfig:
        assert {name for topic, name in topics if topic == "Attributes"} == BY_PYTHON_ONLY


def test_a_misspelt_setting_is_answered_with_the_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"unknown 'max_num_seq' \(did you mean 'max_num_seqs'\?\)"):
        LLM("m", max_num_seq=3)
    (tmp_path / "c.yaml").write_text("max-num-seq: 3")
    for wrong in (["--max-num-seq", "3"], ["--config", str(tmp_path / "c.yaml")]):
        with pytest.raises(SystemExit):
            main(["serve", "m", *wrong])
        assert re.search("[Dd]id you mean.*max-num-seqs", capsys.readouterr().err)


# --------------------------------------------------------------------------------------------------
# Help, and what is missing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 200])
def test_help_is_grouped_and_shows_flags_and_defaults_in_full(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= min(columns, 110)
    topics: dict[str, list[str]] = {}
    for argument in app["serve"].assemble_argument_collection():
        topics.setdefault(argument.parameter.group[0].name, []).extend(argument.names)
    assert list(topics) == [
        "Arguments",
        "Options",
        "Model",
        "Chat and embeddings",
        "Pictures and videos",
        "Engine",
        "Address",
        "Batches",
        "Access",
        "Limits of requests",
    ]
    _, *sections = re.split(rf"^({'|'.join(topics)}):$", text, flags=re.M)
    assert sections[::2] == list(topics)
    for flags, section in zip(topics.values(), sections[1::2]):
        assert set(flags) <= set(re.findall(r"(?<!\S)(?:--?[a-z-]+|MODEL)(?=[\s,])", section))
    assert "opsin serve ./model --host 0.0.0.0" in text
    for flag, default in (("--port", "8000"), ("--max-n", "64"), ("--max-image-pixels", "67108864")):
        about = text[text.index(f"  {flag} ") :].split("\n  --")[0]
        assert f"[default: {default}" in " ".join(about.split())


def test_missing_packages_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec

    def without_fastapi(name: str, *arguments: Any) -> Any:
        return None if name in ("fastapi", "prometheus_client") else found(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", without_fastapi)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "m"])
    assert ended.value.code == 1
    expected = "opsin: opsin serve needs fastapi, prometheus-client; pip install 'opsin[serve]'\n"
    assert capsys.readouterr().err == expected


def test_help_loads_nothing_heavy() -> None:
    import subprocess

    code = """
import sys
from opsin.cli import main
try:
    main(["serve", "--help"])
except SystemExit:
    pass
heavy = {"torch", "transformers", "fastapi", "uvicorn", "prometheus_client", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------------------------------
# Other servers' flags, other people's spelling
# --------------------------------------------------------------------------------------------------

HARMLESS = (
    *("--gpu-memory-utilization", "0.9", "--swap-space=4", "--block-size", "16", "--enforce-eager"),
    *("--max-seq-len-to-capture", "8192", "--compilation-config", '{"level": 3}', "--enable-chunked-prefill"),
    *(
        "--no-enable-chunked-prefill",
        "--disable-log-stats",
        "--disable-log-requests",
        "--pipeline-parallel-size",
    ),
    *(
        "1",
        "--distributed-executor-backend",
        "ray",
        "--disable-custom-all-reduce",
        "--kv-cache-dtype",
        "auto",
    ),
    *("--tokenizer-mode", "auto", "--cpu-offload-gb", "0", "--num-scheduler-steps", "1", "--max-loras", "1"),
    *("--guided-decoding-backend", "xgrammar", "--generation-config", "auto", "--model-impl", "auto"),
    *("--use-v2-block-manager", "--ray_workers_use_nsight", "--config-format", "hf", "--async-scheduling"),
)


def test_vllms_flags_that_ask_for_nothing_are_accepted(
    parse: Parse, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, settings, _ = parse(*HARMLESS, "m", "--max-num-seqs", "3", "--served-model-name", "a")
    assert engine == EngineConfig(model="m", max_num_seqs=3)
    assert settings.served_model_name == ["a"]
    told = capsys.readouterr().err
    assert "--enforce-eager has no effect: compilation and graphs" in told


def test_vllms_other_names_are_translated(parse: Parse) -> None:
    engine, _, _ = parse("m", "--kv-cache-memory-bytes", "4096", "--mm-processor-cache-gb=0.5")
    assert (engine.kv_cache_memory, engine.media_cache_memory) == (4096, 2**29)


def test_vllms_flags_that_ask_for_more_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (("--pipeline-parallel-size", "2"), ("--enable-lora",), ("--kv-cache-dtype", "fp8")):
        with pytest.raises(SystemExit) as ended:
            main(["serve", "m", *flags])
        assert ended.value.code == 2
        assert "is not supported" in capsys.readouterr().err


def test_misspelt_variables_are_named(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPSIN_MAX_MODEL_LENN", "5")
    monkeypatch.setenv("OPSIN_CPU_ISA", "avx2")
    parse("m")
    told = capsys.readouterr().err
    assert (
        "OPSIN_MAX_MODEL_LENN is read by nobody; did you mean OPSIN_MAX_MODEL_LEN (--max-model-len)?" in told
    )
    assert "OPSIN_CPU_ISA" not in told

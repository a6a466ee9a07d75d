"""``opsin serve``: the OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from opsin.cli.errors import Debug
from opsin.cli.serve_arguments import limits_of_media, mapping, read_config
from opsin.errors import ConfigError
from opsin.plugins.known_packages import known_packages

if TYPE_CHECKING:
    from opsin.config import EngineConfig
    from opsin.server.run import Listen
    from opsin.server.settings import ServerSettings

EXAMPLES = f"""Examples:

opsin serve {next(iter(known_packages().checkpoints))}

opsin serve ./model --host 0.0.0.0 --api-key SECRET

opsin serve ./model --max-model-len 4096 --limit-mm-per-prompt image=4

opsin serve ./model --task embedding --chat-template template.jinja

opsin serve --config server.yaml

Every flag can also be set in the environment, --max-model-len as OPSIN_MAX_MODEL_LEN, and in the file of
--config, as max-model-len. The command line comes first, then the environment, then the file."""

_NEEDED = ("fastapi", "uvicorn", "pydantic", "httpx2", "prometheus_client", "yaml")
_MIB = 2**20


Task = Literal["auto", "generate", "embedding", "embed"]
Runner = Literal["auto", "generate", "pooling"]
ContentFormat = Literal["auto", "string", "openai"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16", "float", "half"]
PoolingName = Literal["last", "mean", "cls"]
LoadFormat = Literal["auto", "safetensors"]
Policy = Literal["fcfs", "priority"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _defaults_from(context: typer.Context, value: Path | None) -> Path | None:
    """Before any other option is looked at: what the file says are the defaults."""
    if value is not None:
        names = {
            parameter.name: bool(getattr(parameter, "multiple", False))
            for parameter in context.command.params
            if parameter.name is not None
        }
        context.default_map = {**(context.default_map or {}), **read_config(value, names)}
    return value


def _option(panel: str, help_text: str, *names: str, **more: Any) -> Any:
    if "min" in more:
        more.setdefault("metavar", "N")
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_envvar=False, **more)


MODEL, CHAT, MEDIA = "Model", "Chat and embeddings", "Pictures and videos"
ENGINE, HTTP, SECURITY, LIMITS = "Engine", "Address", "Access", "Limits of requests"


def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, an installed checkpoint, or a hub id.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file with flags.", is_eager=True, callback=_defaults_from),
    ] = None,
    # ---- model ---------------------------------------------------------------------------------
    task: Annotated[Task, _option(MODEL, "Answer (generate) or turn into vectors (embedding).")] = "auto",
    runner: Annotated[Runner, _option(MODEL, "The same as --task, in vLLM's newer words.")] = "auto",
    served_model_name: Annotated[
        list[str] | None,
        _option(MODEL, "Name(s) clients use. Default: MODEL. Also several times.", metavar="NAME"),
    ] = None,
    revision: Annotated[str | None, _option(MODEL, "Revision on the hub.")] = None,
    tokenizer: Annotated[str | None, _option(MODEL, "Another folder or id for the tokenizer.")] = None,
    device: Annotated[str, _option(MODEL, "auto, NAME or NAME:INDEX; see opsin doctor.")] = "auto",
    dtype: Annotated[DTypeName, _option(MODEL, "Type to compute in.")] = "auto",
    max_model_len: Annotated[
        int | None, _option(MODEL, "Most tokens of prompt and answer together.", min=1)
    ] = None,
    load_format: Annotated[LoadFormat, _option(MODEL, "Only safetensors are ever read.")] = "auto",
    trust_remote_code: Annotated[
        bool, _option(MODEL, "Accepted. Code from a model repository is never run.", "--trust-remote-code")
    ] = False,
    seed: Annotated[int | None, _option(MODEL, "Of requests that bring none.")] = None,
    # ---- chat and embeddings -------------------------------------------------------------------
    chat_template: Annotated[
        str | None, _option(CHAT, "File, or Jinja text. Default: the model's own.", metavar="FILE|TEXT")
    ] = None,
    chat_template_content_format: Annotated[
        ContentFormat, _option(CHAT, "What the template wants as content: text, or a list of parts.")
    ] = "auto",
    trust_request_chat_template: Annotated[
        bool, _option(CHAT, "Requests may bring a template of their own.", "--trust-request-chat-template")
    ] = False,
    enable_auto_tool_choice: Annotated[
        bool, _option(CHAT, "Accepted: tools are always on.", "--enable-auto-tool-choice")
    ] = False,
    tool_call_parser: Annotated[Literal["hermes"], _option(CHAT, "Form of tool calls.")] = "hermes",
    pooling_type: Annotated[
        PoolingName | None, _option(CHAT, "How embeddings are made. Default: as the model was trained.")
    ] = None,
    normalize: Annotated[
        bool | None,
        _option(CHAT, "L2-normalise embeddings. Default: as trained.", "--normalize/--no-normalize"),
    ] = None,
    # ---- pictures and videos -------------------------------------------------------------------
    limit_mm_per_prompt: Annotated[
        list[str] | None,
        _option(
            MEDIA,
            "Most items of a request: image=2,video=1, or '{\"image\": 2}', or "
            "--limit-mm-per-prompt.image 2. Default: the model family's.",
            metavar="NAME=N",
        ),
    ] = None,
    mm_processor_kwargs: Annotated[
        list[str] | None,
        _option(MEDIA, "Options of the image processing; written the same ways.", metavar="JSON"),
    ] = None,
    allowed_local_media_path: Annotated[
        Path | None, _option(MEDIA, "Folder whose files file:// URLs may name. Default: none.", metavar="DIR")
    ] = None,
    allowed_media_domains: Annotated[
        list[str] | None,
        _option(MEDIA, "The only hosts to fetch from. Also several times.", metavar="HOST"),
    ] = None,
    allow_loopback_media: Annotated[
        bool, _option(MEDIA, "For tests: URLs may lead to this machine.", "--allow-loopback-media")
    ] = False,
    enable_mm_embeds: Annotated[
        bool, _option(MEDIA, "Requests may bring ready-made embeddings.", "--enable-mm-embeds")
    ] = False,
    image_fetch_timeout: Annotated[
        float | None,
        _option(
            MEDIA,
            "Seconds for a whole fetch. Default: 5, or OPSIN_IMAGE_FETCH_TIMEOUT.",
            allow_from_autoenv=False,
        ),
    ] = None,
    max_media_bytes: Annotated[int, _option(MEDIA, "Of one picture or video.", min=1)] = 64 * _MIB,
    max_request_media_bytes: Annotated[
        int, _option(MEDIA, "Of all that is fetched for one request.", min=1)
    ] = 256 * _MIB,
    max_image_pixels: Annotated[int, _option(MEDIA, "Of one picture or frame.", min=1)] = 64 * _MIB,
    max_video_pixels: Annotated[int, _option(MEDIA, "Of all frames of a video.", min=1)] = 256 * _MIB,
    max_video_frames: Annotated[int, _option(MEDIA, "Of a video given as frames.", min=1)] = 768,
    sampled_video_frames: Annotated[int, _option(MEDIA, "Taken from a video file.", min=1)] = 32,
    # ---- engine --------------------------------------------------------------------------------
    max_num_seqs: Annotated[int, _option(ENGINE, "Most sequences computed in one step.", min=1)] = 64,
    max_num_batched_tokens: Annotated[
        int, _option(ENGINE, "Most tokens computed in one step.", min=1)
    ] = 2048,
    max_encoder_tokens: Annotated[
        int, _option(ENGINE, "Most picture embeddings computed in one step.", min=1)
    ] = 8192,
    enable_prefix_caching: Annotated[
        bool,
        _option(ENGINE, "Reuse equal beginnings.", "--enable-prefix-caching/--no-enable-prefix-caching"),
    ] = True,
    scheduling_policy: Annotated[
        Policy, _option(ENGINE, "First come, first served; or by the priority of requests.")
    ] = "fcfs",
    kv_cache_memory: Annotated[
        int | None, _option(ENGINE, "Bytes. Default: a share of what is free.", min=1)
    ] = None,
    encoder_cache_memory: Annotated[int, _option(ENGINE, "Bytes of encoded pictures kept.", min=0)] = 512
    * _MIB,
    media_cache_memory: Annotated[int, _option(ENGINE, "Bytes of preprocessed pictures kept.", min=0)] = 512
    * _MIB,
    preprocess_threads: Annotated[
        int, _option(ENGINE, "Threads that decode and prepare pictures.", min=1)
    ] = 2,
    # ---- address -------------------------------------------------------------------------------
    host: Annotated[str, _option(HTTP, "Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, _option(HTTP, "0 takes a free one.", min=0, max=65535)] = 8000,
    uds: Annotated[str | None, _option(HTTP, "Unix socket instead of a port.", metavar="PATH")] = None,
    root_path: Annotated[
        str, _option(HTTP, "Prefix under which a proxy shows the server.", metavar="/PREFIX")
    ] = "",
    ssl_keyfile: Annotated[str | None, _option(HTTP, "TLS: private key.", metavar="FILE")] = None,
    ssl_certfile: Annotated[str | None, _option(HTTP, "TLS: certificate.", metavar="FILE")] = None,
    ssl_keyfile_password: Annotated[str | None, _option(HTTP, "TLS: password of the key.")] = None,
    ssl_ca_certs: Annotated[str | None, _option(HTTP, "TLS: certificates of CAs.", metavar="FILE")] = None,
    ui: Annotated[bool, _option(HTTP, "The playground page at /.", "--ui/--no-ui")] = True,
    log_level: Annotated[LogLevel, _option(HTTP, "What is logged.")] = "info",
    access_log: Annotated[
        bool, _option(HTTP, "A line for each request.", "--access-log/--no-access-log")
    ] = True,
    shutdown_timeout: Annotated[
        float | None,
        _option(
            HTTP, "Seconds that accepted requests may go on after SIGTERM. Default: to their end.", min=0
        ),
    ] = None,
    # ---- access --------------------------------------------------------------------------------
    api_key: Annotated[
        list[str] | None,
        _option(
            SECURITY,
            "Key(s) that clients must send. Default: OPSIN_API_KEY or VLLM_API_KEY, else none.",
            metavar="KEY",
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        _option(SECURITY, "Web pages of these origins may call the server. Default: none.", metavar="ORIGIN"),
    ] = None,
    # ---- limits --------------------------------------------------------------------------------
    max_body_bytes: Annotated[int, _option(LIMITS, "Of a request's body.", min=1)] = 64 * _MIB,
    max_parts: Annotated[int, _option(LIMITS, "Content parts of all messages.", min=1)] = 1024,
    max_inputs: Annotated[
        int, _option(LIMITS, "Prompts of a completion, texts of an embedding request.", min=1)
    ] = 1024,
    max_n: Annotated[int, _option(LIMITS, "Samples of one prompt.", min=1)] = 64,
    max_stop: Annotated[int, _option(LIMITS, "Stop strings.", min=0)] = 4,
    max_logprobs: Annotated[int, _option(LIMITS, "Alternatives per token.", min=0, max=20)] = 20,
    max_waiting: Annotated[
        int, _option(LIMITS, "Requests beyond --max-num-seqs; more get status 429.", min=0)
    ] = 512,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's API."""
    _require_packages()
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if log_level != "debug":
        logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("opsin.access").disabled = not access_log
    given = dict(locals())
    from opsin.server.run import serve

    sys.exit(serve(_engine_config(given), _server_settings(given), _listen(given)))


def _require_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"opsin serve needs {', '.join(missing).replace('_', '-')}; pip install 'opsin[serve]'"
        )


def _engine_config(given: dict[str, Any]) -> EngineConfig:
    from opsin.config import EngineConfig

    same = (
        "model",
        "tokenizer",
        "revision",
        "pooling_type",
        "normalize",
        "device",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_encoder_tokens",
        "enable_prefix_caching",
        "scheduling_policy",
        "kv_cache_memory",
        "encoder_cache_memory",
        "media_cache_memory",
        "chat_template",
        "chat_template_content_format",
        "max_media_bytes",
        "max_image_pixels",
        "max_video_frames",
        "max_video_pixels",
        "sampled_video_frames",
        "seed",
        "trust_remote_code",
        "preprocess_threads",
    )
    dtype = {"float": "float32", "half": "float16"}.get(given["dtype"], given["dtype"])
    return EngineConfig(
        **{name: given[name] for name in same},
        task=_task(given["task"], given["runner"]),
        dtype=dtype,
        limit_mm_per_prompt=limits_of_media(given["limit_mm_per_prompt"] or ()) or None,
        mm_processor_kwargs=mapping("--mm-processor-kwargs", given["mm_processor_kwargs"] or ()),
    )


def _task(task: str, runner: str) -> Literal["generate", "embed"]:
    wanted = {"auto": None, "generate": "generate"}.get(task, "embed")
    by_runner = {"auto": None, "generate": "generate", "pooling": "embed"}[runner]
    if wanted and by_runner and wanted != by_runner:
        raise typer.BadParameter(f"--task {task} and --runner {runner} contradict each other")
    return "embed" if "embed" in (wanted, by_runner) else "generate"


def _server_settings(given: dict[str, Any]) -> ServerSettings:
    from opsin.server.fetch.settings import FetchSettings, timeout_from_environment
    from opsin.server.settings import RequestLimits, ServerSettings

    timeout, variable = timeout_from_environment()
    if given["image_fetch_timeout"] is not None:
        timeout, variable = given["image_fetch_timeout"], "--image-fetch-timeout"
    keys = given["api_key"] or [
        value for name in ("OPSIN_API_KEY", "VLLM_API_KEY") if (value := os.environ.get(name))
    ]
    return ServerSettings(
        served_model_names=tuple(given["served_model_name"] or ()),
        api_keys=tuple(keys),
        limits=RequestLimits(
            body_bytes=given["max_body_bytes"],
            parts=given["max_parts"],
            inputs=given["max_inputs"],
            n=given["max_n"],
            stop=given["max_stop"],
            logprobs=given["max_logprobs"],
            waiting=given["max_waiting"],
        ),
        fetch=FetchSettings(
            timeout_s=timeout,
            timeout_variable=variable,
            max_bytes=given["max_media_bytes"],
            max_request_bytes=given["max_request_media_bytes"],
            allowed_domains=given["allowed_media_domains"] or None,
            allow_loopback=given["allow_loopback_media"],
            local_root=given["allowed_local_media_path"],
            accept_embeds=given["enable_mm_embeds"],
        ),
        trust_request_chat_template=given["trust_request_chat_template"],
        allowed_origins=tuple(given["allowed_origins"] or ()),
        root_path=given["root_path"],
        ui=given["ui"],
        shutdown_timeout_s=given["shutdown_timeout"],
    )


def _listen(given: dict[str, Any]) -> Listen:
    from opsin.server.run import Listen

    names = (
        "host",
        "port",
        "uds",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_keyfile_password",
        "ssl_ca_certs",
    )
    return Listen(**{name: given[name] for name in names})

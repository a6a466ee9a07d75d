"""Settings of the server at start-up, besides those of the engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from opsin.config import EngineConfig
from opsin.errors import ConfigError
from opsin.fetch.settings import FetchSettings
from opsin.fields import NonNegative, Positive, Range, check_fields
from opsin.params import MAX_LOGPROBS


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may ask for, and how many requests there may be.

    Limits of requests:
        max_body_bytes: most bytes of a request's body.
        max_parts: most content parts of all messages.
        max_inputs: most prompts of a completion, or texts of an embedding request.
        max_n: most samples of one prompt.
        max_stop: most stop strings.
        max_logprobs: most alternatives per token.
        unknown_fields: what becomes of fields that no one here knows: ``refuse``, or ``ignore`` with a line
            in the log. Names that are nearly right are refused all the same.
        max_waiting: most requests that wait, beyond --max-num-seqs. Further ones get status 429.
        max_receiving_bytes: most bytes of bodies that are not complete yet, all together. Further ones get
            status 503.
        max_connections: most connections. Beyond that, the one that has been idle longest is closed, or if
            none is idle the new one gets status 503.
        receive_timeout: seconds that the head of a request, or its body, may take. Large bodies have longer,
            as long as they come with 16 kB per second.
        send_timeout: seconds after which a client that reads nothing of its answer is disconnected.
    """

    max_body_bytes: Positive = 64 * 2**20
    max_parts: Positive = 1024
    max_inputs: Positive = 1024
    max_n: Positive = 64
    max_stop: NonNegative = 4
    max_logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] = MAX_LOGPROBS
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    max_waiting: NonNegative = 512
    max_receiving_bytes: Positive = 512 * 2**20
    max_connections: Positive = 1024
    receive_timeout: Annotated[float, Range(0.01)] = 60
    send_timeout: Annotated[float, Range(0.01)] = 60

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP side.

    Model:
        served_model_name: name that clients use, one or several. Default: MODEL.

    Chat and embeddings:
        trust_request_chat_template: whether requests may bring a chat template of their own.
        response_store: responses of /v1/responses that are kept in memory, for previous_response_id. Whoever
            has a response's id may go on with it.
        enable_auto_tool_choice: accepted for compatibility. Tools are always on.

    Address:
        root_path: prefix under which a proxy shows the server, such as /vision.
        ui: whether the playground page is served at /.
        log_level: least important messages that are logged.
        log_format: form of log lines: ``text``, or ``json`` with one object a line.
        vllm_metric_names: whether metrics are shown under vLLM's names, too, which begin with ``vllm:``.
        access_log: whether each request is logged, in one line.
        shutdown_timeout: seconds that accepted requests may go on after SIGTERM. Default: to their end.

    Batches:
        files_dir: folder for files of /v1/files and jobs of /v1/batches, which are off without it. Whoever
            may use the server sees all of them.
        max_file_bytes: most bytes of such a file.

    Engine:
        data_parallel_size: engines behind this server, each a process with devices or cores of its own.
            Requests about the same picture meet in the same one; one that ends is started again.

    Access:
        api_key: key that clients must send as ``Authorization: Bearer KEY``, one of several. Default:
            OPSIN_API_KEY or VLLM_API_KEY, otherwise open to all.
        allowed_origins: web pages of these origins may call the server. Default: none.
        allowed_hosts: further names under which a server without a key on loopback may be asked. By default
            localhost, 127.0.0.1 and [::1] only: a page elsewhere could have its own name lead here.

    Attributes:
        any_model_name: whether requests may name any model; they get the one that is there.
        limits: limits of requests.
        fetch: what is fetched for clients.
    """

    served_model_name: Sequence[str] = ()
    trust_request_chat_template: bool = False
    response_store: NonNegative = 0
    enable_auto_tool_choice: bool = False
    root_path: str = ""
    ui: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    vllm_metric_names: bool = False
    access_log: bool = True
    shutdown_timeout: Annotated[float, Range(0)] | None = None
    api_key: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    files_dir: Path | None = None
    max_file_bytes: Positive = 512 * 2**20
    data_parallel_size: Positive = 1
    any_model_name: bool = False
    limits: RequestLimits = field(default_factory=RequestLimits)
    fetch: FetchSettings = field(default_factory=FetchSettings)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.files_dir is not None and self.data_parallel_size > 1:
            raise ConfigError(
                "--files-dir is for one engine; leave it or --data-parallel-size out (opsin batch --ray runs "
                "a job on several)"
            )
        if not all(key.strip() for key in self.api_key):
            raise ConfigError("--api-key (or OPSIN_API_KEY) is empty; expected a key, or leave it out")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path={self.root_path!r}: expected /prefix")

    def names_of(self, config: EngineConfig) -> Sequence[str]:
        """Names that clients may use for the model."""
        return self.served_model_name or (config.model,)


_NEEDED = ("fastapi", "uvicorn", "pydantic", "httpx2", "prometheus_client", "yaml")


def require_packages(command: str) -> None:
    """Raise ConfigError if a package that serving needs is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing).replace("_", "-")
        raise ConfigError(f"{command} needs {names}; pip install 'opsin[serve]'")


def require_ray(command: str) -> None:
    """Raise ConfigError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"{command} needs Ray; pip install 'opsin[ray]'")


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Where the server is reached.

    Address:
        host: address to listen on; 0.0.0.0 for all.
        port: TCP port; 0 takes a free one.
        uds: path of a Unix socket to listen on instead.
        ssl_keyfile: file of the private key, for TLS.
        ssl_certfile: file of the certificate, for TLS.
        ssl_keyfile_password: password of the private key.
        ssl_ca_certs: file of the CAs' certificates.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8000
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.host:
            raise ConfigError(
                "--host is empty, which would listen everywhere; expected an address, such as 127.0.0.1, or "
                "0.0.0.0 for everywhere"
            )
        self._check_tls()

    def _check_tls(self) -> None:
        """Nothing is served in plain because a flag of TLS is missing or leads nowhere."""
        given = {
            f"--{name.replace('_', '-')}": value
            for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_keyfile_password")
            if (value := getattr(self, name)) is not None
        }
        if given and not {"--ssl-certfile", "--ssl-keyfile"} <= given.keys():
            missing = " and ".join(sorted({"--ssl-certfile", "--ssl-keyfile"} - given.keys()))
            raise ConfigError(f"{', '.join(given)} without {missing}: TLS needs a certificate and its key")
        for flag, path in given.items():
            if flag != "--ssl-keyfile-password" and not Path(path).is_file():
                raise ConfigError(f"{flag} {path}: there is no such file")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it, by a TCP port."""
        try:
            return self.uds is None and (self.host == "localhost" or ip_address(self.host).is_loopback)
        except ValueError:
            return False

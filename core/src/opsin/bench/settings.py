"""What a user may set for a benchmark. vLLM's names where they mean the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from opsin.errors import ConfigError
from opsin.fields import NonNegative, Positive, Range, check_fields

Rate = Annotated[float, Range(1e-6)]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """What requests are made of.

    Requests:
        dataset_name: where pictures come from: ``random`` draws them; ``folder`` takes those of
            ``image_folder``, which implies it.
        image_folder: folder with pictures. They are taken in turn, by name.
        image_size: of drawn pictures: WIDTHxHEIGHT, or one number for a square.
        num_images: pictures of each request. 0: requests of text alone.
        same_image: whether all requests have the same pictures.
        input_len: tokens of each question, pictures, template and prefix not counted. A server's tokens are
            not known beforehand: there it is words.
        prefix_len: tokens, or words, of a system prompt that all requests have in common.
        output_len: tokens of each answer.
        ignore_eos: whether answers go on to their full length, whatever the model says.
        temperature: randomness of the answers; 0 always takes the best token.
    """

    dataset_name: Literal["random", "random-mm", "folder"] = "random"
    image_folder: str | None = None
    image_size: str = "448"
    num_images: NonNegative = 1
    same_image: bool = False
    input_len: Positive = 32
    prefix_len: NonNegative = 0
    output_len: Positive = 128
    ignore_eos: bool = True
    temperature: Annotated[float, Range(0)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.size, self.files
        if self.dataset_name == "folder" and self.image_folder is None:
            raise ConfigError("dataset_name='folder': say which, with --image-folder PATH")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of drawn pictures.

        Raises:
            ConfigError: ``image_size`` has another form.
        """
        found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", self.image_size)
        width, height = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not width or not height:
            raise ConfigError(f"image_size={self.image_size!r}: expected such as 448 or 640x480")
        return width, height

    @property
    def files(self) -> list[Path]:
        """Pictures of ``image_folder``, by name.

        Raises:
            ConfigError: it is no folder, or has none.
        """
        if self.image_folder is None:
            return []
        folder = Path(self.image_folder)
        if not folder.is_dir():
            raise ConfigError(f"image_folder={self.image_folder!r}: no such folder")
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise ConfigError(
                f"image_folder={self.image_folder!r}: no picture in it; expected {', '.join(_SUFFIXES)}"
            )
        return files


@dataclass(frozen=True, kw_only=True)
class ThroughputSettings:
    """Many requests at once.

    Load:
        num_prompts: requests, all given at once.
        num_warmups: requests that are answered first and not counted.
    """

    num_prompts: Positive = 64
    num_warmups: NonNegative = 2

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """One batch after another.

    Load:
        batch_size: requests that are answered together.
        num_iters: batches that are measured.
        num_iters_warmup: batches before them that are not.
    """

    batch_size: Positive = 1
    num_iters: Positive = 10
    num_iters_warmup: NonNegative = 2

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Requests to a server as they come in life: one after another, at random.

    Server:
        base_url: of any server with OpenAI's API, with or without /v1. Default: ``host`` and ``port``.
        host: of the server.
        port: of the server.
        api_key: that it asks for. Default: the variable OPENAI_API_KEY.
        request_timeout: seconds that a request may take.

    Load:
        num_prompts: requests in all.
        request_rate: requests per second, on average; ``inf`` sends all at once.
        burstiness: how evenly they come: 1 is a Poisson process; less is burstier, more is more even.
        max_concurrency: most requests that wait for an answer at a time. Default: no limit.
        num_warmups: requests that are answered first and not counted.
        seed: of the requests and their times.
    """

    base_url: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Range(1, 65535)] = 8000
    api_key: str | None = None
    request_timeout: Rate = 600.0
    num_prompts: Positive = 64
    request_rate: str = "inf"
    burstiness: Rate = 1.0
    max_concurrency: Positive | None = None
    num_warmups: NonNegative = 1
    seed: NonNegative = 0

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.rate

    @property
    def rate(self) -> float:
        """``request_rate`` as a number; infinite: all at once.

        Raises:
            ConfigError: it is none, or not above 0.
        """
        try:
            rate = float(self.request_rate)
        except ValueError:
            rate = 0.0
        if not rate > 0:
            raise ConfigError(f"request_rate={self.request_rate!r}: expected a number above 0, or inf")
        return rate

    @property
    def url(self) -> str:
        """Of the API, with ``/v1`` and no slash at the end."""
        url = (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url={self.base_url!r}: expected http://HOST:PORT or https://...")
        return url if url.endswith("/v1") else f"{url}/v1"


@dataclass(frozen=True, kw_only=True)
class ResultSettings:
    """Where results go.

    Results:
        output_json: file for the results as JSON.
        save_result: whether to write them into ``result_dir``, under a name with the date.
        result_dir: folder for ``save_result``, made if it is not there.
        result_filename: name for ``save_result`` instead.
        plot: file for a chart of the times: .png, .svg or .pdf. Needs opsin[plot].
    """

    output_json: str | None = None
    save_result: bool = False
    result_dir: str = "."
    result_filename: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.plot is not None:
            _require_matplotlib(self.plot)


def _require_matplotlib(plot: str) -> None:
    """Said before anything is measured."""
    import importlib.util

    if Path(plot).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"plot={plot!r}: expected a name that ends in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot needs matplotlib; pip install 'opsin[plot]'")

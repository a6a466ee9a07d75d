"""``opsin generate``: one question about pictures or videos, the answer streamed."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli.errors import Debug
from opsin.plugins.known_packages import known_packages

if TYPE_CHECKING:
    from opsin.api import MediaItem
    from opsin.results import RequestOutput

EXAMPLES = f"""Examples:

opsin generate {next(iter(known_packages().checkpoints))} --image cat.jpg "What is in the picture?"

opsin generate ./model --image a.png --image b.png "What differs?" --temperature 0

opsin generate ./model --video frames/ "Which way does it move?" --json"""


def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, an installed checkpoint, or a hub id.")
    ],
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="The question; - reads it from standard input.")
    ],
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A picture: file or data: URL. Also several times."),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="A video file, or a folder of frames. Also several times."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to answer with.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the best token. Default: the model's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    device: Annotated[str, typer.Option(help="auto, NAME or NAME:INDEX; see opsin doctor.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of prompt and answer together.")
    ] = None,
    mm_processor_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help='Options of the model\'s image processing, e.g. {"max_pixels": 50176}.'
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the text, token counts and timings.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what happens while loading.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Ask a model about pictures and videos; the answer is printed as it is made."""
    options = _options(mm_processor_kwargs)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="opsin: %(message)s")
    question = sys.stdin.read().strip() if question == "-" else question
    media = _media(image or [], video or []) if image or video else []
    content = [*media, {"type": "text", "text": question}]
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})  # type: ignore[dict-item]

    from opsin import LLM

    started = time.perf_counter()
    settings = {
        "device": device,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "mm_processor_kwargs": options,
    }
    with LLM(model, **settings) as llm:  # type: ignore[arg-type]
        loaded = time.perf_counter()
        params = replace(llm.get_default_sampling_params(), max_tokens=max_tokens, seed=seed)
        if temperature is not None:
            params = replace(params, temperature=temperature)
        first: float | None = None
        printed = 0
        for output in llm.stream_chat(messages, params):
            if first is None and output.outputs[0].token_ids:
                first = time.perf_counter()
            if not as_json:
                print(output.outputs[0].text[printed:], end="", flush=True)
                printed = len(output.outputs[0].text)
        ended = time.perf_counter()
    if not as_json:
        print()
        return
    timings = {
        "load_s": loaded - started,
        "first_token_s": None if first is None else first - loaded,
        "total_s": ended - loaded,
    }
    print(json.dumps(_result(model, output, timings), indent=2, ensure_ascii=False))


def _options(text: str | None) -> dict[str, Any]:
    try:
        options = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--mm-processor-kwargs") from error
    if not isinstance(options, dict):
        raise typer.BadParameter("expected a JSON object", param_hint="--mm-processor-kwargs")
    return options


def _media(images: list[str], videos: list[str]) -> list[dict[str, Any]]:
    """Content parts; decoded before the model is loaded, so that a bad file is known at once."""
    from opsin.inputs.media import errors_at, image_item, video_item

    parts: list[tuple[str, MediaItem]] = []
    for name in images:
        with errors_at(f"--image {name:.80}"):
            parts.append(("image", image_item(name)))
    for name in videos:
        with errors_at(f"--video {name:.80}"):
            parts.append(("video", video_item(name)))
    return [{"type": kind, kind: item} for kind, item in parts]


def _result(model: str, output: RequestOutput, timings: Mapping[str, float | None]) -> dict[str, Any]:
    answer = output.outputs[0]
    return {
        "model": model,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(answer.token_ids),
        "timings": {name: None if value is None else round(value, 4) for name, value in timings.items()},
    }

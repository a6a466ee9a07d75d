"""``opsin generate``: one question about pictures or videos, the answer streamed."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, validators

from opsin.cli.errors import Debug, reported, usage
from opsin.cli.flags import build, takes
from opsin.config import EngineConfig
from opsin.plugins.known_packages import known_packages

if TYPE_CHECKING:
    from opsin.api import MediaItem
    from opsin.config import MediaLimits
    from opsin.results import RequestOutput

app = App(
    "generate",
    help_epilogue=f"""Examples:

  opsin generate {next(iter(known_packages().checkpoints))} --image cat.jpg "What is in the picture?"
  opsin generate ./model --image a.png --image b.png "What differs?"
  opsin generate ./model --video frames/ "Which way does it move?" --json

Every flag can also be set in the environment, --max-tokens as OPSIN_MAX_TOKENS.
""",
)


@app.default
@reported
@takes(EngineConfig)
def run(
    question: str,
    *,
    image: Sequence[str] = (),
    video: Sequence[str] = (),
    max_tokens: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 512,
    temperature: float | None = None,
    system: str | None = None,
    as_json: Annotated[bool, Parameter("--json")] = False,
    verbose: Annotated[bool, Parameter(("--verbose", "-v"))] = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Ask a model about pictures and videos; the answer is printed as it is made.

    Args:
        question: The question; - reads it from standard input.
        image: Picture: a file or data: URL. Also several times.
        video: Video file, or a folder of frames. Also several times.
        max_tokens: Most tokens to answer with.
        temperature: Randomness; 0 always takes the best token. Default: the model's own.
        system: System message.
        as_json: Print one JSON object with the text, token counts and timings.
        verbose: Show what happens while loading.
        debug: Show the traceback of an error.
    """
    with usage():
        config = build(EngineConfig, settings)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="opsin: %(message)s")
    question = sys.stdin.read().strip() if question == "-" else question
    media = _media(image, video, config) if image or video else []
    content = [*media, {"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})

    from opsin import LLM

    started = time.perf_counter()
    seed = settings.pop("seed", None)
    with LLM(**settings) as llm:
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
    print(json.dumps(_result(settings["model"], output, timings), indent=2, ensure_ascii=False))


def _media(images: Sequence[str], videos: Sequence[str], limits: MediaLimits) -> list[dict[str, Any]]:
    """Content parts; decoded before the model is loaded, so that a bad file is known at once."""
    from opsin.inputs.media import errors_at, media_item

    parts: list[tuple[str, MediaItem]] = []
    for name in images:
        with errors_at(f"--image {name:.80}"):
            parts.append(("image", media_item("image", name, limits)))
    for name in videos:
        with errors_at(f"--video {name:.80}"):
            parts.append(("video", media_item("video", name, limits)))
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

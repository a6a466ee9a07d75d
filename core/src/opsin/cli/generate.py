"""``opsin generate``: one question about pictures or videos, the answer streamed."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, validators

from opsin.cli.asking import opened_all, sampled, without_effect
from opsin.cli.errors import Debug, reported, usage
from opsin.cli.flags import build, takes
from opsin.config import EngineConfig
from opsin.errors import ConfigError
from opsin.plugins.known_packages import known_packages

if TYPE_CHECKING:
    from opsin.llm import LLM
    from opsin.params import SamplingParams
    from opsin.results import RequestOutput

app = App(
    "generate",
    help_epilogue=f"""Examples:

  opsin generate {next(iter(known_packages().checkpoints))} --image cat.jpg "What is in the picture?"
  opsin generate ./model --image a.png --image b.png "What differs?"
  opsin generate ./model --video frames/ "Which way does it move?" --json
  opsin generate ./model --image a.png --lines < questions.txt > answers.txt

Every flag can also be set in the environment, --max-tokens as OPSIN_MAX_TOKENS.
""",
)


@app.default
@reported
@takes(EngineConfig)
def run(
    question: str | None = None,
    *,
    lines: bool = False,
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
        question: The question; without it, or with -, it is read from standard input.
        lines: Each line of standard input is a question of its own; each answer is a line.
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
    questions = _questions(question, lines)
    media = opened_all(image, video, config)
    beginning: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    chats = [
        [*beginning, {"role": "user", "content": [*media, {"type": "text", "text": text}]}]
        for text in questions
    ]

    from opsin import LLM

    started = time.perf_counter()
    seed = settings.pop("seed", None)
    with LLM(**settings) as llm:
        loaded = time.perf_counter()
        params = sampled(llm.get_default_sampling_params(), max_tokens, temperature, seed)
        if temperature is not None and (note := without_effect(params)):
            print(f"opsin: {note}", file=sys.stderr)
        if lines:
            _answer_lines(llm, settings["model"], questions, chats, params, as_json)
            return
        [messages] = chats
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


def _questions(question: str | None, lines: bool) -> list[str]:
    """What is asked: the argument, or what standard input has, whole or line by line."""
    if lines:
        if question not in (None, "-"):
            raise ConfigError("--lines reads the questions from standard input; leave QUESTION out")
        return [line for line in map(str.strip, sys.stdin) if line]
    if question is None and sys.stdin.isatty():
        raise ConfigError('QUESTION is missing; pass it as the last argument, e.g. "What is in the picture?"')
    return [sys.stdin.read().strip() if question in (None, "-") else str(question)]


def _answer_lines(
    llm: LLM,
    model: str,
    questions: Sequence[str],
    chats: Sequence[Sequence[dict[str, Any]]],
    params: SamplingParams,
    as_json: bool,
) -> None:
    """All questions at once; each answer is a line, in the order of the questions."""
    early: dict[int, RequestOutput] = {}
    following = 0
    for index, finished in llm.chat_iter(chats, params):
        early[index] = finished
        while (output := early.pop(following, None)) is not None:
            if as_json:
                about = {"question": questions[following], **_result(model, output)}
                print(json.dumps(about, ensure_ascii=False), flush=True)
            else:
                print(" ".join(output.outputs[0].text.split()), flush=True)
            following += 1


def _result(
    model: str, output: RequestOutput, timings: Mapping[str, float | None] | None = None
) -> dict[str, Any]:
    answer = output.outputs[0]
    measured = {name: None if value is None else round(value, 4) for name, value in (timings or {}).items()}
    return {
        "model": model,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(answer.token_ids),
        **({"timings": measured} if measured else {}),
    }

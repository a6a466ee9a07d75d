"""``opsin bench``: how fast a model or a running server is."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from opsin.bench.settings import (
    LatencySettings,
    PromptSettings,
    ResultSettings,
    ServeSettings,
    ThroughputSettings,
)
from opsin.bench.summary import PERCENTILES, Results, as_json, rows, time_rows, write
from opsin.cli.errors import Debug, reported, usage
from opsin.cli.flags import build, takes
from opsin.config import EngineConfig
from opsin.plugins.known_packages import known_packages

AsJson = Annotated[bool, Parameter("--json", help="Print the results as JSON, no tables.")]

_MODEL = next(iter(known_packages().checkpoints))

app = App(
    "bench",
    help_epilogue=f"""Examples:

  opsin bench latency {_MODEL} --output-len 32
  opsin bench throughput {_MODEL} --image-folder photos/
  opsin bench serve --port 8000 --num-prompts 200 --request-rate 4
""",
)

_SERVE = App(
    "serve",
    help="Measure a running server, opsin's or any other with OpenAI's API.",
    sort_key=3,
    help_epilogue="""Examples:

  opsin bench serve --port 8000 --num-prompts 200 --request-rate 4
  opsin bench serve my-model --base-url https://example.com/v1 --api-key KEY
  opsin bench serve --max-concurrency 8 --save-result --result-dir results/

ttft: from sending a request to its first token; tpot: time per token after
it, of a whole request; between tokens: of all pieces of all answers.
""",
)
app.command(_SERVE)


@app.command(sort_key=1)
@reported
@takes(EngineConfig, PromptSettings, ThroughputSettings, ResultSettings)
def throughput(*, as_json_: AsJson = False, debug: Debug = False, **settings: Any) -> None:
    """Give a model many requests at once, and see how many it answers per second."""
    from opsin.bench import offline

    with usage():
        load, requests, results = _built(settings, ThroughputSettings)
    with _loaded(settings) as llm:
        found = offline.throughput(llm, load, requests, _seed(settings))
    _tell(found, settings, results, as_json_)


@app.command(sort_key=2)
@reported
@takes(EngineConfig, PromptSettings, LatencySettings, ResultSettings)
def latency(*, as_json_: AsJson = False, debug: Debug = False, **settings: Any) -> None:
    """Give a model one batch of requests after another, and see how long each takes."""
    from opsin.bench import offline

    with usage():
        load, requests, results = _built(settings, LatencySettings)
    with _loaded(settings) as llm:
        found = offline.latency(llm, load, requests, _seed(settings))
    _tell(found, settings, results, as_json_)


@_SERVE.default
@reported
@takes(ServeSettings, PromptSettings, ResultSettings)
def serve(
    model: str | None = None, *, as_json_: AsJson = False, debug: Debug = False, **settings: Any
) -> None:
    """Measure a running server, opsin's or any other with OpenAI's API.

    Args:
        model: Name under which the server has the model. Default: the only one that it has.
        as_json_: Print the results as JSON, no tables.
        debug: Show the traceback of an error.
    """
    from opsin.bench import serving

    with usage():
        serving.check_needed()
        load, requests, results = _built(settings, ServeSettings)
        _ = load.url
    found = serving.measure(model, load, requests)
    _tell(found, {name: value for name, value in settings.items() if name != "api_key"}, results, as_json_)


def _built(settings: Mapping[str, Any], load: type[Any]) -> tuple[Any, PromptSettings, ResultSettings]:
    return build(load, settings), build(PromptSettings, settings), build(ResultSettings, settings)


def _loaded(settings: Mapping[str, Any]) -> Any:
    from opsin.llm import LLM

    with usage():
        config = build(EngineConfig, settings)
    logging.basicConfig(level=logging.WARNING, format="opsin: %(message)s")
    own = EngineConfig.__dataclass_fields__
    given = {name: value for name, value in settings.items() if name in own and name != "model"}
    return LLM(config.model, **given)


def _seed(settings: Mapping[str, Any]) -> int:
    return abs(int(settings.get("seed") or 0))


def _tell(found: Results, settings: Mapping[str, Any], results: ResultSettings, as_json_: bool) -> None:
    found.settings = {**asdict(build(PromptSettings, settings)), **settings}
    files = write(found, results)
    if results.plot:
        from opsin.bench.chart import draw  # it imports matplotlib

        draw(found, Path(results.plot))
        files.append(Path(results.plot))
    if as_json_:
        print(json.dumps(as_json(found), indent=2, ensure_ascii=False))
        return
    from opsin.cli.printing import print_table

    print_table("Requests", ("what", "value"), rows(found))
    print_table("Times in ms", ("what", "mean", *(f"p{p}" for p in PERCENTILES)), time_rows(found))
    for text, count in as_json(found)["errors"].items():
        print(f"{count} failed: {text}")
    for file in files:
        print(f"written: {file}")

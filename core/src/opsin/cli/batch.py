"""``opsin batch``: many requests from a file or a folder, answered into a file."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter, validators

from opsin.cli.errors import Debug, reported, usage
from opsin.cli.flags import build, takes
from opsin.config import EngineConfig
from opsin.errors import ConfigError
from opsin.fetch.settings import FetchSettings
from opsin.plugins.known_packages import known_packages
from opsin.server.settings import RequestLimits, ServerSettings, require_packages, require_ray

SOME_FAILED = 3
"""Exit status of a job that is complete, with rows that were refused or failed."""

_CACHE_BYTES = 64 * 2**20

_MODEL = next(iter(known_packages().checkpoints))

app = App(
    "batch",
    help_epilogue=f"""Examples:

  opsin batch {_MODEL} requests.jsonl answers.jsonl
  opsin batch {_MODEL} photos/ answers.jsonl --prompt "What is in the picture?"
  opsin batch {_MODEL} table.csv answers.jsonl --max-tokens 64 --temperature 0
  opsin batch ./model pictures.parquet vectors.jsonl --task embedding

IN is a file of OpenAI's batch API (.jsonl), a folder of pictures, or a table
(.csv, .parquet) with columns for the picture (image: a file, a URL, or bytes),
the question (prompt) and a name (custom_id), as far as rows have them.

The caches of pictures have 64 MiB each here, unless flags say otherwise.

OUT gets a line of JSON for each row as soon as there is an answer, in the form
of OpenAI's batch API; a row that cannot be answered gets its error. Run the
same command again after a crash or Ctrl-C: rows that are in OUT are not asked
again.

Exit status: 0 all rows answered, 3 some rows failed, 1 the job could not be
done, 130 Ctrl-C.
""",
)


@app.default
@reported
@takes(EngineConfig, FetchSettings)
def run(
    source: Annotated[Path, Parameter(name="IN")],
    out: Annotated[Path, Parameter(name="OUT")],
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_tokens: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    temperature: Annotated[float | None, Parameter(validator=validators.Number(gte=0))] = None,
    keep_order: bool = False,
    served_model_name: str | None = None,
    on_ray: Annotated[bool, Parameter("--ray", negative=())] = False,
    replicas: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 1,
    as_json: Annotated[bool, Parameter("--json")] = False,
    verbose: Annotated[bool, Parameter(("--verbose", "-v"))] = False,
    debug: Debug = False,
    **settings: Any,
) -> int:
    """Answer many requests.

    Args:
        source: File of requests, folder of pictures, or table.
        out: File for the answers.
        prompt: The question about each picture, where a row has none.
        system: System message, where rows are no whole requests.
        max_tokens: Most tokens of an answer, where rows are no whole requests.
        temperature: Randomness, where rows are no whole requests. Default: the model's own.
        keep_order: Write answers in the order of the rows, not as they are finished.
        served_model_name: Name of the model in the rows. Default: rows may name any model.
        on_ray: Run on the Ray cluster of RAY_ADDRESS, or on one that is started here. Needs opsin[ray].
        replicas: Engines on the cluster.
        as_json: Print one JSON object with the counts.
        verbose: Show what happens while loading.
        debug: Show the traceback of an error.
    """
    # A job's pictures seldom come twice; where they do, they come one after another.
    settings = {"media_cache_memory": _CACHE_BYTES, "encoder_cache_memory": _CACHE_BYTES, **settings}
    with usage():
        config = build(EngineConfig, settings)
        fetch = build(FetchSettings, settings)
    require_packages("opsin batch")
    if on_ray:
        require_ray("opsin batch --ray")
        if keep_order:
            raise ConfigError("--keep-order is for one machine; leave it out with --ray")
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="opsin: %(message)s")
    for noisy in ("httpx2", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from opsin.server.batch.job import run_job
    from opsin.server.batch.rows import Source

    fields = {"max_tokens": max_tokens, "temperature": temperature}
    rows = Source(
        path=source,
        prompt=prompt,
        system=system,
        fields={name: value for name, value in fields.items() if value is not None},
        embed=config.task == "embed",
    )
    shared = fetch.allowed_local_media_path or Path("/")  # rows are this machine's user's, as are its files
    server = ServerSettings(
        served_model_name=() if served_model_name is None else (served_model_name,),
        any_model_name=served_model_name is None,
        fetch=replace(fetch, allowed_local_media_path=shared),
        limits=RequestLimits(),
    )
    try:
        if on_ray:
            from opsin.ray.batch import run_on_ray

            done = run_on_ray(config, server, rows, out, replicas=replicas)
        else:
            done = run_job(config, server, rows, out, keep_order=keep_order)
    except KeyboardInterrupt:
        print(f"opsin: interrupted; what is done is in {out}: run it again to go on", file=sys.stderr)
        raise
    answered = done.num_before + done.num_written - done.num_failed
    if as_json:
        counts = {"answered": answered, "failed": done.num_failed, "before": done.num_before}
        print(json.dumps(counts))
    else:
        failed = f", {done.num_failed} failed: their lines say why" if done.num_failed else ""
        print(f"{answered} rows answered{failed}; {out}")
    return SOME_FAILED if done.num_failed else 0

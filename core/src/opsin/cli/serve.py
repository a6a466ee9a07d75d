"""``opsin serve``: the OpenAI-compatible server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from opsin.cli.errors import Debug, reported, usage
from opsin.cli.flags import build, takes
from opsin.config import EngineConfig
from opsin.plugins.known_packages import known_packages
from opsin.server.logs import set_up
from opsin.server.settings import Listen, ServerSettings, require_packages, require_ray

_RAY_HELP = "Serve on the Ray cluster of RAY_ADDRESS, or on one that is started here. Needs opsin[ray]."

app = App(
    "serve",
    help_epilogue=f"""Examples:

  opsin serve {next(iter(known_packages().checkpoints))}
  opsin serve ./model --host 0.0.0.0 --api-key SECRET
  opsin serve ./model --max-model-len 4096 --limit-mm-per-prompt image=4
  opsin serve ./model --task embedding --chat-template template.jinja
  opsin serve --config server.yaml

A flag that takes NAME=VALUE can be written image=2,video=1, or
'{{"image": 2}}', or --limit-mm-per-prompt.image 2. Flags that take several
values are repeated.

Every flag can also be set in the environment, --max-model-len as
OPSIN_MAX_MODEL_LEN, and in the YAML file of --config, as max-model-len.
The command line comes first, then the environment, then the file.
""",
)


@app.default
@reported
@takes(EngineConfig, Listen, ServerSettings)
def run(
    *,
    config: Annotated[Path | None, Parameter(help="YAML file with flags.")] = None,
    on_ray: Annotated[bool, Parameter("--ray", negative=(), help=_RAY_HELP)] = False,
    replicas: Annotated[int, Parameter(help="With --ray: engines on the cluster.")] = 1,
    debug: Debug = False,
    **settings: Any,
) -> int:
    """Serve a model over HTTP, with OpenAI's API."""
    with usage():
        engine = build(EngineConfig, settings)
    server = build(ServerSettings, settings)
    listen = build(Listen, settings)
    require_packages("opsin serve")
    set_up(server.log_level, server.log_format)
    if server.log_level != "debug":
        logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("opsin.access").disabled = not server.access_log
    if on_ray:
        require_ray("opsin serve --ray")
        from opsin.ray.run import serve_on_ray

        return serve_on_ray(engine, server, listen, replicas)
    from opsin.server.run import serve

    return serve(engine, server, listen)

"""opsin on a Ray cluster: ``pip install 'opsin[ray]'``.

Ray places whole engines: an engine's tensor-parallel ranks are processes of its own machine, as without Ray.

* `app`: a Ray Serve application, the same server as ``opsin serve``'s.
* `build`: the same for ``serve run opsin.ray:build model=... replicas=2``.
* ``opsin batch --ray``: a job over all nodes, by Ray Data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from opsin.config import EngineConfig
from opsin.errors import ConfigError
from opsin.server.settings import ServerSettings, require_ray

if TYPE_CHECKING:
    from ray import serve

__all__ = ["app", "build"]


def app(
    model: str,
    *,
    replicas: int = 1,
    autoscaling: Mapping[str, Any] | None = None,
    cpus: float | None = None,
    doors: int = 1,
    server: Mapping[str, Any] | ServerSettings | None = None,
    **settings: Any,
) -> serve.Application:
    """A Ray Serve application that answers as ``opsin serve`` does.

    Args:
        model: folder (on every node), name of an installed checkpoint, or hub id.
        replicas: engines.
        autoscaling: Ray Serve's ``autoscaling_config`` for the engines, in place of ``replicas``.
        cpus: cores that Ray reserves for each engine. Default: one for each rank.
        doors: processes that take HTTP requests in, and send them to engines.
        server: settings of the HTTP side, see `opsin.server.settings.ServerSettings`.
        settings: of each engine, see `opsin.EngineConfig`; a ``device`` other than the CPU asks Ray for as
            many of the resource of its name, in capitals, as there are ranks.

    Raises:
        ConfigError: a setting cannot be.
    """
    require_ray("opsin.ray")
    from opsin.ray.deploy import deployed

    http = server if isinstance(server, ServerSettings) else ServerSettings(**dict(server or {}))
    config = EngineConfig(model=model, **settings)
    return deployed(config, http, replicas=replicas, autoscaling=autoscaling, cpus=cpus, doors=doors)


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """For ``serve run opsin.ray:build model=... replicas=2 tensor_parallel_size=2``: texts as settings.

    Raises:
        ConfigError: there is no model, or a setting cannot be.
    """
    given = dict(arguments)
    model = given.pop("model", None)
    if model is None:
        raise ConfigError("model is missing: serve run opsin.ray:build model=NAME")
    own = {"replicas": int, "doors": int, "cpus": float}
    names = {field.name for field in fields(ServerSettings)}
    http = {name: given.pop(name) for name in list(given) if name in names}
    return app(model, server=http, **{name: own.get(name, _value)(text) for name, text in given.items()})


def _value(text: Any) -> Any:
    """A number, true or false where the text is one; in Ray's YAML they are that already."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text

"""A job over all nodes of a cluster: rows are read once, answered by engines of Ray, written here."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from tqdm import tqdm

from opsin.async_engine import AsyncEngine
from opsin.config import EngineConfig
from opsin.fetch.fetcher import MediaFetcher
from opsin.ray.placed import actor_options, settled
from opsin.server.batch.job import Done, left
from opsin.server.batch.output import Output
from opsin.server.batch.rows import Row, Source
from opsin.server.batch.runner import answer
from opsin.server.metrics import Metrics
from opsin.server.serving import Serving
from opsin.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_ROWS_A_BLOCK = 64
_FIELDS = ("custom_id", "route", "body", "error")


class _Rows(Datasource):  # type: ignore[misc]  # ray has no types
    """The rows of a source that are left, as a stream of small blocks: no node ever has all of them."""

    def __init__(self, source: Source, output: Output) -> None:
        self._source, self._done = source, output.done

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known before it is read."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:  # noqa: ARG002
        """One: a file has one beginning."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._blocks, metadata)]

    def _blocks(self) -> Iterator[pyarrow.Table]:
        block: list[Row] = []
        for row in left(self._source, self._done):
            block.append(row)
            if len(block) == _ROWS_A_BLOCK:
                yield _table(block)
                block = []
        if block:
            yield _table(block)


def _table(rows: list[Row]) -> pyarrow.Table:
    return pyarrow.table({name: [getattr(row, name) for row in rows] for name in _FIELDS})


class _Answers:
    """An engine on some node."""

    def __init__(self, config: EngineConfig, settings: ServerSettings) -> None:
        self._engine = AsyncEngine.from_config(settled(config))
        self._settings = settings
        self._serving: Serving | None = None

    async def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> AsyncIterator[dict[str, Any]]:
        """The lines of some rows."""
        if self._serving is None:  # on the loop that all calls have
            engine = self._engine
            self._serving = Serving(
                engine=engine,
                settings=self._settings,
                fetcher=MediaFetcher(self._settings.fetch, run_blocking=engine.in_pool),
                metrics=Metrics(self._settings.names_of(engine.info.config)[0]),
            )
        for values in zip(*(batch[name] for name in _FIELDS), strict=True):
            custom_id, route, body, error = values
            row = Row(custom_id=str(custom_id), route=str(route), body=bytes(body), error=str(error))
            line = await answer(self._serving, row)
            yield {"line": np.array([line.text], dtype=object), "failed": np.array([line.failed])}


def run_on_ray(
    config: EngineConfig,
    settings: ServerSettings,
    source: Source,
    out: Path,
    *,
    replicas: int,
    cpus: float | None = None,
) -> Done:
    """Answer all rows that are not in the output yet, on a cluster; files must be where all nodes see them.

    Raises:
        ConfigError: the output cannot be used.
        ray.exceptions.RayError: engines cannot be placed, or do not start.
    """
    with Output(out) as output:
        if next(left(source, output.done), None) is None:
            return Done(num_written=0, num_failed=output.num_failed, num_before=output.num_done)
        options = actor_options(config, cpus)
        lines = ray.data.read_datasource(_Rows(source, output)).map_batches(
            _Answers,
            fn_constructor_args=(config, settings),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(
                size=replicas, max_tasks_in_flight_per_actor=2 * config.max_num_seqs
            ),
            max_concurrency=2 * config.max_num_seqs,
            num_cpus=options["num_cpus"],
            resources=options.get("resources"),
        )
        with tqdm(total=source.count(), initial=output.num_done, unit="row", smoothing=0.05) as bar:
            for row in lines.iter_rows():
                output.write(row["line"], failed=bool(row["failed"]))
                bar.update()
        return Done(num_written=output.num_written, num_failed=output.num_failed, num_before=output.num_done)

"""A whole job in this process: loads the model, runs what is left of the rows, tells how far it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from opsin.async_engine import AsyncEngine
from opsin.config import EngineConfig
from opsin.fetch.fetcher import MediaFetcher
from opsin.server.batch.output import Output
from opsin.server.batch.rows import Row, Source, key_of
from opsin.server.batch.runner import lines
from opsin.server.metrics import Metrics
from opsin.server.serving import Serving
from opsin.server.settings import ServerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a job has come to.

    Attributes:
        num_written: rows of this run.
        num_failed: rows of the output that were refused or failed, those of earlier runs included.
        num_before: rows that were done before.
    """

    num_written: int
    num_failed: int
    num_before: int


def run_job(
    config: EngineConfig, settings: ServerSettings, source: Source, out: Path, *, keep_order: bool
) -> Done:
    """Answer all rows that are not in the output yet.

    Raises:
        ConfigError: the output cannot be used.
        OpsinError: the model cannot be loaded, or the engine has stopped.
        KeyboardInterrupt: Ctrl-C; what was answered is in the output.
    """
    with Output(out) as output:
        if output.num_done:
            logger.warning("%s has %d rows already; going on with the others", out, output.num_done)
        if next(left(source, output.done), None) is None:  # loading a model for nothing takes its time
            return Done(num_written=0, num_failed=output.num_failed, num_before=output.num_done)
        total = source.count()
        engine = AsyncEngine.from_config(config)
        try:
            with tqdm(total=total, initial=min(output.num_done, total), unit="row", smoothing=0.05) as bar:
                asyncio.run(_run(engine, settings, source, output, bar, keep_order))
        finally:
            engine.close()
        return Done(num_written=output.num_written, num_failed=output.num_failed, num_before=output.num_done)


async def _run(
    engine: AsyncEngine,
    settings: ServerSettings,
    source: Source,
    output: Output,
    bar: tqdm[None],
    keep_order: bool,
) -> None:
    config = engine.info.config
    fetcher = MediaFetcher(settings.fetch, run_blocking=engine.in_pool)
    serving = Serving(
        engine=engine, settings=settings, fetcher=fetcher, metrics=Metrics(settings.names_of(config)[0])
    )
    # Twice as many as are computed at once: while those are, the next ones are prepared.
    made = lines(serving, left(source, output.done), at_once=2 * config.max_num_seqs, keep_order=keep_order)
    try:
        async with aclosing(made) as all_lines:
            async for line in all_lines:
                output.write(line.text, failed=line.failed)
                bar.update()
                if line.failed:
                    bar.set_postfix(failed=output.num_failed, refresh=False)
    finally:
        await fetcher.aclose()


def left(source: Source, done: Collection[int]) -> Iterator[Row]:
    """The rows of a source whose keys (`key_of`) are not done."""
    return (row for row in source if key_of(row.custom_id) not in done)

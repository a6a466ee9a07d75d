"""A chart of a benchmark's times; needs matplotlib (``opsin[plot]``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from opsin.bench.summary import PERCENTILES, TITLES, Results
from opsin.errors import ConfigError


def draw(results: Results, path: Path) -> None:
    """One panel for each kind of time: how many requests were as quick as that, or quicker.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    series = results.series
    figure = Figure(figsize=(4 * len(series), 3.4), layout="constrained")
    figure.suptitle(f"{results.model}: {len(results.timings)} requests in {results.duration:.1f} s")
    for axes, (name, values) in zip(np.atleast_1d(figure.subplots(1, len(series))), series.items()):
        ordered = np.sort(np.asarray(values)) * 1e3
        axes.step([0, *ordered], np.linspace(0, 100, len(ordered) + 1), where="post")
        for percent in PERCENTILES:
            axes.axvline(np.percentile(ordered, percent), linewidth=0.8, linestyle="--", color="grey")
        axes.set(title=TITLES.get(name, name), xlabel="ms", ylabel="% of them", ylim=(0, 101), xlim=(0, None))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None

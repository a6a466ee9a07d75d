"""The metrics of several replicas as one: sums under the names of one server, and each replica's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from opsin.server.metrics import PREFIX

OWN_PREFIX = "opsin_replica:"
_COUNTED = ("counter", "histogram")
_COUNTED_AT_THE_DOOR = f"{PREFIX}http_requests"


class Totals(Collector):
    """What replicas have told last, and what those had counted that have ended since."""

    def __init__(self) -> None:
        self._latest: dict[int, list[Metric]] = {}
        self._ended: dict[int, list[Metric]] = {}

    def take(self, replica: int, text: str) -> None:
        """A replica's metrics, in Prometheus' text format."""
        self._latest[replica] = [
            family
            for family in text_string_to_metric_families(text)
            if family.name.startswith(PREFIX) and family.name != _COUNTED_AT_THE_DOOR
        ]

    def ended(self, replica: int) -> None:
        """A replica has ended; the one that takes its place counts from 0."""
        counted = [family for family in self._latest.pop(replica, ()) if family.type in _COUNTED]
        self._ended[replica] = list(_summed([self._ended.get(replica, []), counted]))

    def collect(self) -> Iterator[Metric]:
        """All metrics: sums, then each replica's."""
        by_replica = {
            replica: list(_summed([self._ended.get(replica, []), self._latest.get(replica, [])]))
            for replica in sorted({*self._latest, *self._ended})
        }
        for metric in _summed(by_replica.values()):
            if metric.name.endswith("_perc"):  # a share of what each has
                metric.samples = [s._replace(value=s.value / len(self._latest)) for s in metric.samples]
            yield metric
        yield from _apart(by_replica)


def _summed(groups: Iterable[Sequence[Metric]]) -> Iterator[Metric]:
    metrics: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in (family for group in groups for family in group):
        metrics.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        sums = values.setdefault(family.name, {})
        for sample in family.samples:
            key = sample.name, tuple(sample.labels.items())
            sums[key] = sums.get(key, 0.0) + sample.value
    for name, metric in metrics.items():
        metric.samples = [
            Sample(sample, dict(labels), value) for (sample, labels), value in values[name].items()
        ]
        yield metric


def _apart(by_replica: Mapping[int, Sequence[Metric]]) -> Iterator[Metric]:
    metrics: dict[str, Metric] = {}
    for replica, families in by_replica.items():
        for family in families:
            name = OWN_PREFIX + family.name.removeprefix(PREFIX)
            metric = metrics.setdefault(name, Metric(name, family.documentation, family.type))
            metric.samples += [
                Sample(
                    OWN_PREFIX + sample.name.removeprefix(PREFIX),
                    {**sample.labels, "replica": str(replica)},
                    sample.value,
                )
                for sample in family.samples
            ]
    yield from metrics.values()

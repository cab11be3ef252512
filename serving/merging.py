"""One scrape for several processes: a service whose engines live elsewhere tells their metrics as its own.

Behind the ingress of a cluster nobody scrapes the engines themselves. So each of them hands over its metrics
as OpenMetrics text, and whoever is scraped tells all of them, each series with the label ``replica``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

OPEN_METRICS = "application/openmetrics-text"
"""The format that engines hand over, as one asks for it: it keeps exemplars."""

Texts = Callable[[], Mapping[str, str]]
"""Gives OpenMetrics texts by the name of the replica that they come from."""


class Merged(CollectorRegistry):
    """The metrics of a process and those of its replicas.

    Args:
        own: the process's.
        name: of the process, as a replica.
        texts: of the others; what cannot be read is left out, for a scrape must not fail with one replica.
    """

    def __init__(self, own: CollectorRegistry, name: str, texts: Texts) -> None:
        super().__init__()
        self._own = own
        self._name = name
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        """Yield each family once, with the samples of all."""
        merged: dict[str, Metric] = {}
        for replica, families in self._sources():
            for family in families:
                kept = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                kept.samples += [
                    sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
                ]
        yield from merged.values()

    def _sources(self) -> Iterator[tuple[str, Iterable[Metric]]]:
        yield self._name, self._own.collect()
        for replica, text in self._texts().items():
            try:
                yield replica, list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
            except ValueError:
                continue

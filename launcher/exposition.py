"""Values of declared metrics as Prometheus reads them. The only place that knows its client."""

from collections.abc import Iterator, Mapping

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry

from trainer.metrics import Metric

Labels = tuple[str, ...]
Values = Mapping[Metric, Mapping[Labels, float]]
"""Of each metric: values of its labels, in their order -> value."""


def expose(values: Values, accept: str = "") -> tuple[bytes, str]:
    """The page of an endpoint, and its type: as the `Accept` header of who asks wishes."""
    encoder, content_type = choose_encoder(accept)
    registry = CollectorRegistry()
    registry.register(_Collected(values))
    return encoder(registry), content_type


class _Collected(Collector):
    def __init__(self, values: Values) -> None:
        self._values = values

    def collect(self) -> Iterator[Family]:
        return map(_family, self._values, self._values.values())


def _family(metric: Metric, values: Mapping[Labels, float]) -> Family:
    if metric.kind == "info":
        info = InfoMetricFamily(metric.name, metric.help)
        for labels in values:
            info.add_metric([], dict(zip(metric.labels, labels, strict=True)))
        return info
    made = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = made(metric.name, metric.help, labels=metric.labels, unit=metric.unit)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family

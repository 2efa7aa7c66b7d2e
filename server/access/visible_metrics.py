"""VisibleMetrics: the metrics of a server without what a key does not see."""

from collections.abc import Callable, Iterable

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

NAMES = frozenset({"adapter", "alias"})
"""Labels whose value is the name of an adapter or alias; ``version`` is the alias' one, where there is an alias."""
LISTS = frozenset({"running_lora_adapters", "waiting_lora_adapters"})
"""Labels whose value is a list of names, divided by commas."""
UNNAMED = frozenset({"", "other"})
"""Values of such labels that name no adapter."""


class VisibleMetrics(Collector):
    """Collects what ``source`` does, but no sample that names an adapter or alias for which ``sees`` returns False."""

    def __init__(self, source: Collector, sees: Callable[[str], bool]) -> None:
        self._source = source
        self._sees = sees

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics."""
        for metric in self._source.collect():
            seen = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            seen.samples = [self._without_lists(sample) for sample in metric.samples if self._is_visible(sample)]
            yield seen

    def _is_visible(self, sample: Sample) -> bool:
        names = {*NAMES, "version"} if "alias" in sample.labels else NAMES
        values = (value for label, value in sample.labels.items() if label in names)
        return all(value in UNNAMED or self._may_name(value) for value in values)

    def _without_lists(self, sample: Sample) -> Sample:
        shown = {label: self._seen_of(value) for label, value in sample.labels.items() if label in LISTS}
        return sample._replace(labels={**sample.labels, **shown}) if shown else sample

    def _seen_of(self, names: str) -> str:
        return ",".join(name for name in names.split(",") if self._may_name(name))

    def _may_name(self, reference: str) -> bool:
        return self._sees(reference.partition("@")[0])

"""Metrics of connections."""

from collections.abc import Iterator

from prometheus_client.core import Metric

from server.connections import Connections
from server.metrics.families import Scraped, counter, gauge


class ConnectionCollector(Scraped):
    """The connections of one server."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        yield gauge("manylora_connections_open", "Open connections", len(self._connections))
        yield counter(
            "manylora_connections_refused",
            "Connections refused, because there were too many",
            self._connections.refused,
        )

"""A server that is observed in all ways: one slot for two adapters, spans kept in memory, prompts in the log."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.api.telemetry.tracing import Tracing
from tests.api.live import Live, running, tiny_service
from tests.tiny import save_adapter, tiny_model


@dataclass(frozen=True)
class Observed:
    """The server, its spans, and the records of its log."""

    live: Live
    spans: InMemorySpanExporter
    records: list[logging.LogRecord]


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """The server, for all tests of this folder."""
    root, model = tmp_path_factory.mktemp("observed"), tiny_model()
    adapters: dict[str, Path] = {
        name: save_adapter(model, root / name, seed, r=4, target_modules=["q_proj"])
        for seed, name in enumerate(("left", "right"))
    }
    service = tiny_service(
        root, adapter=adapters, max_device_adapters=1, max_rank=8, log_prompts=True, store_quota_gib=1
    )
    exporter, provider, kept = InMemorySpanExporter(), TracerProvider(), _Kept()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    logger = logging.getLogger("server")
    logger.addHandler(kept)
    with running(replace(service, tracing=Tracing(provider))) as live:
        yield Observed(live, exporter, kept.records)
    logger.removeHandler(kept)


@pytest.fixture
def observed(everything: Observed, caplog: pytest.LogCaptureFixture) -> Iterator[Observed]:
    """The same, with no spans and no records yet."""
    everything.spans.clear()
    everything.records.clear()
    with caplog.at_level(logging.INFO, "server"):
        yield everything

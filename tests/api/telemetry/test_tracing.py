"""Traces: spans of a request, the parent that a client names, what is exported, and how it is asked for."""

import importlib
import itertools
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.semconv import attributes as stable
from opentelemetry.semconv._incubating import attributes as incubating
from opentelemetry.trace import SpanKind, StatusCode

from bases.errors import ConfigError
from server.api.telemetry.tracing import open_tracing
from tests.api.live import request, wait_for
from tests.api.telemetry.conftest import Observed

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)


def spans(observed: Observed, count: int) -> dict[str, ReadableSpan]:
    """Return the spans by name, once there are ``count``."""
    wait_for(lambda: len(observed.spans.get_finished_spans()) >= count)
    found = {span.name: span for span in observed.spans.get_finished_spans()}
    assert len(found) == count
    return found


def _is_traced(observed: Observed, name: str) -> bool:
    """Whether the span of a request has ended. It ends after the client has the answer, and after its phases' spans."""
    return any(span.name == name for span in observed.spans.get_finished_spans())


def test_a_request_has_spans_of_its_phases(observed: Observed) -> None:
    live = observed.live
    live.complete(adapter="left")
    wait_for(lambda: _is_traced(observed, "POST /v1/completions"))
    observed.spans.clear()
    answer = live.complete(adapter="right", seed=7)  # not on the device
    found = spans(observed, 5)
    root = found.pop("POST /v1/completions")
    assert root.kind is SpanKind.SERVER
    assert root.parent is None
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "right@1",
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.request.max_tokens": 12,
        "gen_ai.request.temperature": 0,
        "gen_ai.request.seed": 7,
        "client.address": "127.0.0.1",
    }
    attributes = dict(root.attributes or {})
    assert {name: attributes.get(name) for name in expected} == expected
    assert not any("Once upon a time" in str(each) for each in attributes.values())
    assert sorted(found, key=lambda name: found[name].start_time or 0) == [
        "adapter load",
        "queue",
        "prefill",
        "decode",
    ]
    assert {span.parent and span.parent.span_id for span in found.values()} == {root.context.span_id}
    ordered = sorted(found.values(), key=lambda span: span.start_time or 0)
    assert root.start_time is not None
    assert root.end_time is not None
    assert root.start_time <= (ordered[0].start_time or 0)
    assert (ordered[-1].end_time or 0) <= root.end_time
    for before, after in itertools.pairwise(ordered):
        assert abs((before.end_time or 0) - (after.start_time or 0)) < 1000, "ns"


def test_the_parent_of_the_client_is_kept(observed: Observed) -> None:
    traceparent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    observed.live.http.post("/v1/completions", json=request(), headers=traceparent)
    root = spans(observed, 4)["POST /v1/completions"]
    assert f"{root.context.trace_id:032x}" == TRACE
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT
    wait_for(lambda: any(getattr(each, "trace_id", None) == TRACE for each in observed.records))


def test_a_parent_that_is_not_sampled_samples_nothing(observed: Observed) -> None:
    observed.live.http.post("/v1/completions", json=request(), headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    observed.live.http.get("/v1/models", headers={"traceparent": "nonsense"})
    assert list(spans(observed, 1)) == ["GET /v1/models"]


def test_refusals_are_spans_and_probes_are_none(observed: Observed) -> None:
    observed.live.http.get("/livez")
    observed.live.http.get("/metrics")
    observed.live.http.get("/v1/adapters/nobody")
    root = spans(observed, 1)["GET /v1/adapters/{reference}"]
    assert dict(root.attributes or {})["http.response.status_code"] == 404
    assert root.status.status_code is StatusCode.UNSET, "a client's mistake"


def test_attributes_are_those_of_the_conventions(observed: Observed) -> None:
    observed.live.http.post("/v1/embeddings", json={"input": "Once"}).raise_for_status()
    observed.live.complete(top_k=3)
    wait_for(lambda: len(observed.spans.get_finished_spans()) >= 8)
    names = {name for span in observed.spans.get_finished_spans() for name in span.attributes or ()}
    known = set(_conventions())
    assert {name for name in names if not name.startswith("manylora.")} <= known
    operations = {(span.attributes or {}).get("gen_ai.operation.name") for span in observed.spans.get_finished_spans()}
    assert operations == {"embeddings", "text_completion", None}


def _conventions() -> Iterator[str]:
    """Names of attributes in the package of OpenTelemetry's conventions."""
    for package in (stable, incubating):
        for module in pkgutil.iter_modules(package.__path__):
            constants = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
            yield from (value for value in constants.values() if isinstance(value, str))


def test_traces_are_sent_to_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["x-team"] == "legal"
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server, ThreadPoolExecutor() as threads:
        threads.submit(server.serve_forever)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=legal")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        tracing = open_tracing()
        assert tracing is not None
        scope: dict[str, Any] = {"path": "/v1/models", "raw_path": b"/v1/models", "headers": [], "method": "GET"}
        scope |= {"scheme": "http", "http_version": "1.1", "state": {"request_id": "mine", "route": "/v1/models"}}
        tracing.record(scope, 200, 0.25)
        tracing.close()
        server.shutdown()
    sent = ExportTraceServiceRequest.FromString(bodies[0]).resource_spans[0]
    resource = {each.key: each.value.string_value for each in sent.resource.attributes}
    assert resource["service.name"] == "manylora"
    assert resource["deployment.environment.name"] == "test"
    (span,) = sent.scope_spans[0].spans
    assert span.name == "GET /v1/models"
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(0.25e9, abs=1000)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, r"^OTEL_TRACES_EXPORTER: must be otlp or none \(got 'zipkin'\)$"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            r"^OTEL_EXPORTER_OTLP_PROTOCOL: must be http/protobuf \(got 'grpc'\)$",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        open_tracing()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_traces_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert open_tracing() is None


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://x")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r'opentelemetry\.sdk\.trace is not installed.*"manylora\[otel\]"'):
        open_tracing()


def test_the_sdk_is_imported_only_if_asked_for() -> None:
    """FastAPI imports the API of OpenTelemetry in any case."""
    heavy = "('opentelemetry.sdk', 'opentelemetry.exporter', 'opentelemetry.proto')"
    script = f"import sys, server.api.serve; print([n for n in sys.modules if n.startswith({heavy})])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

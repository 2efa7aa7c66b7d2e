"""Tracing: an OpenTelemetry span for each request, with the phases of its answer.

Spans are made when a request has ended, from times that were taken anyway. OpenTelemetry's SDK is imported only if the
environment asks for traces. The names of attributes are those of its semantic conventions.
"""

import os
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from bases.errors import ConfigError
from server.api.telemetry.request_log import PROBES
from server.api.telemetry.work import Work, phases

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP = "http/protobuf"
_OPERATIONS = {"cmpl": "text_completion", "embd": "embeddings", "score": "score"}
"""Prefix of an answer's id -> ``gen_ai.operation.name``; all others are chats."""
_SPANS = {"load": "adapter load"}
"""Phase -> name of its span, where it is not the phase's own."""


def open_tracing() -> "Tracing | None":
    """Return what sends traces to where OpenTelemetry's variables say, or None if they ask for none.

    Raises ConfigError if they ask for what cannot be done.
    """
    environment = os.environ
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    asked = exporter == "otlp" or any(environment.get(name) for name in _ENDPOINTS)
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return None
    if exporter not in ("", "otlp"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER: must be otlp or none (got {exporter!r})")
    if not asked:
        return None
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), _HTTP)
    if protocol != _HTTP:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL: must be {_HTTP} (got {protocol!r})")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, and {error.name} is not installed: install it with "
            'pip install "manylora[otel]", or set OTEL_SDK_DISABLED=true'
        ) from error
    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    own = {} if named else {"service.name": "manylora"}
    provider = TracerProvider(resource=Resource.create({**own, "service.version": version("manylora")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """Makes the spans of requests. For the event loop only."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import propagate, trace

        self._provider = provider
        self._tracer = provider.get_tracer("manylora", version("manylora"))
        self._extract = propagate.extract
        self._inside = trace.set_span_in_context
        self._server = trace.SpanKind.SERVER
        self._failed = trace.StatusCode.ERROR

    def record(self, scope: Scope, status: int, seconds: float) -> str | None:
        """Make the spans of a request that took ``seconds`` and has just ended. Returns the trace's id, in hex.

        None for requests of probes, which are not traced.
        """
        if scope["path"].rstrip("/") in PROBES:
            return None
        now, offset = time.monotonic(), time.time_ns() - time.monotonic_ns()
        parent = self._extract({name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]})
        method, route = scope["method"], scope["state"].get("route")
        work: Work | None = scope["state"].get("generation")
        span = self._tracer.start_span(
            f"{method} {route}" if route else method,
            parent,
            self._server,
            {**_of_request(scope, status), **({} if work is None else _of_work(work))},
            start_time=_nanoseconds(now - seconds, offset),
        )
        if span.is_recording() and work is not None and work.spent is not None:
            inside = self._inside(span)
            begin, timing = work.spent
            for phase, length in phases(timing).items():
                if length or phase != "load":
                    child = self._tracer.start_span(
                        _SPANS.get(phase, phase), inside, start_time=_nanoseconds(begin, offset)
                    )
                    child.end(_nanoseconds(begin + length, offset))
                begin += length
        if status >= 500 or (work is not None and work.outcome == "error"):
            span.set_status(self._failed)
        span.end(_nanoseconds(now, offset))
        return f"{span.get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def _nanoseconds(monotonic: float, offset: int) -> int:
    """Return the Unix time of a time by ``time.monotonic()``; ``offset`` is the one less the other."""
    return round(monotonic * 1e9) + offset


def _of_request(scope: Scope, status: int) -> dict[str, Any]:
    client = scope.get("client")
    attributes = {
        "http.request.method": scope["method"],
        "http.route": scope["state"].get("route"),
        "http.response.status_code": status,
        "url.scheme": scope["scheme"],
        "url.path": scope["raw_path"].decode("latin-1"),
        "network.protocol.version": scope["http_version"],
        "client.address": client and client[0],
        "error.type": str(status) if status >= 500 else None,
        "manylora.request.id": scope["state"]["request_id"],
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _of_work(work: Work) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": _OPERATIONS.get(work.id.partition("-")[0], "chat"),
        "gen_ai.provider.name": "manylora",
        "gen_ai.request.model": work.adapters.model,
        "gen_ai.response.model": " + ".join(applied.name for applied in work.adapters.applied) or work.adapters.model,
        "gen_ai.response.id": work.id,
        "gen_ai.response.finish_reasons": tuple(work.finishes) or None,
        "gen_ai.usage.input_tokens": work.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": work.cached_tokens,
        "gen_ai.usage.output_tokens": work.output_tokens,
        "error.type": work.outcome if work.outcome != "ok" else None,
    }
    if (sampling := work.sampling) is not None:
        attributes |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.request.seed": sampling.seed,
        }
    return {name: value for name, value in attributes.items() if value is not None}

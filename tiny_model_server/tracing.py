"""OpenTelemetry traces of client, queue and worker, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector."""

import logging
import os
import time
from collections.abc import Iterable
from functools import cache
from typing import Any

log = logging.getLogger("tiny_model_server.tracing")

REQUEST_ID = "tms.request_id"
"""A span's attribute with the id of its call."""


@cache
def provider() -> Any | None:
    """The application's tracer provider, or one that sends to the collector; None without a collector."""
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return None
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation import grpc as _  # noqa: F401
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        log.warning("no traces: %s; they need pip install 'tiny-model-server[traces]'", error)
        return None
    current = trace.get_tracer_provider()
    if isinstance(current, TracerProvider):
        return current
    made = TracerProvider()
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


def interceptors(kind: str) -> list[Any]:
    """OpenTelemetry's interceptors of this kind, which give every call but health a span."""
    if not provider():
        return []
    from opentelemetry.instrumentation import grpc
    from opentelemetry.instrumentation.grpc import filters

    made = getattr(grpc, kind)(provider(), filters.negate(filters.health_check()))
    return made if isinstance(made, list) else [made]


def client_span(path: str, request_id: str) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """Begins a call's span. Returns it and the metadata that names it to the server; (None, ()) without a collector."""
    if not (found := provider()):
        return None, ()
    from opentelemetry import propagate, trace

    span = found.get_tracer("tiny_model_server").start_span(path, kind=trace.SpanKind.CLIENT)
    span.set_attribute(REQUEST_ID, request_id)
    headers: dict[str, str] = {}
    propagate.inject(headers, trace.set_span_in_context(span))
    return span, tuple(headers.items())


def name_span(request_id: str) -> None:
    """Gives the span of this thread's call its id."""
    if provider():
        from opentelemetry import trace

        trace.get_current_span().set_attribute(REQUEST_ID, request_id)


def spans(attributes: dict[str, str], steps: Iterable[tuple[str, float, float]]) -> None:
    """Adds (name, begin, end) on the monotonic clock to the call of this thread, with these attributes."""
    found = provider()
    if not found:
        return
    tracer, epoch = found.get_tracer("tiny_model_server"), time.time() - time.monotonic()
    for name, begin, end in steps:
        span = tracer.start_span(name, start_time=int((epoch + begin) * 1e9), attributes=attributes)
        span.end(int((epoch + end) * 1e9))

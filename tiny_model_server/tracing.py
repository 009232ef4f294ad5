"""OpenTelemetry traces of client, queue and worker, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector."""

import logging
import os
import time
from collections.abc import Iterable
from functools import cache
from types import SimpleNamespace
from typing import Any

log = logging.getLogger("tiny_model_server.tracing")


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


def traced(opened: Any) -> Any:
    """The client's channel, with a span for every call but health."""
    made = interceptors("client_interceptor")
    return _Traced(opened, made[0]) if made else opened


class _Traced:
    """A channel with OpenTelemetry's interceptor, of whose streams of answers it would leave a mere generator."""

    def __init__(self, opened: Any, interceptor: Any) -> None:
        from opentelemetry.instrumentation.grpc import grpcext

        self._opened, self._interceptor = opened, interceptor
        self._intercepted = grpcext.intercept_channel(opened, interceptor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._intercepted, name)

    def unary_stream(self, path: str, **codecs: Any) -> Any:
        """The callable of such a method, which returns gRPC's call."""
        ask = self._opened.unary_stream(path, **codecs)

        def traced(request: Any, timeout: float | None = None, metadata: Any = None) -> Any:
            # With both sides said to stream, the span ends with the call.
            info = SimpleNamespace(full_method=path, is_client_stream=True, is_server_stream=True, timeout=timeout)
            return self._interceptor.intercept_stream(
                request, metadata, info, lambda one, sent: ask(one, timeout=timeout, metadata=sent)
            )

        return traced


def spans(model: str, steps: Iterable[tuple[str, float, float]]) -> None:
    """Adds (name, begin, end) on the monotonic clock to the call of this thread."""
    found = provider()
    if not found:
        return
    tracer, epoch = found.get_tracer("tiny_model_server"), time.time() - time.monotonic()
    for name, begin, end in steps:
        span = tracer.start_span(name, start_time=int((epoch + begin) * 1e9), attributes={"tms.model": model})
        span.end(int((epoch + end) * 1e9))

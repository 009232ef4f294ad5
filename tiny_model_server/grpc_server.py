"""Binds the protocols' handlers, health and reflection to grpcio's server; the only file that knows that server."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection

from tiny_model_server import health, wire
from tiny_model_server.engine import Call, Engine
from tiny_model_server.errors import InvalidInput, Overloaded, ServerError
from tiny_model_server.protocols import native
from tiny_model_server.settings import Settings, SettingsError

log = logging.getLogger("tiny_model_server.grpc")

PROTOCOLS = [native]
"""Each has SCHEMA, SERVICE and handlers(engine)."""

LIVE_SERVICE = "TinyModelServer"
"""The health name under which the replica serves once every model was loaded or has failed, until it stops."""

_SPARE_THREADS = 8  # more than the engine admits, so that some are always left for refusals and admin calls
_LONGEST_MESSAGE = 1000  # characters of an error; a status travels in HTTP/2 headers, which are bounded
_NO_DEADLINE_S = 1e9


class GrpcServer:
    """The gRPC face of an engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Binds the port; SettingsError if it cannot be had."""
        self._engine = engine
        self._health = health.Health()
        self._server = grpc.server(
            ThreadPoolExecutor(settings.threads + _SPARE_THREADS, thread_name_prefix="grpc"),
            options=[
                ("grpc.max_receive_message_length", settings.max_message_mb << 20),
                ("grpc.max_send_message_length", settings.max_message_mb << 20),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ],
        )
        for protocol in PROTOCOLS:
            self._bind(protocol.SCHEMA, protocol.SERVICE, protocol.handlers(engine))
        self._server.add_generic_rpc_handlers([self._health.generic_handler()])
        names = [protocol.SERVICE for protocol in PROTOCOLS]
        reflection.enable_server_reflection(
            [*names, health.SERVICE, reflection.SERVICE_NAME], self._server, pool=wire.pool
        )
        host = settings.host.strip("[]")
        try:
            self.port: int = self._server.add_insecure_port(f"{f'[{host}]' if ':' in host else host}:{settings.port}")
        except RuntimeError:
            raise SettingsError(
                f"TMS_HOST={settings.host!r} TMS_PORT={settings.port} cannot be listened on: "
                "is another server there? Choose another port"
            ) from None
        engine.on_change(self._update_health)
        self._update_health()

    def start(self) -> None:
        """Accepts calls."""
        self._server.start()

    def refuse_health(self) -> None:
        """Says NOT_SERVING under every name, for good, so that clients go elsewhere."""
        self._health.shut_down()

    def stop(self, grace_s: float) -> threading.Event:
        """Accepts no more calls, cancels those that take longer than ``grace_s``; the event is set when none is left.

        Called again, it hurries.
        """
        event: threading.Event = self._server.stop(grace_s)
        self._health.end_watches()
        return event

    def _bind(self, schema: str, service: str, handlers: dict[str, Callable[[Any, Call], Any]]) -> None:
        table: dict[str, Any] = {
            name: grpc.unary_stream_rpc_method_handler(_streaming(method, handlers[name]))
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler(_unary(method, handlers[name]))
            for name, method in wire.methods(schema, service).items()
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, table)])

    def _update_health(self) -> None:
        engine = self._engine
        serving = {model.name: engine.serving(model) for model in engine.models()}
        self._health.set(serving | {"": engine.ready, LIVE_SERVICE: engine.started})


def _unary(method: wire.Method, handler: Callable[[Any, Call], Any]) -> Callable[[bytes, Any], bytes]:
    def answer(data: bytes, context: Any) -> bytes:
        with _statuses(method, context):
            response: bytes = handler(_parse(method, data), _call(context)).SerializeToString()
        return response

    return answer


def _streaming(method: wire.Method, handler: Callable[[Any, Call], Any]) -> Callable[[bytes, Any], Iterator[bytes]]:
    def answer(data: bytes, context: Any) -> Iterator[bytes]:
        with _statuses(method, context):
            for response in handler(_parse(method, data), _call(context)):
                yield response.SerializeToString()

    return answer


def _parse(method: wire.Method, data: bytes) -> Any:
    # Requests arrive here as bytes, because a message that grpcio cannot parse would be answered as INTERNAL.
    try:
        return method.request.FromString(data)
    except DecodeError:
        raise InvalidInput(f"the request is no {method.request.DESCRIPTOR.full_name}") from None


@contextmanager
def _statuses(method: wire.Method, context: Any) -> Iterator[None]:
    """Answers an error raised inside with its gRPC status."""
    try:
        yield
    except ServerError as error:
        if isinstance(error, Overloaded) and error.retry_after_ms is not None:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", str(error.retry_after_ms)),))
        _abort(context, error.status, str(error))
    except Exception as error:
        log.exception("%s failed", method.path)
        _abort(context, "INTERNAL", f"a fault in the server: {type(error).__name__}: {error}")


def _abort(context: Any, status: str, message: str) -> None:
    if len(message) > _LONGEST_MESSAGE:
        message = message[:_LONGEST_MESSAGE] + "..."
    context.abort(grpc.StatusCode[status], message)


def _call(context: Any) -> Call:
    remaining = context.time_remaining()
    return Call(
        deadline=None if remaining is None or remaining > _NO_DEADLINE_S else time.monotonic() + remaining,
        peer=context.peer(),
        metadata=dict(context.invocation_metadata()),
        on_end=context.add_callback,
    )

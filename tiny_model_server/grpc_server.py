"""Binds the protocols' handlers, health and reflection to grpcio's server; the only file that knows that server."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

from tiny_model_server import health, tls, tracing, wire
from tiny_model_server.engine import Call, Engine
from tiny_model_server.errors import Cancelled, Overloaded, ServerError
from tiny_model_server.protocols import model_mesh, modzy, native, nos, open_inference
from tiny_model_server.settings import Settings, SettingsError

log = logging.getLogger("tiny_model_server.grpc")

DOORS: dict[str, Any] = {
    "native": native,
    "open_inference": open_inference,
    "model_mesh": model_mesh,
    "modzy": modzy,
    "nos": nos,
}
"""The protocols by their names in TMS_DOORS; each has SCHEMA, SERVICE and handlers(engine)."""

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
        self._largest = settings.max_message_mb << 20
        self._server = grpc.server(
            ThreadPoolExecutor(settings.threads + _SPARE_THREADS, thread_name_prefix="grpc"),
            options=[
                ("grpc.max_receive_message_length", settings.max_message_mb << 20),
                ("grpc.max_send_message_length", -1),  # checked before it is sent, with an error that is not retried
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 500),  # clients ping to notice a frozen server
                ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)),
            ],
            interceptors=[
                *tracing.interceptors("server_interceptor"),
                *([_TokenCheck(engine)] if settings.token else []),
            ],
        )
        if unknown := set(settings.doors) - set(DOORS):
            raise SettingsError(f"TMS_DOORS names {', '.join(sorted(unknown))}; there are {', '.join(DOORS)}")
        protocols = [DOORS[name] for name in settings.doors]
        for protocol in protocols:
            self._bind(protocol.SCHEMA, protocol.SERVICE, protocol.handlers(engine))
        self._server.add_generic_rpc_handlers([self._health.generic_handler()])
        names = [protocol.SERVICE for protocol in protocols]
        reflection.enable_server_reflection(
            [*names, health.SERVICE, reflection.SERVICE_NAME], self._server, pool=wire.pool
        )
        tls_credentials = tls.credentials(settings)
        host = settings.host.strip("[]")
        address = f"{f'[{host}]' if ':' in host else host}:{settings.port}"
        self.port = self._listen(address, tls_credentials, f"TMS_HOST={settings.host!r} TMS_PORT={settings.port}")
        if settings.socket:
            _refuse_taken(settings.socket)
            with _new_files_mode(int(settings.socket_mode, 8)):
                self._listen(f"unix:{settings.socket}", tls_credentials, f"TMS_SOCKET={settings.socket!r}")
        name = socket.gethostname() if host in ("0.0.0.0", "::") else host  # in a container, the pod's name
        self.replica = f"{name}:{self.port}"
        """The name that answers carry."""
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

    def _listen(self, address: str, credentials: grpc.ServerCredentials | None, setting: str) -> int:
        add = self._server.add_insecure_port
        try:
            return self._server.add_secure_port(address, credentials) if credentials else add(address)
        except RuntimeError:
            raise SettingsError(f"{setting} cannot be listened on: is another server there? Choose another") from None

    def _bind(self, schema: str, service: str, handlers: dict[str, Callable[[Any, Call], Any]]) -> None:
        table: dict[str, Any] = {}
        for name, method in wire.methods(schema, service).items():
            answer = self._streaming if method.server_streaming else self._unary
            table[name] = getattr(grpc, f"{method.kind}_rpc_method_handler")(answer(method, handlers[name]))
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, table)])

    def _unary(self, method: wire.Method, handler: Callable[[Any, Call], Any]) -> Callable[[Any, Any], bytes]:
        def answer(data: Any, context: Any) -> bytes:
            with self._answering(method, context) as call:
                return wire.serialized(handler(_parsed(method, data, call), call), self._largest)
            raise AssertionError  # _answering lets no error pass

        return answer

    def _streaming(self, method: wire.Method, handler: Callable[[Any, Call], Any]) -> Callable[..., Iterator[bytes]]:
        def answer(data: Any, context: Any) -> Iterator[bytes]:
            with self._answering(method, context) as call:
                for response in handler(_parsed(method, data, call), call):
                    yield wire.serialized(response, self._largest)

        return answer

    @contextmanager
    def _answering(self, method: wire.Method, context: Any) -> Iterator[Call]:
        """Answers an error raised inside with its gRPC status, and tells which replica answered."""
        call = _call(context)
        call.trailing["tms-replica"] = self.replica
        if attempts := call.metadata.get("grpc-previous-rpc-attempts"):
            call.trailing["tms-retries"] = attempts
        try:
            yield call
        except ServerError as error:
            if isinstance(error, Overloaded) and error.retry_after_ms is not None:
                call.trailing["grpc-retry-pushback-ms"] = str(error.retry_after_ms)
            _abort(context, call, error.status, str(error))
        except Exception as error:
            log.exception("%s failed", method.path)
            _abort(context, call, "INTERNAL", f"a fault in the server: {type(error).__name__}: {error}")
        context.set_trailing_metadata(tuple(call.trailing.items()))

    def _update_health(self) -> None:
        engine = self._engine
        serving = {model.name: engine.serving(model) for model in engine.models()}
        self._health.set(serving | {"": engine.ready, LIVE_SERVICE: engine.started})


def _parsed(method: wire.Method, data: Any, call: Call) -> Any:
    """The request or, of a stream, the requests; parsed here, for what grpcio cannot parse it answers as INTERNAL."""
    return _requests(method, data, call) if method.client_streaming else wire.parse(method, data, call)


def _requests(method: wire.Method, data: Iterator[bytes], call: Call) -> Iterator[Any]:
    try:
        for one in data:
            yield wire.parse(method, one, call)
    except grpc.RpcError as error:
        error.__traceback__ = None  # for grpcio keeps the error, and it would keep the frames and the call's memory
        raise Cancelled("the caller went away") from None


def _abort(context: Any, call: Call, status: str, message: str) -> None:
    context.set_trailing_metadata(tuple(call.trailing.items()))
    if len(message) > _LONGEST_MESSAGE:
        message = message[:_LONGEST_MESSAGE] + "..."
    context.abort(grpc.StatusCode[status], message)


def _call(context: Any) -> Call:
    remaining = context.time_remaining()
    metadata = dict(context.invocation_metadata())
    return Call(
        deadline=None if remaining is None or remaining > _NO_DEADLINE_S else time.monotonic() + remaining,
        peer=context.peer(),
        metadata=metadata,
        on_end=context.add_callback,
        repeatable=metadata.get("tms-retry") != "no",
        model=_text(metadata.get("mm-model-id-bin") or metadata.get("mm-model-id", "")),
    )


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _refuse_taken(path: str) -> None:
    """SettingsError if a server listens on this unix socket; gRPC would take the file away from it."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise SettingsError(f"TMS_SOCKET={path!r}: another server listens there; choose another path")


@contextmanager
def _new_files_mode(mode: int) -> Iterator[None]:
    """Lets files be made with this mode at most, so that nobody can open one before its mode was changed."""
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)


class _TokenCheck(grpc.ServerInterceptor):
    """Answers calls without the server's token UNAUTHENTICATED; health needs none, for probes bring none."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        if not details.method.startswith(f"/{health.SERVICE}/"):
            try:
                self._engine.authenticate(dict(details.invocation_metadata))
            except ServerError as error:
                status, message = grpc.StatusCode[error.status], str(error)
                return grpc.unary_unary_rpc_method_handler(lambda request, context: context.abort(status, message))
        return continuation(details)

"""Binds the protocols' handlers, health and reflection to grpcio's server; the only file that knows that server."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
from grpc_reflection.v1alpha import reflection

from tiny_model_server import request_ids, schemas, tracing
from tiny_model_server.engine import placement
from tiny_model_server.engine.call import Call
from tiny_model_server.engine.engine import Engine
from tiny_model_server.errors import ServerError, message_of
from tiny_model_server.protocols import model_mesh, modzy, native, nos, open_inference
from tiny_model_server.server import health, tls
from tiny_model_server.server.admission import Admission
from tiny_model_server.server.grpc_call import abort
from tiny_model_server.server.siblings import authority
from tiny_model_server.settings import Settings, SettingsError

log = logging.getLogger("tiny_model_server.grpc")

PROTOCOLS: dict[str, Any] = {
    "native": native,
    "open_inference": open_inference,
    "model_mesh": model_mesh,
    "modzy": modzy,
    "nos": nos,
}
"""The protocols by their names in TMS_PROTOCOLS; each has SCHEMA, SERVICE and handlers(engine)."""
HTTP_PROTOCOLS = ("openai",)
"""Those that are spoken on the HTTP port only."""

LIVE_SERVICE = "TinyModelServer"
"""The health name under which the replica serves once every model was loaded or has failed, until it stops."""

_SPARE_THREADS = 8  # more than the engine admits, so that some are always left for refusals and admin calls
_MOST_STREAMS = 1024  # of a connection, at least; those that watch health are among them
_MOST_PENDING = 1 << 15
_HANDSHAKE_MS = 5000  # a connection that says nothing for so long is closed
_NO_DEADLINE_S = 1e9


class GrpcServer:
    """The gRPC face of an engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Binds the port; SettingsError if it cannot be had."""
        self._engine = engine
        self._health = health.Health()
        self._largest, self._most_items = settings.max_message_mb << 20, settings.max_items
        traced = tracing.interceptors("server_interceptor")
        admission = Admission(engine, health.SERVICE, settings.threads + _SPARE_THREADS)
        self._server = grpc.server(
            admission,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_mb << 20),
                ("grpc.max_send_message_length", -1),  # checked before it is sent, with an error that is not retried
                # A compressed message may become a thousand times as large before its bytes can be counted.
                ("grpc.compression_enabled_algorithms_bitset", 1),  # none
                # gRPC would cancel calls at random while more than 1,000 wait to be handed in.
                ("grpc.server.max_pending_requests", _MOST_PENDING),
                ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 500),  # clients ping to notice a frozen server
                ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)),
                ("grpc.max_concurrent_streams", max(_MOST_STREAMS, settings.threads)),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                ("grpc.max_allowed_incoming_connections", placement.descriptors() // 2),  # the rest is for workers
            ],
            interceptors=[admission, *traced],
        )
        known = [*PROTOCOLS, *HTTP_PROTOCOLS]
        if unknown := set(settings.protocols) - set(known):
            raise SettingsError(f"TMS_PROTOCOLS names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        protocols = [PROTOCOLS[name] for name in settings.protocols if name in PROTOCOLS]
        for protocol in protocols:
            self._bind(protocol.SCHEMA, protocol.SERVICE, protocol.handlers(engine))
        self._server.add_generic_rpc_handlers([self._health.generic_handler()])
        names = [protocol.SERVICE for protocol in protocols]
        reflection.enable_server_reflection(
            [*names, health.SERVICE, reflection.SERVICE_NAME], self._server, pool=schemas.pool
        )
        tls_credentials = tls.credentials(settings)
        host, address = settings.host, authority(settings.host, settings.port)
        self.port = self._listen(address, tls_credentials, f"TMS_HOST={settings.host!r} TMS_PORT={settings.port}")
        if settings.socket:
            _refuse_taken(settings.socket)
            with _new_files_mode(int(settings.socket_mode, 8)):
                self._listen(f"unix:{settings.socket}", tls_credentials, f"TMS_SOCKET={settings.socket!r}")
        name = socket.gethostname() if host in ("0.0.0.0", "::") else host  # in a container, the pod's name
        self.replica = ascii(f"{name}:{self.port}")[1:-1]  # metadata is ASCII
        """The name that answers carry."""
        if settings.replica:  # from a health check, clients learn the ports of all replicas
            first = self.port - settings.replica + 1
            ports = f"{first}-{first + settings.replicas - 1}"
            self._health.trailing = (("tms-replica", self.replica), ("tms-ports", ports))
        engine.on_change = self._update_health
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
        for name, method in schemas.methods(schema, service).items():
            answer = self._streaming if method.server_streaming else self._unary
            table[name] = getattr(grpc, f"{method.kind}_rpc_method_handler")(answer(method, handlers[name]))
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, table)])

    def _unary(self, method: schemas.Method, handler: Callable[[Any, Call], Any]) -> Callable[[Any, Any], bytes]:
        def answer(data: Any, context: Any) -> bytes:
            call = self._begin(context)
            try:
                response = handler(_parsed(method, data, call, self._most_items), call)
                answered = schemas.serialized(response, self._largest)
            except Exception as error:
                self._fail(method, call, context, error)
            call.bytes_out = len(answered)
            self._end(method, call, context)
            return answered

        return answer

    def _streaming(self, method: schemas.Method, handler: Callable[[Any, Call], Any]) -> Callable[..., Iterator[bytes]]:
        def answer(data: Any, context: Any) -> Iterator[bytes]:
            call = self._begin(context)
            try:
                for response in handler(_parsed(method, data, call, self._most_items), call):
                    answered = schemas.serialized(response, self._largest)
                    call.bytes_out += len(answered)
                    yield answered
            except GeneratorExit:
                call.log_access(method.path, "CANCELLED")  # by its caller
                raise
            except Exception as error:
                self._fail(method, call, context, error)
            self._end(method, call, context)

        return answer

    def _begin(self, context: Any) -> Call:
        """What a protocol needs to know of the call; its answer names it, and the replica that answers."""
        call = _call(context)
        call.trailing |= {"tms-replica": self.replica, request_ids.HEADER: call.id}
        tracing.name_span(call.id)
        attempts = call.metadata.get("grpc-previous-rpc-attempts", "")
        if isinstance(attempts, str) and attempts.isdecimal() and attempts.isascii():  # a caller may send anything
            call.trailing["tms-retries"] = attempts
        return call

    def _end(self, method: schemas.Method, call: Call, context: Any) -> None:
        context.set_trailing_metadata(tuple(call.trailing.items()))
        call.log_access(method.path, "OK")

    def _fail(self, method: schemas.Method, call: Call, context: Any, error: Exception) -> NoReturn:
        """Answers an error with its gRPC status."""
        if not isinstance(error, ServerError):
            log.error("%s failed", method.path, exc_info=error, extra={"fields": {"request_id": call.id}})
            error = ServerError(f"a fault in the server: {message_of(error, named=True)}")
        call.log_access(method.path, error.status)
        abort(context, error, call.trailing)

    def _update_health(self) -> None:
        engine = self._engine
        serving = {model.name: engine.serving(model) for model in engine.models()}
        self._health.set(serving | {"": engine.ready, LIVE_SERVICE: engine.started})


def _parsed(method: schemas.Method, data: Any, call: Call, most: int) -> Any:
    """The request or, of a stream, the requests; parsed here, for what grpcio cannot parse it answers as INTERNAL."""
    if method.client_streaming:
        return (schemas.parse(method, one, call, most) for one in data)
    return schemas.parse(method, data, call, most)


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

"""grpc.health.v1 without threads: every step is short and runs in grpcio's own, so no model and no caller delays it.

grpcio-health-checking is not used: its blocking form holds a server thread for each watching client, and its
non-blocking form was seen to deadlock when a client leaves while a status changes (it sends while holding its lock).
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tiny_model_server import schemas
from tiny_model_server.engine import placement
from tiny_model_server.errors import InvalidInput, ModelNotFound, Unimplemented
from tiny_model_server.server.admission import MAX_ARRIVING, NO_REQUEST, NOTHING_READ, Waits
from tiny_model_server.server.grpc_call import GrpcCall

SERVICE = "grpc.health.v1.Health"
_PATIENCE_S = 10.0
"""How long a caller of health may take to send its request, and to read an answer."""
_MAX_WATCHERS = 8192


class _Inline(ThreadPoolExecutor):
    """A method of health, as grpcio takes it: its own thread pool, which answers in grpcio's thread."""

    def __init__(self, waits: Waits, answer: Callable[[GrpcCall, bytes | None], None]) -> None:
        super().__init__(1)
        self.experimental_thread_pool = self
        self._waits, self._answer = waits, answer

    def submit(self, run: Any, respond: Any, event: Any, state: Any, *rest: Any) -> None:  # type: ignore[override]
        """Begins a call when its headers have arrived."""
        call = GrpcCall(event, state)
        self._waits.receive(call, "probes", _PATIENCE_S, partial(self._answer, call))


@dataclass(eq=False)
class _Watcher:
    service: str
    call: GrpcCall
    last: bytes = b""
    sending: bool = False


class Health:
    """Reports which services serve: once to a Check, at each change to a Watch."""

    def __init__(self) -> None:
        """Starts without any service."""
        response = schemas.message("health", f"{SERVICE.rpartition('.')[0]}.HealthCheckResponse")
        self._unknown, self._up, self._down = (
            response(status=status).SerializeToString() for status in ("SERVICE_UNKNOWN", "SERVING", "NOT_SERVING")
        )
        self._request = schemas.methods("health", SERVICE)["Check"].request
        self._waits = Waits(probes=MAX_ARRIVING)
        self._lock = threading.Lock()
        self._answers: dict[str, bytes] = {}  # by service
        self._watchers: dict[GrpcCall, _Watcher] = {}  # the oldest first
        # A watch keeps its connection open, and so a descriptor. Other connections need some too.
        self._max_watchers = min(_MAX_WATCHERS, placement.descriptors() // 4)
        self._shut = False
        self.trailing: tuple[tuple[str, str], ...] = ()
        """Metadata of each answer to a Check."""

    def set(self, serving: Mapping[str, bool]) -> None:
        """Sets for each service name whether it serves. After ``shut_down``, none does."""
        with self._lock:
            self._answers = {name: self._up if up and not self._shut else self._down for name, up in serving.items()}
            for watcher in list(self._watchers.values()):
                self._report(watcher)

    def shut_down(self) -> None:
        """Reports from now on that nothing serves."""
        self._shut = True
        self.set(dict.fromkeys(self._answers, False))

    def end_watches(self) -> None:
        """Ends all watches, which would otherwise delay the server's stop."""
        for call in list(self._watchers):
            call.finish()

    def generic_handler(self) -> Any:
        """What grpcio's server is given."""
        handlers: dict[str, Any] = {
            "Check": grpc.unary_unary_rpc_method_handler(_Inline(self._waits, self._check)),  # type: ignore[arg-type]
            "Watch": grpc.unary_stream_rpc_method_handler(_Inline(self._waits, self._watch)),  # type: ignore[arg-type]
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _check(self, call: GrpcCall, request: bytes | None) -> None:
        service = self._service(request)
        if not (answer := self._answers.get(service)):
            raise ModelNotFound(f"there is no service {service[:80]!r}")
        self._waits.begin(call, "probes", _PATIENCE_S, NOTHING_READ)
        call.context.set_trailing_metadata(self.trailing)
        call.finish(answer)

    def _watch(self, call: GrpcCall, request: bytes | None) -> None:
        service = self._service(request)
        with self._lock:
            if len(self._watchers) >= self._max_watchers:
                oldest = next(iter(self._watchers))
                self._watchers.pop(oldest, None)
                # After this status, gRPC's clients go on without watching. After any other they watch again at once,
                # which would end the next watch, and so on for ever.
                oldest.end(Unimplemented("too many callers watch health; ask by Check"))
            self._watchers[call] = _Watcher(service, call)
            self._report(self._watchers[call])
        if not call.context.add_callback(lambda: self._watchers.pop(call, None)):
            self._watchers.pop(call, None)

    def _service(self, request: bytes | None) -> str:
        if request is None:
            raise InvalidInput(NO_REQUEST)
        try:
            return str(self._request.FromString(request).service)
        except DecodeError:
            raise InvalidInput("the request is not a HealthCheckRequest") from None

    def _report(self, watcher: _Watcher) -> None:
        """Sends what is new, unless the last answer is still being sent; called with the lock."""
        answer = self._answers.get(watcher.service, self._unknown)
        if not watcher.sending and answer != watcher.last:
            watcher.last, watcher.sending = answer, True
            self._waits.begin(watcher.call, "probes", _PATIENCE_S, NOTHING_READ)
            watcher.call.send(answer, partial(self._sent, watcher))

    def _sent(self, watcher: _Watcher) -> None:
        self._waits.over(watcher.call)
        with self._lock:
            watcher.sending = False
            if watcher.call in self._watchers:
                self._report(watcher)

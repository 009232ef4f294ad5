"""grpc.health.v1 on threads of its own, so that its answer never waits for a model or a full queue.

grpcio-health-checking is not used: its blocking form holds a server thread for each watching client, and its
non-blocking form was seen to deadlock when a client leaves while a status changes (it sends while holding its lock).
"""

import logging
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tiny_model_server import wire
from tiny_model_server.admission import AT_ONCE, GuardedCall, Waits
from tiny_model_server.errors import InvalidInput, ModelNotFound, ServerError

log = logging.getLogger("tiny_model_server.health")

SERVICE = "grpc.health.v1.Health"
_READERS = 16
"""Threads that read the requests of health."""
_SHARE = 2
"""How many of them one connection may hold."""
_PATIENCE_S = 2.0
"""How long a caller of health may take to send its request or to read an answer."""


class _Watcher:
    def __init__(self, service: str, call: GuardedCall) -> None:
        self.service = service
        self.call = call
        self.last: int | None = None


class _Readers:
    """Reads requests in a few threads, of which callers that send nothing cannot hold all."""

    def __init__(self) -> None:
        self._waits = Waits(_READERS // 2)
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="health")
        self._lock = threading.Lock()
        self._queues: defaultdict[str, deque[Callable[[], None]]] = defaultdict(deque)  # by connection
        self._reading: Counter[str] = Counter()

    def reads(self, then: Callable[[bytes, GuardedCall], None]) -> Any:
        """A behaviour for grpcio that calls ``then`` with the request."""

        def begin(requests: Iterator[bytes], context: Any, send: Callable[[Any], None]) -> None:
            call = GuardedCall(context, self._waits, _PATIENCE_S, send)
            peer = context.peer()
            with self._lock:
                self._queues[peer].append(partial(self._read, requests, call, peer, then))
                self._go_on(peer)

        # grpcio calls a behaviour with these attributes by this executor, so in the thread that heard of the call,
        # and leaves the sending to it.
        begin.experimental_thread_pool = AT_ONCE  # type: ignore[attr-defined]
        begin.experimental_non_blocking = True  # type: ignore[attr-defined]
        return begin

    def _go_on(self, peer: str) -> None:
        """Reads what waits of this connection, as far as it may have threads; called with the lock."""
        queue = self._queues[peer]
        while queue and self._reading[peer] < _SHARE:
            self._reading[peer] += 1
            self._pool.submit(queue.popleft())
        if not self._reading[peer]:
            del self._queues[peer], self._reading[peer]

    def _read(
        self, requests: Iterator[bytes], call: GuardedCall, peer: str, then: Callable[[bytes, GuardedCall], None]
    ) -> None:
        try:
            if (request := call.receive(requests, only=True)) is None:
                raise InvalidInput("the method takes exactly one request message")
            then(request, call)
        except ServerError as error:
            call.end(error)
        except Exception as error:
            log.exception("a call of health failed")
            call.end(ServerError(f"a fault in the server: {type(error).__name__}"))
        finally:
            with self._lock:
                self._reading[peer] -= 1
                self._go_on(peer)


class Health:
    """Tells who is serving, to those who ask and to those who watch."""

    def __init__(self) -> None:
        """Starts out knowing no service."""
        self._readers = _Readers()
        self._response = wire.message("health", f"{SERVICE.rpartition('.')[0]}.HealthCheckResponse")
        self._request = wire.methods("health", SERVICE)["Check"].request
        self._changed = threading.Condition()
        self._serving: dict[str, bool] = {}
        self._watchers: set[_Watcher] = set()
        self._dirty = False
        self._shut = False
        threading.Thread(target=self._notify_watchers, name="health", daemon=True).start()

    def set(self, serving: Mapping[str, bool]) -> None:
        """Says for each service name whether it serves; without effect once shut down."""
        with self._changed:
            if not self._shut:
                self._serving = dict(serving)
                self._wake()

    def shut_down(self) -> None:
        """Says that nothing serves any more."""
        with self._changed:
            self._serving = dict.fromkeys(self._serving, False)
            self._shut = True
            self._wake()

    def end_watches(self) -> None:
        """Ends the streams of all who watch, which would otherwise hold up the server's stop."""
        with self._changed:
            watchers, self._watchers = self._watchers, set()
        for watcher in watchers:
            watcher.call.finish()

    def generic_handler(self) -> Any:
        """What grpcio's server is given."""
        handler = partial(grpc.stream_stream_rpc_method_handler, response_serializer=self._response.SerializeToString)
        table: dict[str, Any] = {
            "Check": handler(self._readers.reads(self._check)),
            "Watch": handler(self._readers.reads(self._watch)),
        }
        return grpc.method_handlers_generic_handler(SERVICE, table)

    def _check(self, request: bytes, call: GuardedCall) -> None:
        service = self._service(request)
        status = self._status(service)
        if status == self._response.SERVICE_UNKNOWN:
            raise ModelNotFound(f"there is no service {service[:80]!r}")
        call.send_all([self._response(status=status)])

    def _watch(self, request: bytes, call: GuardedCall) -> None:
        watcher = _Watcher(self._service(request), call)
        with self._changed:
            self._watchers.add(watcher)
            self._wake()
        if not call.on_end(lambda: self._forget(watcher)):
            self._forget(watcher)

    def _service(self, request: bytes) -> str:
        try:
            service: str = self._request.FromString(request).service
            return service
        except DecodeError:
            raise InvalidInput("the request is no HealthCheckRequest") from None

    def _status(self, service: str) -> int:
        serving = self._serving.get(service)
        if serving is None:
            return int(self._response.SERVICE_UNKNOWN)
        return int(self._response.SERVING if serving else self._response.NOT_SERVING)

    def _wake(self) -> None:
        self._dirty = True
        self._changed.notify()

    def _forget(self, watcher: _Watcher) -> None:
        with self._changed:
            self._watchers.discard(watcher)

    def _notify_watchers(self) -> None:
        while True:
            with self._changed:
                while not self._dirty:
                    self._changed.wait()
                self._dirty = False
                news = [(watcher, self._status(watcher.service)) for watcher in self._watchers]
            for watcher, status in news:  # never while holding the lock: a send waits for gRPC's own threads
                if status != watcher.last:
                    watcher.last = status
                    watcher.call.send(self._response(status=status))

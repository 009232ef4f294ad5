"""grpc.health.v1 on threads of its own, so that its answer never waits for a model or a full queue.

grpcio-health-checking is not used: its blocking form holds a server thread for each watching client, and its
non-blocking form was seen to deadlock when a client leaves while a status changes (it sends while holding its lock).
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from tiny_model_server import wire

SERVICE = "grpc.health.v1.Health"


class _Watcher:
    def __init__(self, service: str, send: Callable[[Any], None]) -> None:
        self.service = service
        self.send = send
        self.last: int | None = None


class Health:
    """Tells who is serving, to those who ask and to those who watch."""

    def __init__(self) -> None:
        """Starts out knowing no service."""
        self._response = wire.message("health", f"{SERVICE.rpartition('.')[0]}.HealthCheckResponse")
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
            watcher.send(None)

    def generic_handler(self) -> Any:
        """What grpcio's server is given."""
        methods = wire.methods("health", SERVICE)
        pool = ThreadPoolExecutor(2, thread_name_prefix="health")

        def check(request: Any, context: Any) -> Any:
            status = self._status(request.service)
            if status == self._response.SERVICE_UNKNOWN:
                context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:80]!r}")
            return self._response(status=status)

        def watch(request: Any, context: Any, send_response_callback: Callable[[Any], None]) -> None:
            watcher = _Watcher(request.service, send_response_callback)
            with self._changed:
                self._watchers.add(watcher)
                self._wake()
            if not context.add_callback(lambda: self._forget(watcher)):
                self._forget(watcher)

        # grpcio runs a behaviour with these attributes on this pool, and lets a stream go on after it returned.
        check.experimental_thread_pool = pool  # type: ignore[attr-defined]
        watch.experimental_thread_pool = pool  # type: ignore[attr-defined]
        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        table = {
            "Check": grpc.unary_unary_rpc_method_handler(
                check, methods["Check"].request.FromString, self._response.SerializeToString
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                watch, methods["Watch"].request.FromString, self._response.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, table)

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
                    watcher.send(self._response(status=status))

"""grpc.health.v1 on threads of its own, so that its answer never waits for a model or a full queue.

grpcio-health-checking is not used: its blocking form holds a server thread for each watching client, and its
non-blocking form was seen to deadlock when a client leaves while a status changes (it sends while holding its lock).
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tiny_model_server import schemas
from tiny_model_server.engine import placement
from tiny_model_server.errors import InvalidInput, ModelNotFound, Overloaded, ServerError
from tiny_model_server.server.admission import AT_ONCE, CROWDED_S, NOTHING_READ, GuardedCall, Waits

log = logging.getLogger("tiny_model_server.health")

SERVICE = "grpc.health.v1.Health"
_THREADS = 64
"""How many wait for callers of health: for their requests, and until they take an answer."""
_SHARE = 2
"""How many of them one connection may hold."""
_PATIENCE_S = 2.0
"""How long a caller of health may take to send its request or to read an answer."""
_SLOW_S = CROWDED_S * 0.8
"""A connection that is waited for so long comes after all others from then on."""
_MOST_SLOW = 4096
_MOST_WATCHERS = 8192


class _Probe(GuardedCall):
    """A call of health. Its answers are a few bytes; who does not take them is cut off."""

    def _wait_for_reader(self, answer: Any) -> None:
        self._waits.begin(self, _PATIENCE_S, CROWDED_S, self._cancel, NOTHING_READ)


class _Threads:
    """A few threads that wait for callers, of which those that send or read nothing cannot hold all.

    Slow connections may hold half of them, and come after all others.
    """

    def __init__(self) -> None:
        self.waits = Waits(_THREADS // 2)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="health")
        self._lock = threading.Lock()
        self._queues: tuple[dict[str, deque[Callable[[], None]]], ...] = (
            {},
            {},
        )  # by connection: the others', slow ones'
        self._slow: dict[str, None] = {}  # the last connections that were waited for
        self._busy = [0, 0]
        self._held: Counter[str] = Counter()

    def submit(self, peer: str, do: Callable[[], None]) -> None:
        """Calls ``do`` in a thread when it is this connection's turn."""
        with self._lock:
            self._queues[peer in self._slow].setdefault(peer, deque()).append(do)
            self._go_on()

    def _go_on(self) -> None:
        """Begins what there are threads for; called with the lock."""
        for slow, most in enumerate((_THREADS, _THREADS // 2)):
            queues = self._queues[slow]
            while self._busy[slow] < most and sum(self._busy) < _THREADS:
                # At most _THREADS / _SHARE connections have their share, so this does not look at many.
                peer = next((peer for peer in queues if self._held[peer] < _SHARE), None)
                if peer is None:
                    break
                queue = queues.pop(peer)
                do = queue.popleft()
                if queue:
                    queues[peer] = queue  # behind all others
                self._busy[slow] += 1
                self._held[peer] += 1
                self._pool.submit(self._do, do, peer, slow)

    def _do(self, do: Callable[[], None], peer: str, slow: int) -> None:
        begun = time.monotonic()
        try:
            do()
        except Exception:  # of one call; the others go on
            log.exception("a call of health failed")
        with self._lock:
            if time.monotonic() - begun > _SLOW_S:
                self._slow[peer] = self._slow.pop(peer, None)
                if len(self._slow) > _MOST_SLOW:
                    del self._slow[next(iter(self._slow))]
                if moved := self._queues[0].pop(peer, None):
                    self._queues[1].setdefault(peer, deque()).extend(moved)
            self._busy[slow] -= 1
            self._held[peer] -= 1
            if not self._held[peer]:
                del self._held[peer]
            self._go_on()

    def reads(self, then: Callable[[bytes, "_Probe", str], None]) -> Any:
        """A behaviour for grpcio that calls ``then`` with the request, the call and its connection."""

        def begin(requests: Iterator[bytes], context: Any, send: Callable[[Any], None]) -> None:
            call, peer = _Probe(context, self.waits, _PATIENCE_S, send), context.peer()
            self.submit(peer, partial(self._read, requests, call, peer, then))

        # grpcio calls a behaviour with these attributes by this executor, so in the thread that heard of the call,
        # and leaves the sending to it.
        begin.experimental_thread_pool = AT_ONCE  # type: ignore[attr-defined]
        begin.experimental_non_blocking = True  # type: ignore[attr-defined]
        return begin

    def _read(
        self, requests: Iterator[bytes], call: _Probe, peer: str, then: Callable[[bytes, _Probe, str], None]
    ) -> None:
        try:
            if (request := call.receive(requests, only=True)) is None:
                raise InvalidInput("the method takes exactly one request message")
            then(request, call, peer)
        except ServerError as error:
            call.end(error)
        except Exception as error:
            log.exception("a call of health failed")
            call.end(ServerError(f"a fault in the server: {type(error).__name__}"))


class _Watcher:
    def __init__(self, service: str, call: _Probe, peer: str) -> None:
        self.service = service
        self.call = call
        self.peer = peer
        self.last: int | None = None
        self.busy = False
        """True while a thread tells it what is new, or will."""


class Health:
    """Tells who is serving, to those who ask and to those who watch."""

    def __init__(self) -> None:
        """Starts out knowing no service."""
        self._threads = _Threads()
        self._response = schemas.message("health", f"{SERVICE.rpartition('.')[0]}.HealthCheckResponse")
        self._request = schemas.methods("health", SERVICE)["Check"].request
        self._lock = threading.Lock()
        self._serving: dict[str, bool] = {}
        self._watchers: dict[_Watcher, None] = {}  # the oldest first
        # A watch holds its connection open, and that a descriptor; others need some too.
        self._most_watchers = min(_MOST_WATCHERS, placement.descriptors() // 4)
        self._shut = False

    def set(self, serving: Mapping[str, bool]) -> None:
        """Says for each service name whether it serves; without effect once shut down."""
        with self._lock:
            if not self._shut:
                self._serving = dict(serving)
                self._tell_all()

    def shut_down(self) -> None:
        """Says that nothing serves any more."""
        with self._lock:
            self._serving = dict.fromkeys(self._serving, False)
            self._shut = True
            self._tell_all()

    def end_watches(self) -> None:
        """Ends the streams of all who watch, which would otherwise hold up the server's stop."""
        with self._lock:
            watchers, self._watchers = self._watchers, {}
        for watcher in watchers:
            watcher.call.finish()

    def generic_handler(self) -> Any:
        """What grpcio's server is given."""
        handler = partial(grpc.stream_stream_rpc_method_handler, response_serializer=self._response.SerializeToString)
        table: dict[str, Any] = {
            "Check": handler(self._threads.reads(self._check)),
            "Watch": handler(self._threads.reads(self._watch)),
        }
        return grpc.method_handlers_generic_handler(SERVICE, table)

    def _check(self, request: bytes, call: _Probe, peer: str) -> None:
        service = self._service(request)
        status = self._status(service)
        if status == self._response.SERVICE_UNKNOWN:
            raise ModelNotFound(f"there is no service {service[:80]!r}")
        call.send_all([self._response(status=status)])

    def _watch(self, request: bytes, call: _Probe, peer: str) -> None:
        watcher, oldest = _Watcher(self._service(request), call, peer), None
        with self._lock:
            if len(self._watchers) >= self._most_watchers:
                oldest = next(iter(self._watchers))
                del self._watchers[oldest]
            self._watchers[watcher] = None
            watcher.busy = True
        if oldest:
            oldest.call.end(Overloaded("too many callers watch health; watch again"))
        if not call.on_end(lambda: self._forget(watcher)):
            self._forget(watcher)
        self._tell(watcher)

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

    def _tell_all(self) -> None:
        """Lets threads tell each watcher what is new; called with the lock."""
        for watcher in self._watchers:
            if not watcher.busy and watcher.last != self._status(watcher.service):
                watcher.busy = True
                self._threads.submit(watcher.peer, partial(self._tell, watcher))

    def _tell(self, watcher: _Watcher) -> None:
        while True:
            with self._lock:
                status = self._status(watcher.service)
                if status == watcher.last or watcher not in self._watchers:
                    watcher.busy = False
                    return
                watcher.last = status
            watcher.call.send(self._response(status=status))  # without the lock: it waits for the caller

    def _forget(self, watcher: _Watcher) -> None:
        with self._lock:
            self._watchers.pop(watcher, None)

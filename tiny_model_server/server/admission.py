"""Decides which gRPC calls get a thread, and for how long.

grpcio alone gives a call a thread when its headers arrive. Here, a call is first authenticated and counted against its
connection. It gets a thread when its first message arrives. It is ended if its caller sends or reads nothing for too
long.
"""

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError

from tiny_model_server.engine.call import Call
from tiny_model_server.engine.engine import Engine
from tiny_model_server.errors import Cancelled, DeadlineExceeded, InvalidInput, Overloaded, ServerError, Unimplemented
from tiny_model_server.server.grpc_call import GrpcCall, abort

log = logging.getLogger("tiny_model_server.admission")

NOTHING_READ = "the caller read nothing for too long (TMS_STREAM_IDLE_S)"
NOTHING_SENT = "the caller sent nothing for too long (TMS_STREAM_IDLE_S)"
NO_REQUEST = "the method takes exactly one request message"
MAX_ARRIVING = 4096
"""Calls whose first message is awaited. They hold memory, but no thread."""
_CROWDED = "too many calls wait for their callers"
_CROWDED_S = 0.25  # if too many wait, those are ended that have waited for so long
_TICK_S = 0.1
_BACKOFF_MS = {None: 100, "1": 400, "2": 1600}  # by a call's retries so far, as gRPC counts them in its metadata
_MAX_BACKOFF_MS = 5000
_MIN_BYTES_PER_S = 1 << 20  # of an answer, which a caller must read after the first stream_idle_s
_NO_DEADLINE_S = 1e9
_UPLOAD_FACTOR = 10  # a message of a call with a deadline may take so many times stream_idle_s: grpcio hides its bytes


class _Wait(NamedTuple):
    kind: str
    begun: float
    seconds: float
    why: str
    weight: int


class Waits:
    """The calls that wait for their callers. A call whose wait is too long is ended."""

    def __init__(self, **max_weights: int) -> None:
        """``max_weights`` bound the weight of all waits of a kind. Beyond it, the oldest are ended early."""
        self._max_weights = max_weights
        self._waits: dict[GrpcCall, _Wait] = {}  # the oldest first; changed by single operations only
        self._some = threading.Event()  # set when a wait begins; an idle server sleeps
        threading.Thread(target=self._watch, name="waits", daemon=True).start()

    def receive(self, call: GrpcCall, kind: str, seconds: float, then: Callable[[bytes | None], None]) -> None:
        """Waits for a call's first message, and then calls ``then`` with it, or None, in grpcio's own thread."""

        def received(message: bytes | None) -> None:
            self.over(call)
            then(message)

        call.context.add_callback(lambda: self.over(call))
        self.begin(call, kind, seconds, NOTHING_SENT)
        call.receive(received)

    def begin(self, call: GrpcCall, kind: str, seconds: float, why: str, weight: int = 1) -> None:
        """Ends the call after ``seconds`` with DeadlineExceeded and this text, unless ``over`` is called before."""
        self._waits[call] = _Wait(kind, time.monotonic(), seconds, why, weight)
        if not self._some.is_set():
            self._some.set()

    def over(self, call: GrpcCall) -> None:
        """Ends the wait: the caller has sent or read, or the call has ended."""
        self._waits.pop(call, None)

    def _watch(self) -> None:
        while self._some.wait():
            self._some.clear()
            while self._waits:
                time.sleep(_TICK_S)
                self._end_late(list(self._waits.items()), time.monotonic())

    def _end_late(self, waits: list[tuple[GrpcCall, _Wait]], now: float) -> None:
        weights: Counter[str] = Counter()
        for _, wait in waits:
            weights[wait.kind] += wait.weight
        ended: Counter[str] = Counter()
        for call, wait in waits:
            late = now - wait.begun > wait.seconds
            crowded = weights[wait.kind] > self._max_weights.get(wait.kind, math.inf) and now - wait.begun > _CROWDED_S
            if (late or crowded) and self._waits.pop(call, None) is not None:
                weights[wait.kind] -= wait.weight
                ended[wait.why if late else _CROWDED] += 1
                # The status waits behind what the caller does not read. After as long again, the call is cancelled.
                if call.end(DeadlineExceeded(wait.why) if late else Overloaded(_CROWDED, _MAX_BACKOFF_MS)):
                    self.begin(call, "ending", wait.seconds, wait.why)
                else:
                    call.context.cancel()
        for why, count in ended.items():
            log.warning("%d calls are ended: %s", count, why)


class _Behavior(partial):  # type: ignore[type-arg]
    """``Admission._unary`` or ``_stream``, bound to a method's handler."""

    experimental_non_blocking = True  # grpcio gives a stream a function that sends answers


class Admission(ThreadPoolExecutor, grpc.ServerInterceptor):
    """The first interceptor of grpcio's server, and its thread pool.

    A call passes ``intercept_service``, ``submit`` and, in a thread, ``_unary`` or ``_stream``.
    """

    def __init__(self, engine: Engine, exempt: str, threads: int) -> None:
        """``exempt`` is a service with a pool of its own. ``threads`` is the number for calls at work."""
        waiting = max(8, threads // 2)
        super().__init__(threads + waiting, thread_name_prefix="grpc")
        self._engine = engine
        self._exempt = f"/{exempt}/"
        self._idle_s = engine.settings.stream_idle_s
        self._max_calls = max(2, engine.settings.threads // 4)  # of a connection
        self._calls: Counter[str] = Counter()  # of each connection
        self._lock = threading.Lock()
        self._waits = Waits(arriving=MAX_ARRIVING, threads=waiting, unread=engine.inflight.limit // 2)

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Makes ``_unary`` or ``_stream`` the method's behaviour, with its own handler as their argument."""
        handler = continuation(details)
        if handler is None or details.method.startswith(self._exempt):
            return handler
        streams = handler.response_streaming
        # grpcio need not know of request streams: ``submit`` receives the requests.
        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        return make(_Behavior(self._stream if streams else self._unary, handler), None, handler.response_serializer)

    def submit(  # type: ignore[override]
        self, run: Any, respond: Any, event: Any, state: Any, behavior: Any, receive: Any, *codecs: Any
    ) -> None:
        """Admits a call. grpcio calls this when the headers have arrived, with what to run in a thread."""
        call, metadata = GrpcCall(event, state), dict(event.invocation_metadata)

        def refused(error: ServerError) -> None:
            Call(peer=call.peer, metadata=metadata).log_access(event.call_details.method.decode(), error.status)

        def start(message: bytes | None) -> None:
            try:
                if message is None and not (behavior.args[0].request_streaming and call.context.is_active()):
                    raise Unimplemented(NO_REQUEST)
                self._count(call, message)
            except ServerError as error:
                self._leave(call)
                refused(error)
                raise
            super(Admission, self).submit(run, respond, event, state, behavior, lambda: call, *codecs)

        try:
            self._engine.access.authenticate(metadata)
            self._enter(call.peer, metadata.get("grpc-previous-rpc-attempts"))
        except ServerError as error:
            refused(error)
            call.end(error)
            return
        remaining = call.context.time_remaining()
        limit_s = self._idle_s if remaining > _NO_DEADLINE_S else min(remaining, _UPLOAD_FACTOR * self._idle_s)
        self._waits.receive(call, "arriving", limit_s, start)

    def _enter(self, peer: str, attempts: Any) -> None:
        """Counts a call; Overloaded if its connection has as many as it may. ``attempts`` are its retries so far."""
        with self._lock:
            # All callers of a unix socket look like one: its file's mode says who they are.
            if self._calls[peer] >= self._max_calls and not peer.startswith("unix:"):
                backoff_ms = _BACKOFF_MS.get(attempts, _MAX_BACKOFF_MS)
                raise Overloaded(
                    f"this connection has {self._max_calls} calls in the server already, a quarter of TMS_THREADS",
                    retry_after_ms=int(backoff_ms * random.uniform(0.5, 2)),  # so that not all come back at once
                )
            self._calls[peer] += 1

    def _leave(self, call: GrpcCall) -> None:
        self._count(call, None)
        with self._lock:
            self._calls[call.peer] -= 1
            if not self._calls[call.peer]:
                del self._calls[call.peer]

    def _count(self, call: GrpcCall, message: bytes | None) -> None:
        """Counts the bytes of the call's new message, and no longer those of the one before."""
        self._engine.inflight.give(len(call.message or b""))
        call.message = None
        self._engine.inflight.take(len(message or b""))
        call.message = message

    def _unary(self, handler: Any, call: GrpcCall, context: Any) -> Any:
        try:
            answer = handler.unary_unary(call.message, context)
        finally:
            self._leave(call)
        # grpcio keeps an answer's memory until it is read.
        self._waits.begin(call, "unread", self._seconds(answer), NOTHING_READ, len(answer))
        if not context.is_active():
            self._waits.over(call)
        return answer

    def _stream(self, handler: Any, call: GrpcCall, context: Any, send: Callable[[Any], None]) -> None:
        try:
            requests = self._requests(handler, call)
            if handler.request_streaming:
                responses = handler.stream_stream(requests, context)
            else:
                responses = handler.unary_stream(next(requests), context)
            with closing(responses) as answers:
                for answer in answers:
                    self._waits.begin(call, "reading", self._seconds(answer), NOTHING_READ)
                    send(answer)
                    self._waits.over(call)
                    if not context.is_active():
                        return
            call.finish()
        except Exception as error:
            if not context.is_active():
                return  # grpcio is not to send a second status
            if isinstance(error, DecodeError):
                error = InvalidInput("the request cannot be parsed")
            if isinstance(error, ServerError):
                abort(context, error)
            raise
        finally:
            self._leave(call)

    def _requests(self, handler: Any, call: GrpcCall) -> Generator[Any, None, None]:
        arrived: SimpleQueue[bytes | None] = SimpleQueue()
        while call.message is not None:
            yield handler.request_deserializer(call.message) if handler.request_deserializer else call.message
            self._count(call, None)
            self._waits.begin(call, "threads", self._idle_s, NOTHING_SENT)
            call.receive(arrived.put)
            message = arrived.get()
            self._waits.over(call)
            if not call.context.is_active():
                raise Cancelled("the call has ended")
            self._count(call, message)

    def _seconds(self, answer: Any) -> float:
        return self._idle_s + (len(answer) / _MIN_BYTES_PER_S if isinstance(answer, bytes) else 0)

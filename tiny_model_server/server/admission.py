"""Which gRPC calls get a thread, and for how long.

grpcio would give a call a thread as soon as its headers arrive. Here, a call is authenticated and counted against its
connection first, and gets a thread once its first message is here. It is ended if its caller sends nothing or reads
nothing for too long.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError

from tiny_model_server.engine.engine import Engine
from tiny_model_server.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    ServerError,
    Unimplemented,
)
from tiny_model_server.server.grpc_call import GrpcCall, abort

log = logging.getLogger("tiny_model_server.admission")

NOTHING_READ = "the caller read nothing for too long (TMS_STREAM_IDLE_S)"
NOTHING_SENT = "the caller sent nothing for too long (TMS_STREAM_IDLE_S)"
NO_REQUEST = "the method takes exactly one request message"
MOST_ARRIVING = 4096
"""Calls whose first message is awaited. They hold memory, but no thread."""
_CROWDED = "too many calls wait for their callers"
_CROWDED_S = 0.25  # a call that has waited for so long is ended if too many wait
_TICK_S = 0.1
_RETRY_AFTER_MS = 100
_LAST_RETRY_MS = 5000
_SLOWEST = 1 << 20  # bytes a second that a caller must take of an answer, after the first seconds
_NO_DEADLINE_S = 1e9
_UPLOAD = 10  # a message with a deadline may take this many times stream_idle_s; its bytes on the way cannot be seen


class _Wait(NamedTuple):
    kind: str
    begun: float
    seconds: float
    why: str
    weight: int


class Waits:
    """The calls that wait for their callers. A call that waits for too long is ended."""

    def __init__(self, **most: int) -> None:
        """``most`` is the weight that all waits of a kind may have; beyond it, the oldest are ended early."""
        self._most = most
        self._waits: dict[GrpcCall, _Wait] = {}  # the oldest first; changed by single operations only
        self._some = threading.Event()  # set while there may be waits; an idle server sleeps
        threading.Thread(target=self._watch, name="waits", daemon=True).start()

    def begin(self, call: GrpcCall, kind: str, seconds: float, why: str, weight: int = 1) -> None:
        """Ends the call after ``seconds`` with DeadlineExceeded and this text, unless ``over`` is called before."""
        self._waits[call] = _Wait(kind, time.monotonic(), seconds, why, weight)
        if not self._some.is_set():
            self._some.set()

    def over(self, call: GrpcCall) -> None:
        """The call goes on, or has ended."""
        self._waits.pop(call, None)

    def _watch(self) -> None:
        while self._some.wait():
            time.sleep(_TICK_S)
            self._end_late(list(self._waits.items()), time.monotonic())
            if not self._waits:
                self._some.clear()
                if self._waits:  # one has begun meanwhile, and may have seen the event set
                    self._some.set()

    def _end_late(self, waits: list[tuple[GrpcCall, _Wait]], now: float) -> None:
        weights: Counter[str] = Counter()
        for _, wait in waits:
            weights[wait.kind] += wait.weight
        ended: Counter[str] = Counter()
        for call, wait in waits:
            late = now - wait.begun > wait.seconds
            crowded = weights[wait.kind] > self._most.get(wait.kind, math.inf) and now - wait.begun > _CROWDED_S
            if (late or crowded) and self._waits.pop(call, None) is not None:
                weights[wait.kind] -= wait.weight
                ended[wait.why if late else _CROWDED] += 1
                # The status waits behind what the caller does not read. After as long again, the call is cancelled.
                if call.end(DeadlineExceeded(wait.why) if late else Overloaded(_CROWDED, _RETRY_AFTER_MS)):
                    self.begin(call, "ending", wait.seconds, wait.why)
        for why, count in ended.items():
            log.warning("%d calls are ended: %s", count, why)


@dataclass(slots=True)
class _Connection:
    calls: int = 0
    refused: int = 0
    """Calls that were refused, and will come again."""
    call_s: float = 0.1
    """A moving mean of how long one of its calls takes."""


class Callers:
    """Counts the calls of each connection."""

    def __init__(self, most: int) -> None:
        """``most`` is the number that one connection may have in the server."""
        self._most = most
        self._connections: dict[str, _Connection] = {}
        self._lock = threading.Lock()

    def enter(self, call: GrpcCall) -> None:
        """Counts a call; Overloaded if its connection has as many as it may."""
        with self._lock:
            found = self._connections.setdefault(call.peer, _Connection())
            # All callers of a unix socket look like one: its file's mode says who they are.
            if found.calls >= self._most and not call.peer.startswith("unix:"):
                found.refused += 1
                wait_s = found.call_s * (1 + found.refused / self._most)
                raise Overloaded(
                    f"this connection has {found.calls} calls in the server already, a quarter of TMS_THREADS",
                    retry_after_ms=min(_LAST_RETRY_MS, _RETRY_AFTER_MS + int(1000 * wait_s)),
                )
            found.calls += 1
            found.refused = max(0, found.refused - 1)

    def leave(self, call: GrpcCall) -> None:
        """The call is over."""
        with self._lock:
            found = self._connections[call.peer]
            found.calls -= 1
            found.call_s += (time.monotonic() - call.began - found.call_s) / 8
            if not found.calls:
                del self._connections[call.peer]


class _Arrived(NamedTuple):
    """What a behaviour gets in place of its request."""

    call: GrpcCall
    message: bytes | None
    more: Callable[[], Iterator[bytes]]


class _Behavior(partial):  # type: ignore[type-arg]
    experimental_non_blocking = True  # grpcio leaves the sending of a stream's answers to it
    handler: Any


class Admission(ThreadPoolExecutor, grpc.ServerInterceptor):
    """The first interceptor of grpcio's server, and its thread pool.

    A call passes ``intercept_service``, ``submit`` and, in a thread, ``_unary`` or ``_stream``. Health has a pool of
    its own.
    """

    def __init__(self, engine: Engine, exempt: str, threads: int) -> None:
        """``exempt`` is the service that is not guarded; ``threads`` are for calls at work."""
        waiting = max(8, threads // 2)
        super().__init__(threads + waiting, thread_name_prefix="grpc")
        self._engine = engine
        self._exempt = f"/{exempt}/"
        self._idle_s = engine.settings.stream_idle_s
        self._callers = Callers(max(2, engine.settings.threads // 4))
        self._waits = Waits(arriving=MOST_ARRIVING, threads=waiting, unread=engine.inflight.limit // 2)

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Guards a method. Its behaviour is called by ``_unary`` or ``_stream``."""
        handler = continuation(details)
        if handler is None or details.method.startswith(self._exempt):
            return handler
        made = [grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler]
        if handler.request_streaming:
            made = [grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler]
        behavior = _Behavior(self._stream if handler.response_streaming else self._unary, handler)
        behavior.handler = handler
        return made[handler.response_streaming](behavior, None, handler.response_serializer)

    def submit(  # type: ignore[override]
        self, run: Any, respond: Any, event: Any, state: Any, behavior: Any, requests: Any, *codecs: Any
    ) -> None:
        """Admits a call: grpcio hands it in when its headers have arrived, with how to read it and to answer it."""
        call = GrpcCall(event, state)

        def start(message: bytes | None) -> None:
            self._waits.over(call)
            try:
                if message is None and not (behavior.handler.request_streaming and call.context.is_active()):
                    raise Unimplemented(NO_REQUEST)
                self._hold(call, message)
            except ServerError as error:
                self._leave(call)
                call.end(error)
            else:
                arrived = _Arrived(call, message, requests)
                super(Admission, self).submit(run, respond, event, state, behavior, lambda: arrived, *codecs)

        try:
            self._engine.authenticate(dict(event.invocation_metadata))
            self._callers.enter(call)
        except ServerError as error:
            call.end(error)
            return
        call.context.add_callback(lambda: self._waits.over(call))
        remaining = call.context.time_remaining()
        patience = self._idle_s if remaining > _NO_DEADLINE_S else min(remaining, _UPLOAD * self._idle_s)
        self._waits.begin(call, "arriving", patience, NOTHING_SENT)
        call.receive(start)

    def _hold(self, call: GrpcCall, message: bytes | None) -> None:
        """Counts the bytes of a call's message among those under way, in place of its last one's."""
        self._engine.inflight.give(call.held)
        call.held = 0
        self._engine.inflight.take(size := len(message or b""))
        call.held = size

    def _leave(self, call: GrpcCall) -> None:
        self._engine.inflight.give(call.held)
        self._callers.leave(call)

    def _unary(self, handler: Any, arrived: _Arrived, context: Any) -> Any:
        call = arrived.call
        try:
            answer = handler.unary_unary(_parsed(handler, arrived.message), context)
        except ServerError as error:
            abort(context, error)
        finally:
            self._leave(call)
        # grpcio would keep the memory of an answer that is not read for ever.
        self._waits.begin(call, "unread", self._seconds(answer), NOTHING_READ, len(answer))
        if not context.is_active():
            self._waits.over(call)
        return answer

    def _stream(self, handler: Any, arrived: _Arrived, context: Any, send: Callable[[Any], None]) -> None:
        call = arrived.call
        try:
            with closing(self._requests(handler, arrived)) as requests:
                argument, behavior = requests, handler.stream_stream
                if not handler.request_streaming:
                    argument, behavior = next(requests), handler.unary_stream
                with closing(behavior(argument, context)) as answers:
                    for answer in answers:
                        self._waits.begin(call, "reading", self._seconds(answer), NOTHING_READ)
                        send(answer)
                        self._waits.over(call)
                        if not context.is_active():
                            return
            call.finish()
        except ServerError as error:
            call.end(error)
        except Exception:
            if context.is_active():  # else grpcio is not to send a second status
                raise
        finally:
            self._leave(call)

    def _requests(self, handler: Any, arrived: _Arrived) -> Generator[Any, None, None]:
        message = arrived.message
        more = arrived.more() if handler.request_streaming else iter(())
        while message is not None:
            yield _parsed(handler, message)
            message = self._next(arrived.call, more)
            self._hold(arrived.call, message)

    def _next(self, call: GrpcCall, requests: Iterator[bytes]) -> bytes | None:
        self._waits.begin(call, "threads", self._idle_s, NOTHING_SENT)
        try:
            message = next(requests, None)
        except grpc.RpcError as error:
            error.__traceback__ = None  # grpcio keeps the error, which would keep the frames and the call's memory
            raise Cancelled("the caller has disconnected") from None
        finally:
            self._waits.over(call)
        if not call.context.is_active():
            raise Cancelled("the call was ended")
        return message

    def _seconds(self, answer: Any) -> float:
        return self._idle_s + (len(answer) / _SLOWEST if isinstance(answer, bytes) else 0)


def _parsed(handler: Any, message: Any) -> Any:
    if not handler.request_deserializer:
        return message
    try:
        return handler.request_deserializer(message)
    except DecodeError:
        raise InvalidInput("the request cannot be parsed") from None

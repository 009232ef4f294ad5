"""Who may hold a thread of the gRPC server, and for how long.

grpcio gives a call a thread as soon as its headers arrive. So a call is authenticated before it gets one, counted
against its connection before its message is read, and ended if its caller sends nothing or reads nothing for too long.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

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
    message_of,
)

log = logging.getLogger("tiny_model_server.admission")

CROWDED_S = 0.25
"""A call that has waited for so long may lose its thread to others, if too many wait."""
NOTHING_READ = "the caller read nothing for too long (TMS_STREAM_IDLE_S)"
_TICK_S = 0.1
_RETRY_AFTER_MS = 100
_LAST_RETRY_MS = 5000
_SLOWEST = 1 << 20  # bytes a second that a caller must take of an answer, after the first seconds
_NO_DEADLINE_S = 1e9
_CROWDED = "too many calls wait for their callers"
_NOTHING_SENT = "the caller sent nothing for too long (TMS_STREAM_IDLE_S)"
_NO_REQUEST = "the method takes exactly one request message"
_UPLOAD = 10  # a message with a deadline may take this many times stream_idle_s; its bytes on the way cannot be seen


class AtOnce(ThreadPoolExecutor):
    """Runs what it is given at once, in the thread that gives it: no thread is needed to refuse a call."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Runs ``fn`` and returns what came of it."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # the caller finds it in the future, as it would of any executor
            future.set_exception(error)
        return future


AT_ONCE = AtOnce(1)


_Wait = tuple[float, float, Callable[[ServerError], None], str, int]
"""Its limit on the monotonic clock; the limit while too many wait (infinite if no thread waits); ``end``; ``why``;
``weight``."""


class Waits:
    """What calls wait for. Each wait has a limit, after which its call is ended."""

    def __init__(self, most: int) -> None:
        """Once waits of more than this weight in all are crowded, the oldest of them are ended early."""
        self._most = most
        self._waits: dict[Any, _Wait] = {}  # the oldest first; changed by single operations only
        self._some = threading.Event()  # set while there may be waits; an idle server sleeps
        threading.Thread(target=self._watch, name="waits", daemon=True).start()

    def begin(
        self,
        key: Any,
        seconds: float,
        crowded_s: float,
        end: Callable[[ServerError], None],
        why: str,
        weight: int = 1,
    ) -> None:
        """Calls ``end`` after ``seconds``, or while too many wait after ``crowded_s``, unless ``over`` comes before.

        ``why`` is the text of its DeadlineExceeded.
        """
        now = time.monotonic()
        self._waits[key] = (now + seconds, now + crowded_s, end, why, weight)
        if not self._some.is_set():
            self._some.set()

    def over(self, key: Any) -> None:
        """The call goes on, or has ended."""
        self._waits.pop(key, None)

    def _watch(self) -> None:
        while True:
            if not self._waits:
                self._some.clear()
                if not self._waits:  # none has begun meanwhile, so whoever begins one will see that it must set this
                    self._some.wait()
            time.sleep(_TICK_S)
            waits = list(self._waits.items())
            crowd = sum(weight for _, (_, crowded, _, _, weight) in waits if crowded < math.inf) - self._most
            now = time.monotonic()
            for key, (limit, crowded, end, why, weight) in waits:
                late = limit <= now
                if (late or (crowd > 0 and crowded <= now)) and self._waits.pop(key, None) is not None:
                    crowd -= weight
                    log.warning("a call is ended: %s", why if late else _CROWDED)
                    _end(end, DeadlineExceeded(why) if late else Overloaded(_CROWDED, _RETRY_AFTER_MS))


def _end(end: Callable[[ServerError], None], error: ServerError) -> None:
    try:
        end(error)
    except Exception:  # of one call; the others are watched on
        log.exception("a call could not be ended")


@dataclass(slots=True)
class _Connection:
    held: int = 0
    """Threads that it holds."""
    refused: int = 0
    """Calls that were refused, and will come again."""
    call_s: float = 0.1
    """A moving mean of how long one of its calls takes."""


class Callers:
    """Counts the threads that each connection holds."""

    def __init__(self, most: int) -> None:
        """``most`` is the number that one connection may hold."""
        self._most = most
        self._connections: dict[str, _Connection] = {}
        self._lock = threading.Lock()

    def enter(self, peer: str) -> float:
        """Counts a call and returns the time; Overloaded if its connection holds as many threads as it may."""
        with self._lock:
            found = self._connections.get(peer)
            if found is None:
                found = self._connections[peer] = _Connection()
            # All callers of a unix socket look like one: its file's mode says who they are.
            if found.held >= self._most and not peer.startswith("unix:"):
                found.refused += 1
                wait_s = found.call_s * (1 + found.refused / self._most)
                raise Overloaded(
                    f"this connection has {found.held} calls in the server already, a quarter of TMS_THREADS",
                    retry_after_ms=min(_LAST_RETRY_MS, _RETRY_AFTER_MS + int(1000 * wait_s)),
                )
            found.held += 1
            found.refused = max(0, found.refused - 1)
        return time.monotonic()

    def leave(self, peer: str, entered: float) -> None:
        """The call that entered then is over."""
        with self._lock:
            found = self._connections[peer]
            found.held -= 1
            found.call_s += (time.monotonic() - entered - found.call_s) / 8
            if not found.held:
                del self._connections[peer]


class Admission(grpc.ServerInterceptor):
    """Guards every method but those of health, which has threads of its own. It must be the first interceptor,

    for it calls the behaviours that the others return.
    """

    def __init__(self, engine: Engine, exempt: str, *, alone: bool) -> None:
        """``exempt`` is the service that is not guarded; ``alone`` says that no other interceptor follows."""
        self._alone = alone
        self._guarded: dict[str, Any] = {}  # handlers by method, if they are always the same
        self._engine = engine
        self._exempt = f"/{exempt}/"
        self._idle_s = engine.settings.stream_idle_s
        self._callers = Callers(max(2, engine.settings.threads // 4))
        self._waits = Waits(waiting_threads(engine.settings.threads))
        self._unread = Waits(engine.inflight.limit // 2)  # of answers; bytes

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Refuses a call without the server's token before it gets a thread. Probes of health bring none."""
        if details.method.startswith(self._exempt):
            return continuation(details)
        if self._engine.settings.token:
            try:
                self._engine.authenticate(dict(details.invocation_metadata))
            except ServerError as error:
                return _refusal(error)
        if guarded := self._guarded.get(details.method):
            return guarded
        if (handler := continuation(details)) is None:
            return None
        guarded = self._streaming(handler) if handler.response_streaming else self._unary(handler)
        if self._alone:
            self._guarded[details.method] = guarded
        return guarded

    def _unary(self, handler: Any) -> Any:
        # Its requests are said to be a stream, so that grpcio calls it before there is one. On the wire that is equal.
        behavior, inflight = handler.unary_unary, self._engine.inflight

        def answer(requests: Any, context: Any) -> Any:
            call, peer, size = GuardedCall(context, self._waits, self._idle_s), context.peer(), 0
            try:
                entered = self._callers.enter(peer)
                try:
                    if (data := call.receive(requests, only=True)) is None:
                        raise Unimplemented(_NO_REQUEST)
                    inflight.take(len(data))
                    size = len(data)
                    made = behavior(_parsed(handler, data), context)
                finally:
                    inflight.give(size)
                    self._callers.leave(peer, entered)
            except ServerError as error:
                abort(context, error)
            call.hand_over(made, self._unread)
            return made

        return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)

    def _streaming(self, handler: Any) -> Any:
        behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream

        def answer(requests: Any, context: Any, send: Callable[[Any], None]) -> None:
            call, peer = GuardedCall(context, self._waits, self._idle_s, send), context.peer()
            try:
                entered = self._callers.enter(peer)
                try:
                    with closing(self._arriving(handler, requests, call)) as arriving:
                        argument = arriving if handler.request_streaming else _only(arriving)
                        with closing(behavior(argument, context)) as made:
                            call.send_all(made)
                finally:
                    self._callers.leave(peer, entered)
            except ServerError as error:
                if not call.ended:
                    abort(context, error)
            except Exception:
                if not call.ended:  # else grpcio is not to send a second status
                    raise

        # grpcio runs a behaviour with this attribute in a thread of the pool, and leaves the sending to it.
        answer.experimental_non_blocking = True  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)

    def _arriving(self, handler: Any, requests: Iterator[bytes], call: "GuardedCall") -> Generator[Any, None, None]:
        """The requests, each counted among the bytes under way until the next one is asked for, or the end."""
        while (data := call.receive(requests, only=not handler.request_streaming)) is not None:
            with self._engine.inflight.held(len(data)):
                yield _parsed(handler, data)


def waiting_threads(threads: int) -> int:
    """How many threads there are for calls that wait for their callers, beside those for calls at work."""
    return max(8, threads // 2)


class GuardedCall:
    """A call that grpcio has given a thread, and how to end it from another one."""

    def __init__(self, context: Any, waits: Waits, idle_s: float, send: Callable[[Any], None] | None = None) -> None:
        self._context = context
        self._waits = waits
        self._idle_s = idle_s
        self._send = send
        self.ended = False
        """True once its status was sent by ``end``."""

    def receive(self, requests: Iterator[bytes], *, only: bool) -> bytes | None:
        """The next request, None after the last; ``only`` says that there is but one."""
        remaining = self._context.time_remaining() if only else math.inf
        patience = self._idle_s if remaining > _NO_DEADLINE_S else min(remaining, _UPLOAD * self._idle_s)
        self._waits.begin(self, patience, CROWDED_S, self.end, _NOTHING_SENT)
        try:
            data = next(requests, None)
        except grpc.RpcError as error:
            error.__traceback__ = None  # grpcio keeps the error, which would keep the frames and the call's memory
            raise Cancelled("the caller went away") from None
        finally:
            self._waits.over(self)
        if self.ended:
            raise Cancelled("the call was ended")
        return data

    def send_all(self, answers: Iterable[Any]) -> None:
        """Sends each answer, at the speed of a caller that reads; then the status."""
        for answer in answers:
            if not self.send(answer):
                return
        self.finish()

    def send(self, answer: Any) -> bool:
        """Sends one answer, and returns when the caller's window has taken it; False if nothing more can be sent."""
        assert self._send
        self._wait_for_reader(answer)
        try:
            self._send(answer)
        finally:
            self._waits.over(self)
        active: bool = self._context.is_active()
        return active

    def _wait_for_reader(self, answer: Any) -> None:
        self._waits.begin(self, self._seconds(answer), self._idle_s, self.end, NOTHING_READ)

    def finish(self) -> None:
        """Sends the status, unless the call has ended."""
        if self._send and self._context.is_active():
            self._send(None)

    def on_end(self, callback: Callable[[], None]) -> bool:
        """Calls this when the call ends; False if it has ended."""
        added: bool = self._context.add_callback(callback)
        return added

    def hand_over(self, answer: Any, unread: Waits) -> None:
        """Cancels the call if its caller does not read the only answer, whose memory grpcio would keep for ever."""
        weight = len(answer) if isinstance(answer, bytes) else 0
        unread.begin(self, self._seconds(answer), CROWDED_S, self._cancel, NOTHING_READ, weight)
        if not self._context.add_callback(lambda: unread.over(self)):
            unread.over(self)

    def _over(self) -> None:
        self._waits.over(self)

    def _seconds(self, answer: Any) -> float:
        return self._idle_s + (len(answer) / _SLOWEST if isinstance(answer, bytes) else 0)

    def end(self, error: ServerError) -> None:
        """Ends the call with this status, from any thread. A call of one answer ends as CANCELLED."""
        if self.ended:
            return
        self.ended = True
        if self._send is None:
            self._context.cancel()
            return
        set_status(self._context, error)
        self.finish()
        # It waits behind the values that the caller does not read. After as long again, the call ends without it.
        self._waits.begin(self, self._idle_s, CROWDED_S, self._cancel, NOTHING_READ)
        if not self.on_end(self._over):
            self._over()

    def _cancel(self, error: ServerError) -> None:
        self._context.cancel()


def set_status(context: Any, error: ServerError, trailing: Mapping[str, str | bytes] = MappingProxyType({})) -> str:
    """Gives the call the status of an error, with when to call again; returns the message, which fits in a header."""
    message, sent = message_of(error), dict(trailing)
    if isinstance(error, Overloaded) and error.retry_after_ms is not None:
        sent["grpc-retry-pushback-ms"] = str(error.retry_after_ms)
    context.set_trailing_metadata(tuple(sent.items()))
    context.set_code(grpc.StatusCode[error.status])
    context.set_details(message)
    return message


def abort(context: Any, error: ServerError, trailing: Mapping[str, str | bytes] = MappingProxyType({})) -> NoReturn:
    """Ends the call with the status of an error, by an exception that grpcio knows."""
    context.abort(grpc.StatusCode[error.status], set_status(context, error, trailing))
    raise AssertionError  # abort has raised


def _refusal(error: ServerError) -> Any:
    def refuse(requests: Any, context: Any) -> NoReturn:
        abort(context, error)

    refuse.experimental_thread_pool = AT_ONCE  # type: ignore[attr-defined]
    return grpc.stream_unary_rpc_method_handler(refuse)


def _only(requests: Iterator[Any]) -> Any:
    for request in requests:
        return request
    raise Unimplemented(_NO_REQUEST)


def _parsed(handler: Any, data: bytes) -> Any:
    if not handler.request_deserializer:
        return data
    try:
        return handler.request_deserializer(data)
    except DecodeError:
        raise InvalidInput("the request cannot be parsed") from None

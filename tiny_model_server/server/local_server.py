"""The server's end of the short cut on one host (``lane.py`` has its rules): one thread serves all callers."""

import json
import logging
import math
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from tiny_model_server import local_transport, schemas
from tiny_model_server.budget import Budget
from tiny_model_server.engine.batcher import Batcher, Seat, resolve
from tiny_model_server.engine.busy_polling import Waiter
from tiny_model_server.engine.engine import LATER, Call, Engine, WouldWait
from tiny_model_server.engine.worker_connection import Incomplete
from tiny_model_server.errors import CODES, ServerError, Stopping, Unimplemented, message_of
from tiny_model_server.shared_memory import SharedBuffers, sealed

log = logging.getLogger("tiny_model_server.lane")

_LONGEST_HELLO = 1 << 16
_HANDSHAKE_S = 2.0
_NO_DEADLINE_S = 1e9
if hasattr(select, "epoll"):  # as everywhere that ``lane.available()``
    _GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
    _COMING = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_WITHOUT_WAITING = {"RunText", "RunImage", "Run", "RunImageToImage"}
"""Methods whose handlers answer later; all others are called in threads."""


class LocalServer:
    """Answers the handlers' unary methods on the abstract unix socket of a gRPC port."""

    def __init__(
        self, engine: Engine, handlers: Mapping[str, Callable[[Any, Call], Any]], port: int, name: str
    ) -> None:
        """Binds the socket; OSError if another has the name."""
        self._engine = engine
        self._handlers = {
            method.path.encode(): (method, handlers[key], key in _WITHOUT_WAITING)
            for key, method in schemas.methods("server", "server.Server").items()
            if method.kind == "unary_unary"
        }
        self._largest = engine.settings.max_message_mb << 20
        self._name = name.encode()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(local_transport.address(port))
        self._socket.listen(128)
        self._epoll, self._workers = select.epoll(), select.epoll()
        self._epoll.register(self._workers, select.EPOLLIN)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._for_worker, self._for_caller = Waiter(self._epoll.poll), Waiter(self._epoll.poll)
        self._connections: set[_Connection] = set()
        self._callers: dict[int, _Connection] = {}  # by descriptor, after the greeting
        self._driven: dict[int, tuple[Seat, Batcher]] = {}
        self._watched: dict[int, Seat] = {}  # by descriptor, until its worker ends; some are driven by others now
        self._todo: deque[Callable[[], None]] = deque()
        self._thread = threading.Thread(target=self._loop, name="lane", daemon=True)
        self._threads = ThreadPoolExecutor(engine.settings.threads, thread_name_prefix="lane")
        self._stopping = False

    def start(self) -> None:
        """Accepts callers."""
        self._thread.start()
        threading.Thread(target=self._accept, name="lane-accept", daemon=True).start()

    def stop(self, grace_s: float) -> None:
        """Accepts no more calls, waits for those that are under way, and ends all connections."""
        self._stopping = True
        self._socket.shutdown(socket.SHUT_RDWR)  # which also ends a waiting accept
        self._socket.close()
        deadline = time.monotonic() + grace_s
        while any(one.busy for one in list(self._connections)) and time.monotonic() < deadline:
            time.sleep(0.01)
        for connection in list(self._connections):
            connection.hang_up()

    def authenticate(self, metadata: Mapping[str, str]) -> None:
        """Unauthenticated unless the caller has the server's token, if there is one."""
        self._engine.authenticate(metadata)

    def soon(self, do: Callable[[], None]) -> None:
        """Does something in the loop's thread."""
        self._todo.append(do)
        if threading.get_ident() != self._thread.ident:
            os.eventfd_write(self._bell, 1)

    def drive(self, seat: Seat, batcher: Batcher) -> None:
        """Finishes what a borrowed worker was given, and gives it more while there is more; for the loop's thread."""
        fd = seat.fileno()
        if self._watched.get(fd) is not seat:
            try:
                self._workers.register(fd, select.EPOLLIN)
            except OSError:  # the system watches no more
                return batcher.abandon(seat)
            self._watched[fd] = seat
        self._driven[fd] = seat, batcher

    def reply(self, connection: "_Connection", make: Callable[[], Any]) -> None:
        """Answers with what ``make`` returns or raises; for the loop's thread."""
        if answer := self._made(make):
            self._send(connection, *answer)

    def _accept(self) -> None:
        while not self._stopping:
            try:
                accepted, _ = self._socket.accept()
            except OSError:  # closed by stop, or no descriptor is free
                time.sleep(0.05)
                continue
            if not local_transport.same_user(accepted) or len(self._connections) >= self._engine.settings.threads:
                accepted.close()
                continue
            self._admit(_Connection(self, accepted))

    def _admit(self, connection: "_Connection") -> None:
        self._connections.add(connection)
        threading.Thread(target=self._greet, args=(connection,), name="lane-greet", daemon=True).start()

    def _greet(self, connection: "_Connection") -> None:
        try:
            connection.greet(self._name)
            self._callers[connection.fd] = connection
            self._epoll.register(connection.fd, _COMING)
        except (OSError, ValueError, RecursionError, struct.error):  # the caller has gone, or speaks another language
            self._callers.pop(connection.fd, None)
            self._connections.discard(connection)
            connection.close()

    def _loop(self) -> None:
        while True:
            limit = min([seat.limit for seat, _ in self._driven.values()], default=math.inf)
            events = self._wait()(None if limit == math.inf else max(0.0, limit - time.monotonic()))
            for fd, event in events:
                self._do(partial(self._on_event, fd, event))
                while self._todo:
                    self._do(self._todo.popleft())
            if limit < time.monotonic():
                self._leave_late()

    def _wait(self) -> Callable[[float | None], Any]:
        """How to wait: awake for one worker or the next call of a quick model, not where cores have enough to do."""
        if len(self._driven) == 1:
            return self._for_worker.wait
        return self._epoll.poll if self._driven or not self._for_worker.pays else self._for_caller.wait

    def _do(self, do: Callable[[], None]) -> None:
        try:
            do()
            if self._driven:
                self._on_workers()
        except Exception:  # of one call; the others go on
            log.exception("a fault in the server")

    def _on_event(self, fd: int, event: int) -> None:
        if fd in self._callers:
            self._on_caller(self._callers[fd], event)
        elif fd == self._workers.fileno():
            self._on_workers()
        elif fd == self._bell:
            os.eventfd_read(fd)

    def _on_workers(self) -> None:
        """Gives workers that are done new work, which goes before all else: an idle worker is time lost to all."""
        for fd, _ in self._workers.poll(0):
            if fd in self._driven:
                self._on_worker(fd)
            elif self._watched.pop(fd, None):
                with suppress(OSError):  # its end was faster
                    self._workers.unregister(fd)

    def _on_worker(self, fd: int) -> None:
        seat, batcher = self._driven[fd]
        try:
            finished = seat.finish(ready=True)
        except Incomplete:  # its own thread can wait for the rest
            del self._driven[fd]
            return batcher.abandon(seat)
        if batch := batcher.more(seat):
            seat.begin(batch)
        else:
            del self._driven[fd]
        resolve(finished)  # while the worker is busy again

    def _leave_late(self) -> None:
        """Leaves workers that take too long to their own threads, which can wait for what comes of it."""
        for fd, (seat, batcher) in list(self._driven.items()):
            if seat.limit <= time.monotonic():
                del self._driven[fd]
                batcher.abandon(seat)

    def _on_caller(self, connection: "_Connection", event: int) -> None:
        try:
            if event & _GONE:
                raise ConnectionError
            if event & select.EPOLLOUT and connection.flush():
                self._epoll.modify(connection.fd, _COMING)
            connection.unread |= bool(event & select.EPOLLIN)
            while connection.unread and not connection.busy and not connection.gone:
                self._begin(connection, *connection.next_call(self._largest, self._engine.inflight))
        except BlockingIOError:
            pass  # the rest comes with another event
        except (OSError, ValueError, struct.error):
            self._end(connection)

    def _begin(
        self, connection: "_Connection", path: bytes, message: bytes, call: Call, refusal: ServerError | None
    ) -> None:
        connection.busy = True
        method, handler, at_once = self._handlers.get(path, (None, None, True))

        def make() -> Any:
            if self._stopping:
                raise Stopping("the server is stopping")
            if refusal:
                raise refusal
            self._engine.authenticate(call.metadata)
            if not method or not handler:
                raise Unimplemented("there is no such method")
            return handler(schemas.parse(method, message, call, self._engine.settings.max_items), call)

        if at_once:
            call.loop = connection
            try:
                return self.reply(connection, make)
            except WouldWait:
                call.loop = None

        def make_and_send() -> None:
            answer = self._made(make)
            self.soon(lambda: self._send(connection, *answer) if answer else None)

        self._threads.submit(make_and_send)

    def _made(self, make: Callable[[], Any]) -> tuple[int, bytes] | None:
        """(status, message or error) that comes of a handler; None if it comes later."""
        try:
            answer = make()
            if answer is LATER:
                return None
            return 0, schemas.serialized(answer, self._largest)
        except WouldWait:
            raise
        except ServerError as error:
            final = local_transport.FINAL if getattr(error, "retry_after_ms", None) == -1 else 0
            return CODES[error.status] | final, message_of(error).encode()
        except Exception as error:
            log.exception("a call failed")
            return CODES["INTERNAL"], f"a fault in the server: {message_of(error, named=True)}".encode()

    def _send(self, connection: "_Connection", code: int, body: bytes) -> None:
        if connection.gone:
            return
        try:
            if not connection.answer(code, body):
                self._epoll.modify(connection.fd, _COMING | select.EPOLLOUT)
            elif connection.unread:
                self._on_caller(connection, select.EPOLLIN)
        except OSError:
            self._end(connection)

    def _end(self, connection: "_Connection") -> None:
        if not connection.gone:
            del self._callers[connection.fd]
            self._connections.discard(connection)
            self._epoll.unregister(connection.fd)
            connection.close()


class _Connection:
    """A caller: what it sends and gets, and the memory that it shares. But for the greeting, for the loop's thread."""

    def __init__(self, server: LocalServer, accepted: socket.socket) -> None:
        self._server = server
        self._socket = accepted
        self.fd = accepted.fileno()
        self.busy = False
        """True from a request to the end of its answer."""
        self.unread = False
        """True if there may be something to read of which no event will tell again."""
        self.gone = False
        """True after its end."""
        self._metadata: dict[str, str] = {}
        self._buffers: SharedBuffers | None = None
        self._renewing = False
        self._data: bytes | bytearray = b""
        self._skipped = 0
        """Bytes of a refused request that were read and dropped."""
        self._budget: Budget | None = None
        self._counted = 0
        """Bytes of the request that count as under way."""
        self._refusal: ServerError | None = None
        self._unsent: bytes | memoryview = b""
        self._cancel: Callable[[], None] | None = None

    def greet(self, name: bytes) -> None:
        """Hears the caller's metadata and hands the memory over; ValueError if that is no greeting."""
        self._socket.settimeout(_HANDSHAKE_S)
        header, lent, *_ = socket.recv_fds(self._socket, local_transport.HELLO.size, 1)
        self._buffers = SharedBuffers(lent[0], caller_owned=True) if lent else SharedBuffers()
        if lent and not sealed(self._buffers.request):
            raise ValueError("that memory may shrink")
        size = local_transport.HELLO.unpack(header)[0]
        if size > _LONGEST_HELLO:
            raise ValueError("that is no greeting")
        metadata = json.loads(local_transport.receive(self._socket, size))
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("that is no metadata")
        self._metadata = metadata
        fds = [self._buffers.request, self._buffers.response]
        socket.send_fds(self._socket, [local_transport.HELLO.pack(len(name))], fds)
        self._socket.sendall(name)
        self._socket.setblocking(False)

    def next_call(self, largest: int, budget: Budget) -> tuple[bytes, bytes, Call, ServerError | None]:
        """(path, message, call, why it is refused) of the next request; BlockingIOError if it is not all there yet.

        ConnectionError when the caller has left, ValueError if the request is too large.
        """
        if self._renewing:
            self._receive(len(local_transport.READY))
            assert self._buffers
            socket.send_fds(self._socket, [local_transport.READY], [self._buffers.request])
            self._renewing = False
        self._data = self._data or self._receive(1 << 16)
        while (missing := self._missing(largest)) > 0:
            if missing > local_transport.AT_ONCE and not self._counted and not self._refusal:
                self._count(missing, budget)
            received = self._receive(min(missing, 1 << 20))
            if self._refusal:
                self._skipped += len(received)
                continue
            if isinstance(self._data, bytes):
                self._data = bytearray(self._data)  # to which is added without copying it again
            self._data += received
        if missing:
            raise ValueError("one call at a time")
        data, self._data = bytes(self._data), b""
        refusal, self._refusal, self._skipped = self._refusal, None, 0
        _, seconds, repeatable, path_size = local_transport.REQUEST.unpack_from(data)
        deadline = time.monotonic() + seconds if seconds < _NO_DEADLINE_S else None
        memory: dict[str, Any] = {"lane": self._buffers, "largest": largest}
        call = Call(deadline, "unix:", self._metadata, self._on_end, bool(repeatable), **memory)
        begin = local_transport.REQUEST.size + path_size
        return data[local_transport.REQUEST.size : begin], data[begin:], call, refusal

    def _count(self, size: int, budget: Budget) -> None:
        """Counts the bytes of a large message before they are read; small ones come in bounded numbers.

        Of a caller without the server's token, nothing is counted or kept.
        """
        try:
            self._server.authenticate(self._metadata)
            budget.take(size)
        except ServerError as error:
            self._refusal = error
        else:
            self._budget, self._counted = budget, size

    def _uncount(self) -> None:
        if self._budget:
            self._budget.give(self._counted)
            self._budget, self._counted = None, 0

    def _missing(self, largest: int) -> int:
        """How many bytes of the request must still come, as far as that is known; below 0 if there are too many."""
        if len(self._data) < local_transport.REQUEST.size:
            return local_transport.REQUEST.size - len(self._data)
        size, *_, path_size = local_transport.REQUEST.unpack_from(self._data)
        if size > largest:
            raise ValueError("that is too large; gRPC says so in words")
        return int(local_transport.REQUEST.size + path_size + size) - len(self._data) - self._skipped

    def _receive(self, most: int) -> bytes:
        self.unread = False
        data = self._socket.recv(most)
        self.unread = len(data) == most
        if not data:
            raise ConnectionError("the caller has left")
        return data

    def answer(self, code: int, body: bytes) -> bool:
        """Sends an answer, with new memory if a model keeps the old; False if not all could be sent yet."""
        self._cancel = None  # which knows the call's item, and that this connection
        self._uncount()
        old = self._buffers
        renewed = old is not None and old.retained and not old.caller_owned
        self._unsent = local_transport.ANSWER.pack(len(body), code, renewed) + body
        if old and renewed:
            self._buffers, self._renewing = old.renewed(), True
            old.close()
        return self.flush()

    def flush(self) -> bool:
        """Sends what is left of the answer; False if not all could be sent yet."""
        with suppress(BlockingIOError):
            sent = self._socket.send(self._unsent)
            self._unsent = memoryview(self._unsent)[sent:] if sent < len(self._unsent) else b""
        self.busy = bool(self._unsent)
        return not self.busy

    def later(self, answer: Callable[[], Any]) -> None:
        """Hears that the call is over."""
        self._server.soon(partial(self._server.reply, self, answer))

    def drive(self, seat: Seat, batcher: Batcher) -> None:
        """Takes care of a borrowed worker."""
        self._server.drive(seat, batcher)

    def hang_up(self) -> None:
        """Ends the connection from another thread."""
        with suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection and cancels its call; its memory goes when no worker uses it."""
        self.gone = True
        cancel, self._cancel = self._cancel, None
        self._socket.close()
        self._uncount()
        if self._buffers:
            self._buffers.close()
        if cancel:
            cancel()

    def _on_end(self, cancel: Callable[[], None]) -> bool:
        self._cancel = cancel
        return not self.gone

"""The server's end of the short cut on one host (``lane.py`` has its rules): each connection has a thread."""

import json
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from tiny_model_server import lane, wire
from tiny_model_server.engine import Call, Engine
from tiny_model_server.errors import CODES, ServerError
from tiny_model_server.shm import Pair, Segment

log = logging.getLogger("tiny_model_server.lane")

_LONGEST_MESSAGE = 1000  # characters of an error
_LONGEST_HELLO = 1 << 16
_HANDSHAKE_S = 2.0
_NO_DEADLINE_S = 1e9


class LaneServer:
    """Answers the handlers' unary methods on the abstract unix socket of a gRPC port."""

    def __init__(
        self, engine: Engine, handlers: Mapping[str, Callable[[Any, Call], Any]], port: int, name: str
    ) -> None:
        """Binds the socket; OSError if another has the name."""
        self._engine = engine
        self._handlers = {
            method.path.encode(): (method, handlers[key])
            for key, method in wire.methods("server", "server.Server").items()
            if not method.server_streaming
        }
        self._name = name.encode()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(lane.address(port))
        self._socket.listen(128)
        self._hang_ups = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._stopping = False

    def start(self) -> None:
        """Accepts callers."""
        for target in (self._accept, self._watch):
            threading.Thread(target=target, name="lane", daemon=True).start()

    def stop(self, grace_s: float) -> None:
        """Accepts no more calls, waits for those that are under way, and ends all connections."""
        self._stopping = True
        self._socket.shutdown(socket.SHUT_RDWR)  # which also ends a waiting accept
        self._socket.close()
        deadline = time.monotonic() + grace_s
        while any(one.busy for one in list(self._connections.values())) and time.monotonic() < deadline:
            time.sleep(0.01)
        for connection in list(self._connections.values()):
            connection.hang_up()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                accepted, _ = self._socket.accept()
            except OSError:  # closed by stop, or no descriptor is free
                time.sleep(0.05)
                continue
            if not lane.same_user(accepted) or len(self._connections) >= self._engine.settings.threads:
                accepted.close()
                continue
            threading.Thread(target=self._serve, args=(_Connection(accepted),), name="lane", daemon=True).start()

    def _watch(self) -> None:
        """Cancels the calls of callers that hang up."""
        while True:
            for fd, _ in self._hang_ups.poll():
                if connection := self._connections.get(fd):
                    connection.gone()
                connection = None  # waiting here with it would keep its memory

    def _serve(self, connection: "_Connection") -> None:
        self._connections[connection.fd] = connection
        try:
            metadata = connection.greet(self._name)
            self._hang_ups.register(connection.fd, select.EPOLLRDHUP | select.EPOLLET)
            while request := connection.next_call(metadata, self._engine.settings.max_message_mb << 20):
                connection.busy = True
                connection.answer(*self._answer(*request))
                connection.busy = False
        except (OSError, ValueError, struct.error):
            pass  # the caller has gone, or speaks another language
        finally:
            self._connections.pop(connection.fd, None)
            connection.close()

    def _answer(self, path: bytes, message: bytes, call: Call) -> tuple[int, bytes]:
        try:
            if self._stopping:
                return CODES["UNAVAILABLE"], b"the server is stopping"
            self._engine.authenticate(call.metadata)
            if path not in self._handlers:
                return CODES["UNIMPLEMENTED"], b"there is no such method"
            method, handler = self._handlers[path]
            return 0, wire.respond(method, handler, message, call, self._engine.settings.max_message_mb << 20)
        except ServerError as error:
            final = lane.FINAL if getattr(error, "retry_after_ms", None) == -1 else 0
            return CODES[error.status] | final, str(error)[:_LONGEST_MESSAGE].encode()
        except Exception as error:
            log.exception("%s failed", path.decode())
            return CODES["INTERNAL"], f"a fault in the server: {type(error).__name__}: {error}".encode()


class _Shared(Pair):
    """The memory of one connection, given back when nobody needs it any more: caller, queue or worker."""

    def __del__(self) -> None:
        if not self.kept:
            self.outbox.discard()
            if not self.lent:
                self.inbox.discard()


class _Connection:
    def __init__(self, accepted: socket.socket) -> None:
        self._socket = accepted
        self.fd = accepted.fileno()
        self.busy = False
        self._pair: Pair = _Shared()
        self._lock = threading.Lock()
        self._cancel: Callable[[], None] | None = None
        self._gone = False

    def greet(self, name: bytes) -> dict[str, str]:
        """Hands the memory over; returns the caller's metadata. ValueError if that is none."""
        self._socket.settimeout(_HANDSHAKE_S)
        header, lent, *_ = socket.recv_fds(self._socket, lane.HELLO.size, 1)
        if lent:
            self._pair = _Shared(Segment(lent[0]), lent=True)
            if not self._pair.inbox.sealed():
                raise ValueError("that memory may shrink")
        size = lane.HELLO.unpack(header)[0]
        if size > _LONGEST_HELLO:
            raise ValueError("that is no greeting")
        metadata = json.loads(lane.receive(self._socket, size))
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("that is no metadata")
        fds = [self._pair.inbox.fd, self._pair.outbox.fd]
        socket.send_fds(self._socket, [lane.HELLO.pack(len(name))], fds)
        self._socket.sendall(name)
        self._socket.settimeout(None)
        return metadata

    def next_call(self, metadata: dict[str, str], largest: int) -> tuple[bytes, bytes, Call] | None:
        """(path, message, call) of the next request, None when the caller has left; ValueError if it is too large."""
        data = self._socket.recv(1 << 16)
        if len(data) < lane.REQUEST.size:
            return None
        size, seconds, repeatable, path_size = lane.REQUEST.unpack_from(data)
        if size > largest:
            raise ValueError("that is too large; gRPC says so in words")
        body, missing = data[lane.REQUEST.size :], size + path_size - (len(data) - lane.REQUEST.size)
        if missing > 0:
            body += lane.receive(self._socket, missing)
        with self._lock:
            self._cancel = None
        deadline = time.monotonic() + seconds if seconds < _NO_DEADLINE_S else None
        call = Call(deadline, "unix:", metadata, self._on_end, bool(repeatable), lane=self._pair)
        return body[:path_size], body[path_size:], call

    def answer(self, code: int, body: bytes) -> None:
        """Sends an answer, with new memory if a model keeps the old."""
        renewed = self._pair.kept and not self._pair.lent
        self._socket.sendall(lane.ANSWER.pack(len(body), code, renewed) + body)
        if renewed:
            self._pair = _Shared(Segment(), self._pair.outbox)
            lane.receive(self._socket, len(lane.READY))
            socket.send_fds(self._socket, [lane.READY], [self._pair.inbox.fd])

    def gone(self) -> None:
        """Cancels the call, if the caller has indeed hung up."""
        try:
            if self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        with self._lock:
            self._gone, cancel = True, self._cancel
        if cancel:
            cancel()

    def hang_up(self) -> None:
        """Ends the connection from another thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended

    def close(self) -> None:
        """Ends the connection; its memory goes with the last who needs it."""
        self._cancel = None  # which knows the call's item, and that this connection
        self._socket.close()

    def _on_end(self, cancel: Callable[[], None]) -> bool:
        with self._lock:
            self._cancel = cancel
            return not self._gone

"""The server's end of the local transport (``local_transport.py`` has its rules), on the engine's loop."""

import asyncio
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from tiny_model_server import local_transport, request_ids, schemas
from tiny_model_server.codec import Encoded
from tiny_model_server.engine.call import Call, Run
from tiny_model_server.engine.engine import Engine
from tiny_model_server.errors import CODES, Cancelled, ServerError, Stopping, Unimplemented, message_of
from tiny_model_server.local_transport import ANSWER, AT_ONCE, FINAL, HELLO, READY, REQUEST
from tiny_model_server.protocols import native
from tiny_model_server.shared_memory import SharedBuffers, sealed

_Handler = Callable[[Any, Call], Any]

log = logging.getLogger("tiny_model_server.local")

_LONGEST_HELLO = 1 << 16
_HANDSHAKE_S = 2.0
_NO_DEADLINE_S = 1e9
_READ = 1 << 16
_LOOK_S = 0.01
_ACCEPT_AGAIN_S = 0.05  # after an error, as when no descriptor is free


class LocalServer:
    """Answers the native protocol's unary methods on the abstract unix socket of a gRPC port."""

    def __init__(self, engine: Engine, port: int, name: str) -> None:
        """Binds the socket; OSError if another has the name."""
        self.engine = engine
        handlers, converters = native.handlers(engine), native.converters()
        self.methods = {
            method.path.encode(): (method, handlers[key], converters.get(key))
            for key, method in schemas.methods(native.SCHEMA, native.SERVICE).items()
            if method.kind == "unary_unary"
        }
        self.largest = engine.settings.max_message_mb << 20
        self.name = name.encode()
        self.stopping = False
        self.connections: set[_Connection] = set()
        self.threads = ThreadPoolExecutor(engine.settings.threads, thread_name_prefix="local")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(local_transport.address(port))
        self._socket.listen(128)
        self._socket.setblocking(False)

    def start(self) -> None:
        """Accepts callers; for the loop."""
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(self._socket, self._accept)

    async def stop(self, grace_s: float) -> None:
        """Accepts no more calls, waits for those that are under way, and ends all connections."""
        self.stopping = True
        self.loop.remove_reader(self._socket)
        self._socket.close()
        deadline = time.monotonic() + grace_s
        while any(connection.busy for connection in self.connections) and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
        for connection in list(self.connections):
            connection.close()
        self.threads.shutdown(wait=False)

    def _accept(self) -> None:
        try:
            accepted, _ = self._socket.accept()
        except OSError:
            self.loop.remove_reader(self._socket)
            self.loop.call_later(_ACCEPT_AGAIN_S, self._accept_again)
            return
        if not local_transport.same_user(accepted) or len(self.connections) >= self.engine.settings.threads:
            return accepted.close()
        self.connections.add(_Connection(self, accepted))

    def _accept_again(self) -> None:
        if not self.stopping:
            self.loop.add_reader(self._socket, self._accept)


class _Connection:
    """A caller: what it sends and receives, and the memory that it shares."""

    def __init__(self, server: LocalServer, accepted: socket.socket) -> None:
        self.busy = False
        """True from a request to the end of its answer."""
        self._server, self._engine, self._loop = server, server.engine, server.loop
        self._socket = accepted
        self._open = True
        self._metadata: Mapping[str, str] | None = None  # None until the caller has greeted
        self._buffers: SharedBuffers | None = None
        self._renewing = False
        self._received = bytearray()
        self._skipped = 0  # bytes of a refused request that were received and dropped
        self._counted = 0  # bytes of the request that count as under way
        self._refusal: ServerError | None = None
        self._call, self._path = Call(), b""
        self._unsent = memoryview(b"")
        self._writing = False  # whether the loop reports that more can be sent
        self._cancel: Callable[[], None] | None = None
        accepted.setblocking(False)
        self._loop.add_reader(accepted, self._on_readable)
        self._greeting = self._loop.call_later(_HANDSHAKE_S, self.close)

    def close(self) -> None:
        """Ends the connection and cancels its call. Its memory is freed when no worker uses it."""
        if not self._open:
            return
        self._open = False
        self._greeting.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._server.connections.discard(self)
        self._uncount()
        if self._cancel:
            self._cancel()
        if self._buffers:
            self._buffers.close()

    def _on_readable(self) -> None:
        try:
            if self._buffers is None:
                self._share_memory()
            elif self._renewing:
                self._send_new_memory()
            else:
                self._receive()
        except BlockingIOError:
            pass
        except (OSError, ValueError, RecursionError, struct.error):  # it has left, or does not keep to the rules
            self.close()
        except Exception:  # of one caller; the others are served
            log.exception("a connection failed")
            self.close()

    def _share_memory(self) -> None:
        header, fds, flags, _ = socket.recv_fds(self._socket, HELLO.size, 1)
        if flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise OSError("no descriptor is free for the caller's own memory")
        self._buffers = SharedBuffers(fds[0], caller_owned=True) if fds else SharedBuffers()
        if fds and not sealed(self._buffers.request):
            raise ValueError("that memory may shrink")
        self._received += header

    def _send_new_memory(self) -> None:
        assert self._buffers
        if self._socket.recv(len(READY)) != READY:
            raise ConnectionError("the caller has left")
        socket.send_fds(self._socket, [READY], [self._buffers.request])
        self._renewing = False

    def _receive(self) -> None:
        data = self._socket.recv(_READ)
        if not data or self.busy:
            raise ConnectionError("the caller has left, or sends a second request")
        if self._refusal:
            self._skipped += len(data)
        else:
            self._received += data
        if self._metadata is None:
            return self._greet()
        missing = self._missing()
        if missing < 0:
            raise ValueError("one call at a time")
        if not missing:
            self._take_request()
        elif missing > AT_ONCE and not self._counted and not self._refusal:
            self._count(missing)

    def _greet(self) -> None:
        (size,) = HELLO.unpack_from(self._received)
        if size > _LONGEST_HELLO or len(self._received) > HELLO.size + size:
            raise ValueError("that is not a greeting")
        if len(self._received) < HELLO.size + size:
            return
        metadata = json.loads(self._received[HELLO.size :])
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("that is not metadata")
        self._greeting.cancel()
        self._metadata, self._received = metadata, bytearray()
        assert self._buffers
        name = self._server.name
        socket.send_fds(self._socket, [HELLO.pack(len(name))], [self._buffers.request, self._buffers.response])
        self._socket.sendall(name)

    def _missing(self) -> int:
        """How many bytes of the request must still come, as far as is known. Below 0 if there are too many."""
        if len(self._received) < REQUEST.size:
            return REQUEST.size - len(self._received)
        size, _, _, path_size = REQUEST.unpack_from(self._received)
        if size > self._server.largest:
            raise ValueError("that is too large; gRPC returns a clear error")
        return int(REQUEST.size + path_size + size) - len(self._received) - self._skipped

    def _count(self, size: int) -> None:
        """Counts the bytes of a large message before they are read; small ones come in bounded numbers.

        Nothing is counted or kept of a caller without the server's token.
        """
        try:
            self._engine.access.authenticate(self._metadata or {})
            self._engine.inflight.take(size)
            self._counted = size
        except ServerError as error:
            self._refusal = error

    def _uncount(self) -> None:
        if self._counted:
            self._engine.inflight.give(self._counted)
            self._counted = 0

    def _take_request(self) -> None:
        data, self._received = bytes(self._received), bytearray()
        refusal, self._refusal, self._skipped = self._refusal, None, 0
        _, seconds, repeatable, path_size = REQUEST.unpack_from(data)
        begin = REQUEST.size + path_size
        path, _, sent = data[REQUEST.size : begin].partition(b" ")
        call = self._call = Call(
            time.monotonic() + seconds if seconds < _NO_DEADLINE_S else None,
            "unix:",
            {**(self._metadata or {}), request_ids.HEADER: sent.decode(errors="replace")},
            self._on_end,
            bool(repeatable),
            buffers=self._buffers,
            largest=self._server.largest,
        )
        self.busy, self._path = True, path
        try:
            self._begin(path, data[begin:], call, refusal)
        except Exception as error:
            self._fail(error)

    def _begin(self, path: bytes, message: bytes, call: Call, refusal: ServerError | None) -> None:
        if self._server.stopping:
            raise Stopping("the server is stopping")
        if refusal:
            raise refusal
        self._engine.access.authenticate(call.metadata)
        if path not in self._server.methods:
            raise Unimplemented("there is no such method")
        method, handler, convert = self._server.methods[path]
        if convert is None or len(message) > AT_ONCE:
            return self._in_thread(method, handler, message, call)
        work = convert(schemas.parse(method, message, call, self._engine.settings.max_items), call)
        if any(value.arrays and not value.shared for value in work.values):
            return self._in_thread(method, handler, message, call)
        args = self._engine.check_batch(work.values, work.args)
        response = self._buffers if len(work.values) == 1 else None
        done = partial(self._answer, work)
        run = Run(call.named(work.model), work.values, args, call, done, work.json_only, response)
        self._cancel = partial(run.cancel, Cancelled("the caller disconnected"))
        self._engine.begin(run)

    def _in_thread(
        self, method: schemas.Method, handler: Callable[[Any, Call], Any], message: bytes, call: Call
    ) -> None:
        """Answers a request that is large, or that waits for more than a model."""
        buffers, largest = call.buffers, self._server.largest
        assert buffers

        def work() -> bytes:
            request = schemas.parse(method, message, call, self._engine.settings.max_items)
            return schemas.serialized(handler(request, call), largest)

        def over() -> None:
            buffers.release()
            if error := future.exception():
                self._fail(error)
            else:
                self._send("OK", future.result())

        future = self._server.threads.submit(work)
        buffers.holders += 1  # only now: it may have failed
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(over))

    def _answer(self, work: native.Work, run: Run) -> None:
        try:
            if run.error:
                raise run.error
            body = schemas.serialized(work.answer(run.outcomes), self._server.largest)
        except Exception as error:
            return self._fail(error)
        placed = [one.arrays for one in run.outcomes if isinstance(one, Encoded) and one.shared]
        run.call.bytes_out = sum(array.nbytes for arrays in placed for array in arrays)
        self._send("OK", body)

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, ServerError):
            log.error("a call failed", exc_info=error, extra={"fields": {"request_id": self._call.id}})
            error = ServerError(f"a fault in the server: {message_of(error, named=True)}")
        final = FINAL if getattr(error, "retry_after_ms", None) == -1 else 0
        self._send(error.status, message_of(error).encode(), final)

    def _send(self, status: str, body: bytes, final: int = 0) -> None:
        self._send_answer(CODES[status] | final, body)
        self._call.bytes_in += self._call.placed
        self._call.bytes_out += len(body)
        self._call.log_access(self._path.decode(errors="replace"), status)

    def _send_answer(self, code: int, body: bytes) -> None:
        """Sends an answer, and announces new memory if a model retains the old."""
        if not self._open:
            return
        old, self._cancel = self._buffers, None
        assert old
        self._uncount()
        self._renewing = old.retained and not old.caller_owned
        if self._renewing:
            try:
                self._buffers = old.renewed()
            except OSError:  # there is no descriptor or memory for it; the caller goes on by gRPC
                return self.close()
            old.close()
        self._unsent = memoryview(ANSWER.pack(len(body), code, self._renewing) + body)
        self._flush()

    def _flush(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            return self.close()
        self._unsent = self._unsent[sent:]
        if bool(self._unsent) != self._writing:
            self._writing = not self._writing
            if self._writing:
                self._loop.add_writer(self._socket, self._flush)
            else:
                self._loop.remove_writer(self._socket)
        self.busy = self._writing

    def _on_end(self, cancel: Callable[[], None]) -> bool:
        self._cancel = cancel
        return self._open

"""Runs the HTTP port: uvicorn in a thread with a loop of its own, and bounds on connections, their silence and chunks.

A connection whose caller has not sent a whole request is the server's to end: after a time, or when there are too many.
"""

import asyncio
import errno
import logging
import resource
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from tiny_model_server.server import tls
from tiny_model_server.settings import Settings, SettingsError

log = logging.getLogger("tiny_model_server.http")

_BACKLOG = 1024
_HEADERS_S = 10.0  # time for a TLS handshake, and for a request's headers
_KEEP_ALIVE_S = 30
_UNSENT_S = 1.0  # time that a request has to arrive once the server stops
_READ_S, _READ_BYTES = 30.0, 1 << 16  # a caller reads so many bytes of its answer in this time, or is cut off
_LONGEST_HEADERS, _MOST_HEADERS = 1 << 15, 100
_MANY_CHUNKS, _SMALL_CHUNK = 10_000, 256  # more chunks must have so many bytes on average
_MOST_CONNECTIONS = 1024
_MALFORMED = b"""HTTP/1.1 400 Bad Request\r
Connection: close\r
Content-Type: application/json\r
Content-Length: 38\r
\r
{"error": "the request is malformed"}
"""
_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


class HttpServer:
    """An ASGI application at TMS_HTTP_PORT."""

    def __init__(self, app: Any, settings: Settings, most_unread: int) -> None:
        """Binds the port; SettingsError if it cannot be had.

        If callers leave more than ``most_unread`` bytes of answers unread, those who do so for longest are cut off.
        """
        files = tls.Files.of(settings)
        try:
            listeners = _listen(settings.host.strip("[]"), settings.http_port or 0)
        except OSError as error:
            raise SettingsError(
                f"TMS_HTTP_PORT={settings.http_port} cannot be listened on: {error.strerror}; "
                "choose another, 0 for a free one, or off"
            ) from None
        self.port: int = listeners[0].getsockname()[1]
        config = uvicorn.Config(
            app,
            interface="asgi3",
            loop="asyncio",
            ws="none",
            lifespan="off",
            workers=1,
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,  # what a caller says of itself is not believed
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            h11_max_incomplete_event_size=_LONGEST_HEADERS,
        )
        self._server = _Server(config, listeners, files, most_unread)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Answers requests, in a thread."""
        self._thread.start()
        self._server.ready.wait()

    def _run(self) -> None:
        try:
            self._server.run()
        finally:
            self._server.ready.set()

    def stop(self, grace_s: float) -> None:
        """Accepts no more requests, and lets those that are under way finish in this time. Called again, it hurries."""
        self._server.stop(grace_s)

    def join(self, timeout_s: float) -> None:
        """Waits until the port is closed and all requests have ended, or for so many seconds."""
        self._thread.join(timeout_s)


class _Server(uvicorn.Server):
    """Uvicorn, but for how it accepts connections and waits for its end: it would poll, and bound neither."""

    def __init__(
        self, config: uvicorn.Config, listeners: list[socket.socket], files: tls.Files | None, most_unread: int
    ) -> None:
        super().__init__(config)
        self.ready = threading.Event()
        """Set when connections are accepted."""
        self.servers = []  # the listeners stand for them
        self._listeners = listeners
        self._files = files
        self._most = _most_connections()
        self._unread = _Unread(most_unread)
        self._open: dict[asyncio.Task[None], _Connection] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self.started = True

    async def main_loop(self) -> None:
        accepting = [asyncio.create_task(self._accept(listener)) for listener in self._listeners]
        self.ready.set()
        try:
            await self._stopping.wait()
        finally:
            for task in accepting:
                task.cancel()
            await asyncio.gather(*accepting, return_exceptions=True)
            for listener in self._listeners:
                listener.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop.call_later(_UNSENT_S, self._drop_unsent)
        await super().shutdown()
        if self.server_state.tasks:  # cancelled, and still to say so to their callers
            await asyncio.wait(self.server_state.tasks, timeout=_UNSENT_S)
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, *self._leaving, return_exceptions=True)

    def stop(self, grace_s: float) -> None:
        """Ends the main loop, from any thread; the second time, it does not wait for requests."""

        def end() -> None:
            self.force_exit = self._stopping.is_set()
            self.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # parts of a second do as well
            self._stopping.set()

        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(end)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = await self._loop.sock_accept(listener)
            except OSError as error:  # no descriptor or memory is free; the caller waits in the backlog
                log.warning("no connection can be accepted: %s", error.strerror)
                await asyncio.sleep(1)
                continue
            if not self._make_room():
                with suppress(OSError):
                    accepted.send(_REFUSAL if not self._files else b"")
                accepted.close()
                continue
            connection = _Connection(self.config, self.server_state, self._loop, self._unread)
            task = asyncio.create_task(self._serve_one(accepted, connection))
            self._open[task] = connection
            task.add_done_callback(self._forget)

    async def _serve_one(self, accepted: socket.socket, connection: "_Connection") -> None:
        context = self._files.context() if self._files else None
        limit = _HEADERS_S if context else None
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=context, ssl_handshake_timeout=limit
            )
            await connection.closed.wait()
        except OSError as error:
            log.debug("a connection failed: %s", error)
        finally:
            if connection.transport:
                connection.transport.abort()

    def _make_room(self) -> bool:
        """Ends the connection that has waited for longest for a whole request, if there are too many."""
        if len(self._open) < self._most:
            return True
        unsent = [(one.since, task) for task, one in self._open.items() if one.unsent]
        if unsent:
            self._drop(min(unsent, key=lambda pair: pair[0])[1])
        return bool(unsent)

    def _drop_unsent(self) -> None:
        for task in [task for task, one in self._open.items() if one.unsent]:
            self._drop(task)

    def _drop(self, task: asyncio.Task[None]) -> None:
        del self._open[task]
        self._leaving.add(task)
        task.cancel()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._open.pop(task, None)
        self._leaving.discard(task)


class _Unread:
    """The connections whose callers have not read their answers yet, and a bound on the bytes of these."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._connections: dict[_Connection, None] = {}  # who waits for longest comes first

    def add(self, connection: "_Connection") -> None:
        """Counts a connection, and ends those before it as far as all have too many bytes."""
        self._connections[connection] = None
        over = sum(one.transport.get_write_buffer_size() for one in self._connections) - self._most
        for one in list(self._connections)[:-1]:
            if over <= 0:
                return
            over -= one.transport.get_write_buffer_size()
            self.remove(one)
            log.warning("a connection is ended: too many bytes of answers wait for their callers")
            one.transport.abort()

    def remove(self, connection: "_Connection") -> None:
        """Forgets a connection."""
        self._connections.pop(connection, None)


class _Connection(H11Protocol):
    """A caller's connection, which bounds the time for headers and for reading an answer."""

    def __init__(self, config: uvicorn.Config, state: ServerState, loop: Any, unread: _Unread) -> None:
        super().__init__(config, state, {}, loop)
        self.conn = _Parser(h11.SERVER, _LONGEST_HEADERS)
        self.closed = asyncio.Event()
        self.since = time.monotonic()
        """When it began to wait for a request."""
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None
        self._unread = 0
        self._all_unread = unread

    @property
    def unsent(self) -> bool:
        """True while the caller has not sent a whole request."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._all_unread.remove(self)
        for timer in (self._headers_due, self._reading_due, self.timeout_keep_alive_task):
            if timer:
                timer.cancel()
        self.closed.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = 1 << 63
        self._watch_reading()
        self._all_unread.add(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._all_unread.remove(self)
        if self._reading_due:
            self._reading_due.cancel()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is under way already
            self.transport.write(_MALFORMED)
        self.transport.close()

    def _watch_headers(self) -> None:
        """Begins the time for a request's headers unless one is in work, and ends it if so."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._headers_due:
                self._headers_due.cancel()
            self._headers_due = None
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(_HEADERS_S, self.transport.abort)

    def _watch_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread > self._unread - _READ_BYTES:
            return self.transport.abort()
        self._unread = unread
        self._reading_due = self.loop.call_later(_READ_S, self._watch_reading)


class _Parser(h11.Connection):
    """Refuses long headers also if they came at once, and bodies in tiny chunks, each of which costs time."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
            size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
            if size > _LONGEST_HEADERS or len(event.headers) > _MOST_HEADERS:
                raise h11.RemoteProtocolError("the headers are too long")
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_end
            self._bytes += len(event.data)
            if self._chunks > _MANY_CHUNKS and self._bytes < self._chunks * _SMALL_CHUNK:
                raise h11.RemoteProtocolError("the chunks are too small")
        return event


def _listen(host: str, port: int) -> list[socket.socket]:
    """A listening socket for each address of a host, all with one port; one of both families for "::"."""
    both = host == "::" and socket.has_dualstack_ipv6()
    if host == "::" and not both:  # as gRPC does where there is no IPv6
        host = "0.0.0.0"
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    missing: OSError | None = None
    for family, address in dict.fromkeys((one[0], one[4][0]) for one in found):
        where = address, listeners[0].getsockname()[1] if listeners else port
        try:
            listeners.append(socket.create_server(where, family=family, backlog=_BACKLOG, dualstack_ipv6=both))
            # Connections inherit it. asyncio does not set it on them, and without it answers wait 40 ms for an ACK.
            listeners[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listeners[-1].setblocking(False)
        except OSError as error:
            missing = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # of a family that this host lacks
                listeners = []
                break
    if missing and not listeners:
        raise missing
    return listeners


def _most_connections() -> int:
    """A quarter of the descriptors that the process may have: the rest is for gRPC and the workers."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(_MOST_CONNECTIONS, soft // 4))

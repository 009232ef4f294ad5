"""Runs the HTTP port: uvicorn in a thread with an event loop of its own, and limits on what connections may cost.

uvicorn closes a connection that sends no request. This file limits the time for headers and TLS handshakes, the number
of connections, the bytes of answers that callers do not read, and the work that one request makes for the parser.
"""

import asyncio
import logging
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tiny_model_server.engine import placement
from tiny_model_server.server import tls
from tiny_model_server.settings import Settings, SettingsError

log = logging.getLogger("tiny_model_server.http")

_BACKLOG = 1024
_HEADERS_S = 10  # for a TLS handshake; and for a request's headers, from the connection or the last answer on
_UNFINISHED_S = 1.0  # time that a request has to arrive once the server stops
_MAX_HEADER_BYTES = 1 << 15
_FREE_CHUNKS, _MIN_CHUNK_BYTES = 10_000, 256  # a body with more chunks must have so many bytes for each
_MAX_CONNECTIONS = 1024


class HttpServer(uvicorn.Server):
    """An ASGI application at TMS_HTTP_PORT."""

    def __init__(self, app: Any, settings: Settings, max_unread: int) -> None:
        """Binds the port; SettingsError if another process has it, or if the TLS files cannot be used.

        Callers may leave at most ``max_unread`` bytes of answers unread.
        """
        # A quarter of the descriptors that the process may have: the rest is for gRPC and the workers.
        self._max_connections = max(16, min(_MAX_CONNECTIONS, placement.descriptors() // 4))
        self._max_unread = max_unread
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,  # a caller could write anything into them
            limit_concurrency=self._max_connections + 1,  # the connection above the limit is answered with 503
            timeout_keep_alive=_HEADERS_S,
        )
        super().__init__(config)
        self._files = tls.Files.of(settings)
        self._listener = _listen(settings)
        self.port: int = self._listener.getsockname()[1]
        self._open: dict[_Connection, asyncio.Task[None]] = {}
        self._loop, self._stopping = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Answers requests, in a thread."""
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Accepts no more requests and gives those in work this time to finish. A second call ends them at once."""

        def end() -> None:
            self.force_exit = self._stopping.is_set()
            self.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # a float works as well
            self._stopping.set()

        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(end)

    def join(self, timeout_s: float) -> None:
        """Waits at most this time until the port is closed and all requests have ended."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self.serve(sockets=[]))  # uvicorn itself would accept connections without a limit

    async def main_loop(self) -> None:
        """Accepts connections until the stop. uvicorn's own method would wake ten times a second."""
        accepting = asyncio.create_task(self._accept())
        await self._stopping.wait()
        accepting.cancel()
        await asyncio.wait([accepting])
        self._listener.close()

    async def _accept(self) -> None:
        while True:
            try:
                accepted, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:  # no descriptor is free; callers wait in the backlog
                log.warning("no connection can be accepted: %s", error.strerror)
                await asyncio.sleep(1)
                continue
            if len(self._open) >= self._max_connections:
                self._end_oldest([one for one in self._open if one.waits_for_request])
            connection = _Connection(self)
            self._open[connection] = asyncio.create_task(self._serve_connection(connection, accepted))
            await asyncio.sleep(0)  # many new connections do not hold up the others

    async def _serve_connection(self, connection: "_Connection", accepted: socket.socket) -> None:
        context = self._files.context() if self._files else None
        limit_s = _HEADERS_S if context else None
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=context, ssl_handshake_timeout=limit_s
            )
            await connection.closed.wait()
        except OSError as error:
            log.debug("a connection failed: %s", error)
        finally:
            self._open.pop(connection, None)
            if connection.transport:
                connection.transport.abort()

    def _end_oldest(self, connections: list["_Connection"]) -> None:
        """Ends the connection that has waited longest for its caller."""
        if connections:
            self._open.pop(min(connections, key=lambda one: one.since)).cancel()

    def limit_unread(self) -> None:
        """Ends the connections that have waited longest for their callers to read, if too many bytes are unread."""
        while len(unread := [one for one in self._open if one.flow and one.flow.write_paused]) > 1:
            if sum(one.transport.get_write_buffer_size() for one in unread) <= self._max_unread:
                break
            log.warning("a connection is closed: callers have left too many bytes of answers unread")
            self._end_oldest(unread)


class _Connection(H11Protocol):
    """A caller's connection, with a time limit for each request's headers."""

    def __init__(self, server: HttpServer) -> None:
        super().__init__(server.config, server.server_state, {}, asyncio.get_running_loop())
        self.conn = _Parser(h11.SERVER, _MAX_HEADER_BYTES)
        self.closed = asyncio.Event()
        self.since = time.monotonic()
        """When it began to wait for a request, or for the caller to read the answer."""
        self._limit_unread = server.limit_unread

    @property
    def waits_for_request(self) -> bool:
        """True while the caller has not sent a whole request."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(_HEADERS_S, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.closed.set()

    def data_received(self, data: bytes) -> None:  # uvicorn's would end the timer at the first byte of a request
        self.conn.receive_data(data)
        self.handle_events()

    def shutdown(self) -> None:
        super().shutdown()  # waits for a request that is in work
        self.loop.call_later(_UNFINISHED_S, self._abort_if_unfinished)

    def _abort_if_unfinished(self) -> None:
        if self.waits_for_request:
            self.transport.abort()

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limit_unread()

    def send_400_response(self, msg: str) -> None:
        with suppress(h11.LocalProtocolError):  # an answer is under way already
            super().send_400_response(msg)
        if self.cycle:  # the application is not to send another answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


class _Parser(h11.Connection):
    """Refuses long headers even if they come at once, ambiguous lengths, and bodies in many small chunks."""

    _chunks_left = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks_left = _FREE_CHUNKS
            size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
            if size > _MAX_HEADER_BYTES or dict(event.headers).keys() >= {b"content-length", b"transfer-encoding"}:
                raise h11.RemoteProtocolError("the headers are too long, or give the length twice")
        elif isinstance(event, h11.Data):
            self._chunks_left += len(event.data) // _MIN_CHUNK_BYTES - event.chunk_end
            if self._chunks_left < 0:
                raise h11.RemoteProtocolError("the chunks are too small")
        return event


def _listen(settings: Settings) -> socket.socket:
    """The listening socket of TMS_HOST and TMS_HTTP_PORT; "::" stands for all addresses, also those of IPv4."""
    host, port = settings.host, settings.http_port or 0
    if host == "::" and not socket.has_dualstack_ipv6():  # gRPC does the same where there is no IPv6
        host = "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=host == "::")
    except OSError as error:
        raise SettingsError(
            f"TMS_HTTP_PORT={port} cannot be listened on: {error.strerror}; choose another, 0 for a free one, or off"
        ) from None
    # Connections inherit it. asyncio sets it only on those that it accepts itself; without it answers wait 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    return listener

"""A call under way by the local transport."""

import asyncio
from collections.abc import Callable
from typing import Any

from tiny_model_server import local_transport
from tiny_model_server.client import channel, fork_safety
from tiny_model_server.client.calls import STATUSES
from tiny_model_server.client.local import LocalConnection, LocalConnections
from tiny_model_server.client.transport import Call

NOT_ANSWERED = object()
"""Returned if gRPC must make the call instead."""


class LocalCall:
    """A call that one thread waits for, like a future.

    ``by_grpc`` makes the call where the local transport cannot.
    """

    def __init__(
        self,
        call: Call,
        connections: LocalConnections,
        connection: LocalConnection,
        by_grpc: Callable[[Call], Any] = lambda call: NOT_ANSWERED,
    ) -> None:
        self._call, self._connections, self._connection = call, connections, connection
        self._by_grpc = by_grpc
        self._generation = fork_safety.generation
        self._cancelled = False

    def send(self) -> bool:
        """Sends the request; False if memory cannot be shared."""
        call, connection = self._call, self._connection
        try:
            message = call.request.placed(connection.place(call.request.arrays))
        except (OSError, ValueError) as error:
            self._connections.give_up(f"memory cannot be shared: {error}")
            self.cancel()
            return False
        try:
            connection.send(call.request.method.path.encode(), message, call.remaining(), call.retry)
        except OSError:
            pass  # ``receive`` reports the error
        return True

    def receive(self) -> Any:
        """The answer, the error raised, or NOT_ANSWERED."""
        usable, call, connection = False, self._call, self._connection
        try:
            answer = connection.receive(call.remaining())
            usable = True
            status = STATUSES.get(answer.code & ~local_transport.FINAL, "UNKNOWN")
            if status in channel.RETRIED and call.retry and not answer.code & local_transport.FINAL:
                return NOT_ANSWERED
            if answer.code:
                raise self._failed(status, answer.body.decode())
            self._ended("OK")
            return call.request.decode(call.request.method.response.FromString(answer.body), answer.arrays)
        except TimeoutError:
            raise self._failed("DEADLINE_EXCEEDED", "Deadline Exceeded") from None
        except OSError as error:
            if self._cancelled or self._connections.closed:
                raise call.closed() from None
            if call.retry:
                return NOT_ANSWERED
            raise self._failed("UNAVAILABLE", f"the server disconnected: {error}") from None
        finally:
            self._connections.give_back(connection, usable=usable)

    async def received(self) -> Any:
        """As ``receive``, while the event loop goes on."""
        loop = asyncio.get_running_loop()
        came, fd = asyncio.Event(), self._connection.fileno()
        loop.add_reader(fd, came.set)
        try:
            try:
                async with asyncio.timeout(self._call.remaining()):
                    await came.wait()
            finally:
                loop.remove_reader(fd)
        except TimeoutError:
            pass  # ``receive`` reports it
        except asyncio.CancelledError:
            self.cancel()
            raise
        if came.is_set() and not self._connection.complete():
            return await asyncio.to_thread(self.receive)
        return self.receive()

    def done(self) -> bool:
        """True if ``result`` would not wait."""
        return self._connection.answered()

    def result(self) -> Any:
        """The answer, or the error raised; gRPC makes the call if need be."""
        with fork_safety.in_flight:
            if self._generation != fork_safety.generation:
                raise self._call.error("CANCELLED", "it was begun before a fork")
            answer = self.receive()
            return self._by_grpc(self._call) if answer is NOT_ANSWERED else answer

    def cancel(self) -> None:
        """Ends the call, from any thread; in a forked child, it is the parent's."""
        self._cancelled = True
        if self._generation == fork_safety.generation:
            self._connections.give_back(self._connection, usable=False)

    def _failed(self, status: str, details: str) -> Exception:
        self._ended(status)
        return self._call.error(status, details, self._connection.server)

    def _ended(self, status: str) -> None:
        self._call.ended((("tms-replica", self._connection.server),), status)

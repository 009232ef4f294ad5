"""One call under way: its time limit and its outcome, and how the local transport carries it."""

import asyncio
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from tiny_model_server import request_ids, tracing
from tiny_model_server.client import channel, errors, fork_safety
from tiny_model_server.client.calls import STATUSES, Request
from tiny_model_server.client.local import LocalConnection, LocalConnections
from tiny_model_server.client.stats import NOBODY
from tiny_model_server.local_transport import FINAL

NOT_ANSWERED = object()
"""Returned if gRPC must make the call instead."""
_ELSEWHERE = ("FAILED_PRECONDITION", "NOT_FOUND")
"""Statuses that another replica may not give."""
_NO_ANSWER = "Deadline Exceeded"  # gRPC's words if no server has said why


class Call:
    """One call: its request and its time limit, and what came of it. ``transport`` is that of its client."""

    def __init__(
        self, transport: Any, request: Request, timeout: float | None, retry: bool, outcome: "Future[Any] | None" = None
    ) -> None:
        self.transport, self.request, self.retry = transport, request, retry
        self.timeout: float = transport.options["timeout"] if timeout is None else timeout
        self.begun = time.monotonic()
        self.outcome = outcome
        """The future that the application has, if it has one."""
        self.final = not retry
        """Whether the answer that comes now is the application's, be it an error."""
        self.refused = False
        """Whether a server has said that no other will answer it."""
        self.handle: Any = None
        """What cancels the call. A blocking call by gRPC has none: it ends when its channel closes."""
        self.channel: channel.SharedChannel
        self._span, self._trace = tracing.client_span(request.method.path, request.id)

    def remaining(self) -> float:
        """Seconds until the deadline, never 0."""
        return max(0.001, self.begun + self.timeout - time.monotonic())

    def options(self) -> dict[str, Any]:
        """Time limit and metadata, as gRPC takes them."""
        once = () if self.retry else (("tms-retry", "no"),)
        known = ((request_ids.HEADER, self.request.id), *once, *self._trace)
        return {"timeout": self.remaining(), "metadata": (*self.transport.metadata, *known)}

    def cancel_by(self, handle: Any) -> Any:
        """Notes what cancels the call; cancelling the application's future does it, too."""
        self.handle = handle
        if self.outcome:
            self.outcome.add_done_callback(lambda future: handle.cancel() if future.cancelled() else None)
        return handle

    def ended(self, trailing: Any, status: str = "OK") -> str:
        """Counts the call, which has ended with this trailing metadata; returns the replica that answered."""
        if self._span:
            self._span.set_attribute("rpc.status", status)
            self._span.end()
            self._span = None  # the call may be made again
        replica: str = self.transport.stats.add(
            self.request.method.name, time.monotonic() - self.begun, trailing, status
        )
        return replica

    def failed(self, trailing: Any, status: str, details: str) -> errors.ModelClientError:
        """Counts the call, which has failed; returns the exception for the application."""
        replica = self.ended(trailing, status)
        self.refused = ("grpc-retry-pushback-ms", "-1") in tuple(trailing or ())
        if details == _NO_ANSWER:
            details = f"no answer within timeout={self.timeout:g} s"
        replica = "" if replica == NOBODY else replica
        return errors.from_status(status, details, self.transport.model, replica, self.request.id)

    def cancelled(self, why: str = "the client was closed") -> errors.ModelClientError:
        """The exception for a call that this process has ended."""
        return errors.from_status("CANCELLED", why, self.transport.model, request_id=self.request.id)


class LocalCall:
    """A call by the local transport. One thread waits for it, as for a future, or one task."""

    def __init__(self, call: Call, connections: LocalConnections, connection: LocalConnection) -> None:
        self._call, self._connections, self._connection = call, connections, connection
        self._trailing = (("tms-replica", connection.server),)
        self._cancelled = False
        self._held = [connection]  # until it is given back, by the thread that waits or by one that cancels

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
            path = f"{call.request.method.path} {call.request.id}".encode()
            connection.send(path, message, call.remaining(), call.retry)
        except OSError:
            pass  # ``receive`` reports it
        return True

    def receive(self) -> Any:
        """The answer, the error raised, or NOT_ANSWERED."""
        usable, call, connection = False, self._call, self._connection
        try:
            answer = connection.receive(call.remaining())
            usable = True
            status = STATUSES.get(answer.code & ~FINAL, "UNKNOWN")
            elsewhere = status in _ELSEWHERE and len(call.transport.locals) > 1
            if (status in channel.RETRIED or elsewhere) and call.retry and not answer.code & FINAL:
                return NOT_ANSWERED
            if status != "OK":
                raise call.failed(self._trailing, status, answer.body.decode(errors="replace"))
            call.ended(self._trailing)
            return call.request.decode(answer.body, connection.response)
        except TimeoutError:
            raise call.failed(self._trailing, "DEADLINE_EXCEEDED", _NO_ANSWER) from None
        except OSError as error:
            if self._cancelled or self._connections.closed:
                raise call.cancelled() from None
            if call.retry:
                return NOT_ANSWERED
            raise call.failed(self._trailing, "UNAVAILABLE", f"the server disconnected: {error}") from None
        finally:
            self._give_back(usable=usable)

    async def received(self) -> Any:
        """As ``receive``, while the event loop goes on."""
        loop, came, fd = asyncio.get_running_loop(), asyncio.Event(), self._connection.fileno()
        loop.add_reader(fd, came.set)
        try:
            with suppress(TimeoutError):  # ``receive`` reports it
                async with asyncio.timeout(self._call.remaining()):
                    await came.wait()
        except asyncio.CancelledError:
            loop.remove_reader(fd)  # before the descriptor is closed
            self.cancel()
            raise
        loop.remove_reader(fd)
        if came.is_set() and not self._connection.complete():
            return await asyncio.to_thread(self.receive)
        return self.receive()

    def done(self) -> bool:
        """True if ``result`` would not wait."""
        return self._connection.answered()

    def result(self) -> Any:
        """The answer, or the error raised; gRPC makes the call if need be. For blocking clients."""
        with fork_safety.in_flight:
            if self._connection.generation != fork_safety.generation:
                raise self._call.cancelled("it was begun before a fork")
            if (answer := self.receive()) is not NOT_ANSWERED:
                return answer
            self._call.handle = None  # this one cannot cancel it any more
            return self._call.transport.by_grpc(self._call)

    def cancel(self) -> None:
        """Ends the call, from any thread; in a forked child, it is the parent's."""
        self._cancelled = True
        if self._connection.generation == fork_safety.generation:
            self._give_back(usable=False)

    def _give_back(self, *, usable: bool) -> None:
        """Gives the connection back once: it may carry another call afterwards."""
        with suppress(IndexError):
            self._connections.give_back(self._held.pop(), usable=usable)

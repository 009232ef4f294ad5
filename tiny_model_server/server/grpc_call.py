"""One call of grpcio's server, which receives, sends and ends without holding a thread.

grpcio's Python API receives and sends only by blocking a thread, so a silent caller would hold one. Only this file uses
what lies below that API, ``grpc._server`` and cygrpc. It works with grpcio 1.60 and with 1.85.
"""

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import grpc
from grpc import _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from tiny_model_server.errors import ServerError, message_of

log = logging.getLogger("tiny_model_server.grpc")


class GrpcCall:
    """A call as grpcio gives it to its thread pool. Any thread may use it."""

    def __init__(self, event: Any, state: Any) -> None:
        """``event`` and ``state`` are grpcio's own objects for the call."""
        self._event, self._state = event, state
        self.context: Any = _server._Context(event, state, None)
        """A servicer context of the call."""
        self.peer: str = self.context.peer()
        self.message: bytes | None = None
        """The request, or the last one of a stream, while its bytes are counted."""

    def receive(self, then: Callable[[bytes | None], None]) -> None:
        """Calls ``then`` with the next message, None if there is none, in grpcio's own thread, which must not wait."""

        def received() -> None:
            with self._state.condition:
                message, self._state.request = self._state.request, None
            then(message)

        complete = _server._receive_message(self._state, self._event.call, None)
        self._begin(cygrpc.ReceiveMessageOperation(0), "receive_message", complete, received)

    def send(self, message: bytes, then: Callable[[], None]) -> None:
        """Sends one message of a stream, then calls ``then`` in grpcio's own thread; nothing if the call has ended."""
        complete = _server._send_message(self._state, "send_message")
        with self._state.condition:
            if self.context.is_active():
                if self._state.initial_metadata_allowed:
                    self.context.send_initial_metadata(())
                self._begin(cygrpc.SendMessageOperation(message, 0), "send_message", complete, then)

    def finish(self, message: bytes | None = None) -> None:
        """Sends the status, after a last message if there is one. Does nothing if the call has its status."""
        with self._state.condition:
            if self.context.is_active():
                _server._status(self._event, self._state, message)

    def end(self, error: ServerError) -> bool:
        """Sends the status of an error. Returns False if the call has its status already."""
        with self._state.condition:
            if active := bool(self.context.is_active()):
                set_status(self.context, error)
                self.finish()
            return active

    def _begin(self, operation: Any, name: str, complete: Callable[[Any], Any], then: Callable[[], None]) -> None:
        """Begins what grpcio knows by this name. Its thread calls ``complete``, which is grpcio's, and ``then``."""

        def completed(event: Any) -> Any:
            done = complete(event)
            try:
                then()
            except ServerError as error:
                self.end(error)
            except Exception as error:  # grpcio's thread serves all calls, and must go on
                log.exception("a call failed")
                self.end(ServerError(f"a fault in the server: {message_of(error, named=True)}"))
            return done

        with self._state.condition:
            self._event.call.start_server_batch((operation,), completed)
            self._state.due.add(name)


def set_status(context: Any, error: ServerError, trailing: Mapping[str, str | bytes] = MappingProxyType({})) -> str:
    """Gives the call the status of an error, with when to call again; returns the message, which fits in a header."""
    message, sent = message_of(error), dict(trailing)
    if (wait_ms := getattr(error, "retry_after_ms", None)) is not None:  # below 0: never
        sent["grpc-retry-pushback-ms"] = str(wait_ms)
    context.set_trailing_metadata(tuple(sent.items()))
    context.set_code(grpc.StatusCode[error.status])
    context.set_details(message)
    return message


def abort(context: Any, error: ServerError, trailing: Mapping[str, str | bytes] = MappingProxyType({})) -> NoReturn:
    """Ends the call with the status of an error, by an exception that grpcio knows."""
    context.abort(grpc.StatusCode[error.status], set_status(context, error, trailing))
    raise AssertionError  # abort has raised

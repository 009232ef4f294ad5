"""The one tree of errors; each class carries the name of the gRPC status that a caller sees."""

from __future__ import annotations


class ServerError(Exception):
    """An error with a gRPC status (a name such as ``"INTERNAL"``); its text is the message for the caller."""

    status = "INTERNAL"


class InvalidInput(ServerError):
    """The caller's input is wrong; say what was wrong and what would be right. Models raise it too."""

    status = "INVALID_ARGUMENT"


class ModelNotFound(ServerError):
    """No folder has this name."""

    status = "NOT_FOUND"


class ModelUnavailable(ServerError):
    """The model is known, but it could not be loaded, is not loaded, or cannot do what was asked."""

    status = "FAILED_PRECONDITION"


class ModelError(ServerError):
    """The model itself failed: it raised, answered nonsense, or its process died."""

    status = "INTERNAL"


class Overloaded(ServerError):
    """The queue is full. ``retry_after_ms`` says when it may have room, where that is known; -1: never."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class DeadlineExceeded(ServerError):
    """The caller's deadline or the model's time limit passed."""

    status = "DEADLINE_EXCEEDED"


class Cancelled(ServerError):
    """The caller went away."""

    status = "CANCELLED"


class Stopping(ServerError):
    """The server is stopping; another replica will answer."""

    status = "UNAVAILABLE"


class PermissionDenied(ServerError):
    """The caller may not do this."""

    status = "PERMISSION_DENIED"


class Unauthenticated(ServerError):
    """The caller did not say who it is: no token, or a wrong one."""

    status = "UNAUTHENTICATED"


class Unimplemented(ServerError):
    """There is no such method."""

    status = "UNIMPLEMENTED"


def from_status(status: str, message: str) -> ServerError:
    """Rebuilds an error that crossed a process boundary as its status name and message."""
    for kind in ServerError.__subclasses__():
        if kind.status == status:
            return kind(message)
    return ServerError(message)


_NAMES = """OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED
RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS
UNAUTHENTICATED"""
CODES = {name: code for code, name in enumerate(_NAMES.split())}
"""gRPC's number of each status name."""

"""The exceptions that the client raises, one class for each gRPC status."""

from typing import Any

import grpc


class ModelClientError(grpc.RpcError):
    """A call that failed: ``code()`` is the gRPC status, ``details()`` says what was wrong.

    ``model`` was called; ``replica`` ("host:port", as it names itself) answered, or is "" if none did. The server's log
    names the call by ``request_id``.
    """

    def __init__(
        self, code: grpc.StatusCode, details: str, model: str = "", replica: str = "", request_id: str = ""
    ) -> None:
        text = f"{model}: {details}" if model and repr(model) not in details else details
        super().__init__(f"{text} (replica {replica})" if replica else text)
        self._code, self._details = code, details
        self.model, self.replica, self.request_id = model, replica, request_id

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._code, self._details, self.model, self.replica, self.request_id)

    def code(self) -> grpc.StatusCode:
        """The gRPC status."""
        return self._code

    def details(self) -> str:
        """What was wrong."""
        return self._details


class InvalidInput(ModelClientError):
    """INVALID_ARGUMENT: the input is wrong; the message says what would be right."""


class ModelNotFound(ModelClientError):
    """NOT_FOUND: the server has no model of this name."""


class ModelUnavailable(ModelClientError):
    """FAILED_PRECONDITION: the model is known, but could not be loaded or cannot do this."""


class ModelFailed(ModelClientError):
    """INTERNAL: the model raised, or its process died of this input."""


class Overloaded(ModelClientError):
    """RESOURCE_EXHAUSTED: a queue is full, or the message is too large."""


class DeadlineExceeded(ModelClientError):
    """DEADLINE_EXCEEDED: there was no answer within ``timeout``."""


class ServerUnavailable(ModelClientError):
    """UNAVAILABLE: no server is reachable at the addresses."""


class Cancelled(ModelClientError):
    """CANCELLED: the call was cancelled, most often because the client was closed."""


class PermissionDenied(ModelClientError):
    """PERMISSION_DENIED: the server allows this only from its own host or with the admin token."""


class Unauthenticated(ModelClientError):
    """UNAUTHENTICATED: a token or a certificate, the client's or the server's, is missing or wrong."""


ELSEWHERE = (ModelUnavailable, ModelNotFound, ServerUnavailable)
"""After these, other replicas may answer."""

_CLASSES = {
    "INVALID_ARGUMENT": InvalidInput,
    "NOT_FOUND": ModelNotFound,
    "FAILED_PRECONDITION": ModelUnavailable,
    "INTERNAL": ModelFailed,
    "RESOURCE_EXHAUSTED": Overloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAVAILABLE": ServerUnavailable,
    "CANCELLED": Cancelled,
    "PERMISSION_DENIED": PermissionDenied,
    "UNAUTHENTICATED": Unauthenticated,
}


def from_status(
    status: str, details: str, model: str = "", replica: str = "", request_id: str = ""
) -> ModelClientError:
    """The exception for a gRPC status, given by its name."""
    return _CLASSES.get(status, ModelClientError)(grpc.StatusCode[status], details, model, replica, request_id)

"""The one tree of errors; each class carries the name of the gRPC status that a caller sees."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from urllib.parse import quote, unquote

_LONGEST = 2048
"""Bytes of a message on the wire. gRPC sends it in a header, which may be lost above 8 KB."""
_UNSOUND = re.compile(r"[^\n\t -~\x80-\ud7ff\ue000-\U0010ffff]")
_AS_IT_IS = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


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


class CannotDo(ModelUnavailable):
    """The model cannot do what was asked, whichever replica is asked."""

    retry_after_ms = -1


class ModelError(ServerError):
    """The model itself failed: it raised, answered nonsense, or its process died."""


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
    """The caller has disconnected."""

    status = "CANCELLED"


class Stopping(ServerError):
    """The server is stopping; another replica will answer."""

    status = "UNAVAILABLE"


class NowAPipeline(Stopping):
    """The model was found to be a pipeline while the call was queued; the call is to be made again."""


class PermissionDenied(ServerError):
    """The caller may not do this."""

    status = "PERMISSION_DENIED"


class Unauthenticated(ServerError):
    """The caller sent no token, or a wrong one."""

    status = "UNAUTHENTICATED"


class Unimplemented(ServerError):
    """There is no such method."""

    status = "UNIMPLEMENTED"


def suggestion(name: str, names: Iterable[str], like: float = 0.6) -> str:
    """Returns " (did you mean 'x'?)" with the one of ``names`` that is most like a wrong name; "" if none is.

    Case and underscores make no difference. ``like``, from 0 to 1, is how much the names must have in common.
    """
    plain = {re.sub("[_-]", "", one.lower()): one for one in sorted(names)}
    near = get_close_matches(re.sub("[_-]", "", name.lower()), plain, 1, like)
    return f" (did you mean {plain[near[0]]!r}?)" if near else ""


def from_status(status: str, message: str) -> ServerError:
    """Rebuilds an error that crossed a process boundary as its status name and message."""
    kinds = (kind for kind in ServerError.__subclasses__() if kind.status == status)
    return next(kinds, ServerError)(bounded(message))


def message_of(error: BaseException, *, named: bool = False) -> str:
    """The text of any error, as ``bounded`` leaves it; ``named`` puts the name of its class before it.

    An error without a text is named, so that a caller sees the same by every transport. It never raises, though what a
    model raised may do so when it is asked for its text.
    """
    try:
        text = str.__str__(str(error))  # which may be of a class derived from str
    except BaseException:  # its __str__ is a model's code, which may raise anything
        return "an error whose text cannot be had: its __str__ raised"
    name = type(error).__name__
    if not text:
        return name
    return bounded(f"{name}: {text}" if named else text)


def bounded(text: str) -> str:
    """The text, cut to 2 KB as gRPC writes it: a byte that is not printable ASCII takes three.

    What no wire can carry, half a surrogate pair and control characters, is escaped as Python writes it.
    """
    text = _UNSOUND.sub(lambda found: ascii(found[0])[1:-1], text[: _LONGEST + 1])
    wire = quote(text, safe=_AS_IT_IS)
    if len(wire) <= _LONGEST:
        return text
    whole = re.sub("%.?$", "", wire[: _LONGEST - len("...")])
    return unquote(whole, errors="ignore") + "..."


_NAMES = """OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED
RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS
UNAUTHENTICATED"""
CODES = {name: code for code, name in enumerate(_NAMES.split())}
"""gRPC's number of each status name."""

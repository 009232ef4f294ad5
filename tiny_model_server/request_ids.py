"""The id of a call, by which its log lines, spans and errors are found: how it is sent, checked and made."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

HEADER = "x-request-id"
"""The key in gRPC's metadata; in HTTP, a header."""

_SOUND = re.compile("[!-~]([ -~]{0,126}[!-~])?")
_chosen: ContextVar[str] = ContextVar("request_id", default="")


def checked(sent: Any) -> str:
    """The id that a caller sent; a new one if that is not 1 to 128 characters of printable ASCII."""
    return sent if isinstance(sent, str) and _SOUND.fullmatch(sent) else os.urandom(16).hex()


def for_call() -> str:
    """The id that the application has chosen for its calls, or a new one."""
    return _chosen.get() or os.urandom(16).hex()


@contextmanager
def request_id(chosen: str) -> Iterator[None]:
    """Calls that begin in the block have this id; ValueError unless it is 1 to 128 characters of printable ASCII.

    Without it, each call gets an id of its own. The server's log and traces name it, and ``ModelClientError`` has it.
    """
    if not (isinstance(chosen, str) and _SOUND.fullmatch(chosen)):
        raise ValueError(f"an id is 1 to 128 characters of printable ASCII, without spaces around, not {chosen!r}")
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)

"""What may come of an input: an answer or one of the project's own errors, soon and in little memory."""

import json
import logging
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.fuzzing.mutators import Mutate
from tiny_model_server.shared_memory import SharedBuffers

MOST_CPU_S = 1.0
_ENDLESS_S = 20.0
"""Of CPU: after so much, an input is given up."""
MOST_MEMORY = 64 << 20
"""Bytes beyond a multiple of the input: what the libraries keep for themselves."""
MEMORY_A_BYTE = 100
"""docs/limits.md and schemas.py: protobuf and JSON may take 40 to 100 bytes for one of the input."""
MODELS_FAULTS = (
    "the model's answer has half of a surrogate pair",
    "a chat model must return or yield",
    "an embedding model must return a vector",
)
"""Errors of the model, where it answers what it was sent."""


class Finding(AssertionError):
    """An input was handled wrongly."""


@dataclass
class Target:
    """One parser: the function that gives it an input, and inputs from which others are made."""

    name: str
    run: Callable[[bytes], None]
    seeds: list[bytes]
    modules: tuple[str, ...]
    """The files, below tiny_model_server/, whose coverage counts."""
    mutate: Mutate | None = None
    """Makes another input; by default, bytes are changed anywhere."""
    expected: tuple[str, ...] = ()
    """Loggers that report what a bad peer did, with a traceback."""


class _Faults(logging.Handler):
    """Collects the tracebacks that the server logs: faults of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(record)


_faults = _Faults()


def listen() -> None:
    """Takes all records of all loggers; nothing is written to standard error."""
    signal.signal(signal.SIGPROF, _give_up)
    root = logging.getLogger()
    root.handlers = [_faults]
    logging.getLogger("tiny_model_server").handlers = []
    logging.getLogger("tiny_model_server").propagate = True
    warnings.simplefilter("error")  # one that a request causes would go into the log
    warnings.simplefilter("ignore", ResourceWarning)  # of the loops and sockets that last as long as the process
    warnings.filterwarnings("ignore", module="numpy.lib.*format", message="Reading")  # of files that Python 2 wrote


def _give_up(number: int, frame: Any) -> None:
    raise Finding(f"{_ENDLESS_S} s of CPU, and no end")


def check(target: Target, data: bytes) -> None:
    """Gives a target one input. Raises whatever must not come of it."""
    _faults.found.clear()
    used, most = time.thread_time(), _peak_memory()
    open_files, buffers = _open_files(), len(SharedBuffers.open_names)
    signal.setitimer(signal.ITIMER_PROF, _ENDLESS_S)
    try:
        target.run(data)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    for record in _faults.found:
        if record.name not in target.expected:
            assert record.exc_info
            raise Finding(f"logged by {record.name}: {record.getMessage()}") from record.exc_info[1]
    if (used := time.thread_time() - used) > MOST_CPU_S:
        raise Finding(f"{used:.1f} s of CPU for {len(data)} bytes")
    if (grown := _peak_memory() - most) > MOST_MEMORY + MEMORY_A_BYTE * len(data):
        raise Finding(f"{grown >> 20} MiB for {len(data)} bytes")
    if (left := _open_files() - open_files) > 20:  # the engine keeps buffers of 16 calls
        raise Finding(f"{left} descriptors are left open")
    if (left := len(SharedBuffers.open_names) - buffers) > 20:
        raise Finding(f"{left} shared buffers are left open")


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def status(name: str, message: str) -> None:
    """Checks the status of an answer: faults of the server or of the model are none that a request may cause."""
    faults = ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "ABORTED", "CANCELLED")
    if name in faults and not any(fault in message for fault in MODELS_FAULTS):
        raise Finding(f"{name}: {message}")
    message.encode()
    if len(message) > 3000:
        raise Finding(f"a message of {len(message)} characters")


def strict_json(text: str | bytes) -> Any:
    """The value of a JSON text; Finding if a strict parser would refuse it."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise Finding(f"an answer that is not JSON: {text[:200]!r}: {error}") from None


def _refuse(name: str) -> Any:
    raise ValueError(name)


@contextmanager
def only(*allowed: type[BaseException]) -> Iterator[None]:
    """Lets these exceptions pass as answers; they must have a text."""
    try:
        yield
    except allowed as error:
        if not str(error):
            raise Finding(f"{type(error).__name__} without a text") from error

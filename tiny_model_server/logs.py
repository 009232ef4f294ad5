"""How the server and its workers log: one line a record, as text or as JSON, to standard error.

Callers send much of what is logged, so no message can end its line or move a terminal's cursor: characters that are
not printable are escaped. The lines of a traceback are indented, so that none of them can pass for a record.

A worker writes its records to the front, which writes them to its own standard error as they are. Each begins with a
mark that the worker's model does not know, so that nothing that the model prints can pass for a record.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import select
import sys
from contextlib import suppress
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any

request_ids: ContextVar[str] = ContextVar("request_ids", default="")
"""The ids of the requests that this thread or task of a worker runs."""
access = logging.getLogger("tiny_model_server.access")
"""The access log: a record for each call, with its facts in ``fields``."""
access.disabled = True

_OWN = ("tiny_model_server", "models")  # a model's logger is called models.NAME
_PIECE = 4096  # bytes that a pipe takes whole if it takes any
_PATIENCE_MS = 100
_LOST = "%d records are lost: nobody read the log in time"
_WORD = re.compile(r"[^\s\"=\[\]]+")


class _Format(logging.Formatter):
    """What both styles know: the facts about a record besides its message."""

    def __init__(self, origin: dict[str, Any]) -> None:
        """``origin`` says which process logs."""
        super().__init__("%(asctime)s %(levelname)s %(name)s%(origin)s: %(message)s")
        self._origin = origin

    def _facts(self, record: logging.LogRecord) -> dict[str, Any]:
        """Which process logs, for which requests."""
        facts = {**self._origin, **getattr(record, "origin_of", {})}
        if ids := request_ids.get():
            facts["request_id"] = ids
        return facts


class _Text(_Format):
    def formatMessage(self, record: logging.LogRecord) -> str:
        facts, fields = _pairs(self._facts(record)), _pairs(getattr(record, "fields", {}))
        record.origin = f" [{facts}]" if facts else ""
        record.message = " ".join(filter(None, [escaped(record.message), fields]))
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {escaped(line)}" for line in super().formatException(ei).split("\n"))


class _Json(_Format):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._facts(record),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


_FORMATS = {"text": _Text, "json": _Json}


class Output(logging.Handler):
    """Writes lines to a descriptor. A reader that does not read holds up this process for a moment only."""

    def __init__(self, descriptor: int, mark: str = "") -> None:
        """With a ``mark``, with which each line begins then, the reader is the front, and is waited for."""
        super().__init__()
        self.setFormatter(_Text({}))
        self._descriptor, self._mark = descriptor, mark
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(self.format(record))
        except Exception:
            self.handleError(record)

    def write(self, lines: str, patience_ms: float | None = _PATIENCE_MS) -> None:
        """Writes one or more lines, or drops and counts what the reader does not take in time; OSError if it cannot."""
        with self.lock:  # type: ignore[union-attr]
            if self._lost and self._poll.poll(0):  # the last line may lack its end
                lines, self._lost = f"\n{self.format(_record(_LOST, 'WARNING', self._lost))}\n{lines}", 0
            text = "".join(f"{self._mark}{line}\n" for line in lines.split("\n"))
            data = text.encode(errors="backslashreplace")
            patience_ms = None if self._mark else 0 if self._lost else patience_ms
            with suppress(BlockingIOError):  # something else than a pipe may have less room
                while data and self._poll.poll(patience_ms):
                    data = data[os.write(self._descriptor, data[:_PIECE]) :]
            self._lost += bool(data)


output = Output(2)
"""Where the front's log goes."""


def configure(levels: str, style: str, *, access_log: bool = False) -> None:
    """Sends records to standard error, as "text" or "json".

    ``levels`` is the least severe level of the server's and the models' own records, then those of other loggers:
    "info,urllib3=debug". Without one, it is "warning".
    """
    output.setFormatter(_FORMATS[style]({}))
    _set_levels(levels, output)
    access.setLevel(logging.INFO)
    access.disabled = not access_log


def configure_worker(levels: str, style: str, mark: str, origin: dict[str, Any]) -> None:
    """The same for a worker, with the front's ``mark``. What its model prints goes to the front line by line.

    If the process is killed by a fault, it first prints where each thread was.
    """
    descriptor = os.dup(2)  # the model may close its own
    handler = Output(descriptor, mark)
    handler.setFormatter(_FORMATS[style](origin | {"pid": os.getpid()}))
    _set_levels(levels, handler)
    ours = logging.getLogger("tiny_model_server")  # the model may configure all other loggers as it likes
    ours.propagate, ours.handlers = False, [handler]
    faulthandler.enable(descriptor)
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]


def _set_levels(levels: str, handler: Output) -> None:
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name, _, level in (part.rpartition("=") for part in f"info,{levels}".split(",")):
        for logger in [name] if name else _OWN:
            logging.getLogger(logger).setLevel(level.upper())


def printed(text: str, origin: dict[str, Any]) -> str:
    """A line that a worker has printed, as the front logs it."""
    return output.format(_record(text, "INFO", name=f"models.{origin['model']}", origin_of=origin))


def _record(message: str, level: str, *arguments: Any, **values: Any) -> logging.LogRecord:
    known = {"name": __name__, "levelname": level, "msg": message, "args": arguments}
    return logging.makeLogRecord(known | values)


def escaped(text: str) -> str:
    """A text with every character that is not printable written as in a Python string: a line's end as two letters."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _pairs(facts: dict[str, Any]) -> str:
    """The facts as ``key=value``; a value that is no word is quoted, so that none can pass for another fact."""
    texts = {key: escaped(str(value)) for key, value in facts.items()}
    return " ".join(f"{key}={text if _WORD.fullmatch(text) else json.dumps(text)}" for key, text in texts.items())
